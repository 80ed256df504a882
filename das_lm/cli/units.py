"""``das-lm units``."""

from __future__ import annotations

import argparse

from das_lm.cli.parsing import OneLineErrors
from das_lm.errors import UserError


def units(arguments: list[str]) -> None:
    """Show which heads and neurons a model has, and check them; propose an entry for an unknown model."""

    class Parser(OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(
        prog="das-lm units",
        allow_abbrev=False,
        description="Show which heads and neurons a model has and which parameter slices belong to each, and check it "
        "on a few layers with random weights. For a model type that is not in the table, propose an entry. Reads the "
        "config alone.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A model type such as llama, a directory with config.json, or a model of the hub.",
    )
    parser.add_argument(
        "--entry", metavar="FILE.yaml", help="An entry of your own: the value of a recipe's key 'units', or a recipe."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run the code that comes with the model.")
    options = parser.parse(arguments)
    from das_lm.run.inspection import inspect, load_entry
    from das_lm.terminal import Console

    entry = load_entry(options["entry"]) if options["entry"] else None
    inspection = inspect(options["model"], entry, options["trust_remote_code"])
    inspection.print(Console(highlight=False))
    if not inspection.holds:
        raise UserError("the contract does not hold; DAS would mask or gate something else than these units")
