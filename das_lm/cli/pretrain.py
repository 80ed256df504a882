"""``das-lm pretrain``: a recipe, and what goes before it."""

from __future__ import annotations

import ast
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from das_lm.cli.parsing import MORE_HELP, json_value, listed, option, parse_with_training
from das_lm.errors import UserError

#: Of every command that runs a recipe. The defaults are the recipe's.
RECIPE_OPTIONS = {
    "recipe": option("Name of a recipe (see 'das-lm recipes') or path of a .yaml file. Required."),
    "model_name_or_path": option("'built-in', 'built-in-causal', a directory, or a model of the hub."),
    "domain": option(
        "Learn these domains, in this order, instead of the recipe's. NAME is one of the recipe's or built in; DATA "
        "is a path or glob, several with commas, or hub:ORGANISATION/NAME.",
        list[str],
        action="extend",
        metavar="NAME[=DATA]",
    ),
    "measure": option(
        "Measure this text too after every stage, without training on it.",
        list[str],
        action="extend",
        metavar="NAME[=DATA]",
    ),
    "remember": option(
        "Text that stands for what the model knew before: 'self' (the model writes it), self=ROWS, self=FILE (see "
        "das-lm self-text), or text of yours.",
        list[str],
        action="extend",
        metavar="NAME[=DATA]",
    ),
    "text_column": option("Column of the text in DATA. The default is 'text'."),
    "schedule": option("sequential, alternating or interleaved."),
    "output_dir": option("Directory for checkpoints and results."),
    "attn_implementation": option("Attention of the model, such as sdpa or eager."),
    "peft": option("Train LoRA adapters: the recipe's mapping as JSON, such as '{\"r\": 8}'.", json_value),
    "new_lm_head": option(
        "The model is an encoder without its LM head: begin with a new one, and train it alone for so many steps on "
        "the text of --measure.",
        int,
        metavar="STEPS",
    ),
    "trust_remote_code": option("Run the code that comes with a model of the hub.", bool),
}
OPTIONS = RECIPE_OPTIONS | {
    "method": option("Continual-learning method, one or several.", list[str]),
    "resume": option("Continue the run in output_dir where it was interrupted.", bool),
    "overwrite_output_dir": option("Delete what an earlier run left in output_dir.", bool),
    "print_recipe": option("Print the recipe with all that is given here, and stop.", bool),
}
#: Files of `das_lm.methods` that methods share.
SHARED = (
    *("__init__", "arguments", "base", "budget", "memory", "penalty", "per_example", "remembered", "targets"),
    *("teacher", "writing"),
)


def pretrain(arguments: list[str]) -> None:
    """Learn the domains of a recipe one after the other."""
    options, training = parse_with_training(
        "pretrain",
        "recipe",
        OPTIONS,
        arguments,
        usage="--recipe NAME_OR_PATH [OPTION …]",
        description="Learn the domains of a recipe one after the other. What is given here goes before the recipe.",
        epilog=f"methods:\n{listed(describe_methods())}\n\n{MORE_HELP}",
    )
    from das_lm.run.recipe_file import load_recipe

    resume, overwrite, print_only = (
        options.pop(key, False) for key in ("resume", "overwrite_output_dir", "print_recipe")
    )
    recipe = load_recipe(recipe_name(options), {**options, "training": training}, check_device=not print_only)
    if print_only:
        print(recipe.to_yaml(), end="")
        return

    from das_lm.run.walk import continual_pretrain

    continual_pretrain(recipe, resume=resume, overwrite=overwrite)


def recipe_name(options: dict[str, Any]) -> str:
    """Take the name or path of the recipe out of the options."""
    from das_lm.run.recipe_file import recipes

    if "recipe" not in options:
        raise UserError(f"--recipe is missing; give the path of a .yaml file or one of {', '.join(sorted(recipes()))}")
    return options.pop("recipe")


def describe_methods() -> dict[str, str]:
    """Name of every method -> the first line of its file, which is read and not imported: that would take seconds. Of
    the method that a package brings, its name."""
    others = {one.name: f"Of the package {one.dist.name}." for one in entry_points(group="das_lm.methods") if one.dist}
    files = sorted(Path(__file__).parents[1].joinpath("methods").glob("*.py"))
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in files}
    return others | {name: str(text).partition("\n")[0] for name, text in docstrings.items() if name not in SHARED}
