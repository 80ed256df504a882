"""``das-lm compare``."""

from __future__ import annotations

import argparse

from das_lm.cli.parsing import OneLineErrors


def compare(arguments: list[str]) -> None:
    """Put runs side by side: what they gained, and what they forgot at equal gain."""

    class Parser(OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(
        prog="das-lm compare",
        allow_abbrev=False,
        description="Put runs side by side, seeds averaged, and say what each method forgets at the gain that the "
        "reference has too.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, or one below which there are runs")
    parser.add_argument(
        "--reference", metavar="METHOD", help="what the others are compared with at equal gain (default: naive)"
    )
    parser.add_argument("--measure", default="loss", help="loss (default), accuracy, r2, cloze or end_task")
    parser.add_argument("--output_dir", help="write comparison.json and table.md there")
    options = parser.parse(arguments)
    from pathlib import Path

    from das_lm.report.compare import compare

    output = options.pop("output_dir")
    comparison = compare(**options)
    comparison.print()
    if output:
        comparison.save(Path(output))
