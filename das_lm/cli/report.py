"""``das-lm report``: one page."""

from __future__ import annotations

from das_lm.cli.parsing import option, parse
from das_lm.terminal import printable

OPTIONS = {
    "runs": option(
        "Directory of a run or of a classic benchmark, or one with such below it; several runs are compared.",
        list[str],
        positional=True,
        metavar="RUN",
    ),
    "output_dir": option("Directory of report.html and figures/ (default: that of the run, of several 'report')."),
    "title": option("Title of the page."),
}


def report(arguments: list[str]) -> None:
    """Write what runs learned and lost as one HTML file, with its figures beside it."""
    options = parse("report", OPTIONS, arguments, report.__doc__)
    from das_lm.report.page import write_report

    page = write_report(options["runs"], options.get("output_dir"), options.get("title"))
    print(printable(f"Report: {page}"))
