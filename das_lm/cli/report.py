"""``das-lm report``."""

from __future__ import annotations

import argparse

from das_lm.cli.parsing import OneLineErrors
from das_lm.terminal import printable


def report(arguments: list[str]) -> None:
    """Write what runs learned and lost as one HTML file, with its figures beside it."""

    class Parser(OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(prog="das-lm report", description=report.__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="Directory of a run or of a classic benchmark, or one with such below it; several runs are compared.",
    )
    parser.add_argument(
        "--output_dir", help="Directory of report.html and figures/ (default: that of the run, of several 'report')."
    )
    parser.add_argument("--title", help="Title of the page.")
    options = parser.parse(arguments)
    from das_lm.report.page import write_report

    print(printable(f"Report: {write_report(options['runs'], options['output_dir'], options['title'])}"))
