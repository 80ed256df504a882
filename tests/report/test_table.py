"""A table on the console, in Markdown and in a page."""

import io

from rich.console import Console

from das_lm.report.table import Links, Strong, Table

ROWS = [["run", "gain", "verdict"], ["<b>[red]a|b", Strong("-1.5 ± 0.1"), "more"], ["c", "–", "it is " + "so " * 20]]


def test_the_console_shows_names_as_they_are():
    console = Console(width=200, file=io.StringIO())
    console.print(Table("A [bold]title", ROWS, words=["verdict"]).console())
    text = console.file.getvalue()
    assert "A [bold]title" in text and "<b>[red]a|b" in text
    assert Table("", ROWS, words=["verdict"]).console().columns[2].justify == "left"


def test_markdown_escapes_names():
    lines = Table("", ROWS).markdown().splitlines()
    assert lines[:3] == [
        "| run | gain | verdict |",
        "| --- | --- | --- |",
        r"| &lt;b&gt;\[red\]a\|b | -1.5 ± 0.1 | more |",
    ]


def test_html():
    html = Table("", ROWS).html()
    assert '<th scope="row">&lt;b&gt;[red]a|b</th>' in html
    assert '<td class="strong">−1.5\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.1</td>' in html
    assert '<th scope="col" class="text">verdict</th>' in html and '<td class="text">more</td>' in html
    assert '<abbr title="' in html.partition("</thead>")[0]  # a gain is defined
    assert "<thead>" not in Table("", [["", ""], ["a", "b"]]).html()
    cell = Links.to({"0": "reports/a b.html", '"': "javascript:x"})
    html = Table("", [["", ""], ["a", cell]]).html()
    assert '<a href="reports/a%20b.html">0</a>, <a href="javascript%3Ax">&#34;</a>' in html and str(cell) == '0, "'
