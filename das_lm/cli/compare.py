"""``das-lm compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path

from das_lm.cli.parsing import option, parse

OPTIONS = {
    "runs": option(
        "Directory of a run, or one below which there are runs.", list[str], positional=True, metavar="RUN"
    ),
    "reference": option("What the others are compared with at equal gain (default: naive).", metavar="METHOD"),
    "measure": option("loss (default), accuracy, r2, cloze, lm_eval or end_task."),
    "output_dir": option("Write comparison.json and table.md there."),
}


def compare(arguments: list[str]) -> None:
    """Put runs side by side: what they gained, and what they forgot at equal gain."""
    options = parse(
        "compare",
        OPTIONS,
        arguments,
        "Put runs side by side, seeds averaged, and say what each method forgets at the gain that the reference has "
        "too.",
    )
    from das_lm.report.compare import compare

    output = options.pop("output_dir", None)
    comparison = compare(**options)
    comparison.print()
    if output:
        comparison.save(Path(output))
