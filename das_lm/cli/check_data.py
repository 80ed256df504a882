"""``das-lm check-data``: measured text that is trained on."""

from __future__ import annotations

from pathlib import Path

from das_lm.cli.parsing import option, parse, switch
from das_lm.cli.pretrain import RECIPE_OPTIONS
from das_lm.errors import UserError

OPTIONS = {
    "recipe": option("Name of a recipe or path of a .yaml file.", positional=True, metavar="RECIPE"),
    **{name: RECIPE_OPTIONS[name] for name in ("domain", "measure", "text_column")},
    "end_task": option(
        "Look for the test text of end-tasks too: a file with a column 'text', or a directory with test.jsonl.",
        list[str],
        action="extend",
        metavar="NAME=PATH",
    ),
    "n": option("Words in a row that count as shared (default: 13).", int),
    "output": option("Write all that was found to this file.", metavar="FILE.json"),
    "strict": switch("Exit with status 1 if measured text is trained on."),
}


def check_data(arguments: list[str]) -> int:
    """Look for measured text that is trained on, and for training text that repeats itself."""
    options = parse("check-data", OPTIONS, arguments, check_data.__doc__)
    end_tasks = options.get("end_task", [])
    for spec in end_tasks:
        if not all(spec.partition("=")):
            raise UserError(f"--end_task {spec}: write NAME=PATH")
    output = Path(options["output"]).expanduser() if options.get("output") else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output}: is a directory, or in none that exists; give the path of a file")

    from rich.markup import escape

    from das_lm.files import write_json
    from das_lm.measure.leakage import check
    from das_lm.run.recipe_file import load_recipe
    from das_lm.terminal import Console

    given = {key: options[key] for key in ("domain", "measure", "text_column") if options.get(key)}
    recipe = load_recipe(options["recipe"], {**given, "trust_remote_code": False}, check_device=False)
    leakage = check(recipe, options.get("n", 13), dict(spec.split("=", 1) for spec in end_tasks))
    console = Console(highlight=False)
    console.print(*leakage.tables(), sep="\n")
    warnings = [warning for _, warning in leakage.warnings()]
    for warning in warnings:
        console.print("[yellow]warning:[/yellow]", escape(warning), soft_wrap=True)
    if not warnings:
        console.print(f"No measured document has half or more of its {leakage.n}-grams in training text.")
    if output:
        write_json(output, leakage.to_json())
    return 1 if options.get("strict") and warnings else 0
