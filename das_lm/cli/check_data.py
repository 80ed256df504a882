"""``das-lm check-data``."""

from __future__ import annotations

import argparse
import dataclasses

from das_lm.cli.parsing import OneLineErrors, RecipeOptions
from das_lm.errors import UserError


def check_data(arguments: list[str]) -> int:
    """Look for measured text that is trained on, and for training text that repeats itself."""

    class Parser(OneLineErrors, argparse.ArgumentParser):
        pass

    parser = Parser(prog="das-lm check-data", description=check_data.__doc__, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="Name of a recipe or path of a .yaml file.")
    for option in dataclasses.fields(RecipeOptions):
        if option.name in ("domain", "measure"):
            parser.add_argument(f"--{option.name}", nargs="+", **option.metadata)
        elif option.name == "text_column":
            parser.add_argument("--text_column", **option.metadata)
    parser.add_argument(
        "--end_task",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="Look for the test text of end-tasks too: a file with a column 'text', or a directory with test.jsonl.",
    )
    parser.add_argument("--n", type=int, default=13, help="Words in a row that count as shared (default: 13).")
    parser.add_argument("--output", metavar="FILE.json", help="Write all that was found to this file.")
    parser.add_argument("--strict", action="store_true", help="Exit with status 1 if measured text is trained on.")
    options = parser.parse(arguments)
    for spec in options["end_task"]:
        if not all(spec.partition("=")):
            raise UserError(f"--end_task {spec}: write NAME=PATH")

    from rich.markup import escape

    from das_lm.files import write_json
    from das_lm.measure.leakage import check
    from das_lm.run.recipe_file import load_recipe
    from das_lm.terminal import Console

    given = {key: options[key] for key in ("domain", "measure", "text_column") if options[key]}
    recipe = load_recipe(options["recipe"], {**given, "trust_remote_code": False}, check_device=False)
    leakage = check(recipe, options["n"], dict(spec.split("=", 1) for spec in options["end_task"]))
    console = Console(highlight=False)
    console.print(*leakage.tables(), sep="\n")
    warnings = [warning for _, warning in leakage.warnings()]
    for warning in warnings:
        console.print("[yellow]warning:[/yellow]", escape(warning), soft_wrap=True)
    if not warnings:
        console.print(f"No measured document has half or more of its {leakage.n}-grams in training text.")
    if options["output"]:
        write_json(options["output"], leakage.to_json())
    return 1 if options["strict"] and warnings else 0
