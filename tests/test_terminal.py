"""What is printed gives a terminal no orders, wherever the text is from."""

import io

import pytest
from rich.progress import Progress
from rich.table import Table

from das_lm.cli import main
from das_lm.terminal import Console, is_watched, printable

BAD = "\x1b]0;owned\x07\x9b2J\x7f\r\udc80"


def test_line_ends_and_tabs_stay():
    assert printable("a\tb\nc é 🙂\N{ZERO WIDTH JOINER}") == "a\tb\nc é 🙂\N{ZERO WIDTH JOINER}"
    assert printable(BAD) == "?]0;owned??2J???"


def test_bars_are_watched_on_a_terminal_and_in_a_notebook(monkeypatch):
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not is_watched()
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert is_watched()
    monkeypatch.delenv("TTY_COMPATIBLE")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert is_watched()


def test_the_console_keeps_its_own_colours():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=60)
    table = Table(BAD, title=BAD)
    table.add_row(BAD, style="red")
    console.print(table, BAD, "[bold]mine[/bold]", style="red", markup=True)
    console.rule(BAD)
    with Progress(console=console, refresh_per_second=0.01) as progress:
        progress.update(progress.add_task(BAD), completed=100)
    printed = file.getvalue()
    assert "\x1b[31m" in printed and "\x1b[1;31mmine" in printed
    assert not any(character in printed for character in ("\x1b]", "\x07", "\x9b", "\x7f", "\udc80"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "bio_then_cs", "--domain", "bio=text.csv"], "first?]0;owned?"),
        (["--recipe", "recipe.yaml"], "key?]0;owned?: unknown key"),
    ],
)
def test_messages(tmp_path, monkeypatch, capsys, options, message):
    """Of a CSV header, of a key of a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.csv").write_text("first\x1b]0;owned\x07,second\nx,y\n")
    (tmp_path / "recipe.yaml").write_text('"key\\e]0;owned\\a": 1\ndomains: [bio]\n')
    assert main(["pretrain", *options, "--output_dir", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error and "\x1b]" not in error and "\x07" not in error
