"""``das-lm sweep``: one recipe, many runs."""

from __future__ import annotations

from das_lm.cli.parsing import option, parse_with_training
from das_lm.cli.pretrain import RECIPE_OPTIONS, recipe_name
from das_lm.errors import UserError

OPTIONS = RECIPE_OPTIONS | {
    "sweep": option(
        "Run a method (several: naive,das; together: das+replay) with every value of a training argument, and with "
        "every combination of several; repeatable. Required.",
        list[str],
        action="extend",
        metavar="'METHOD: KEY=VALUE,VALUE'",
    ),
    "seeds": option("Seeds of every configuration (default: 0 1 2).", list[int]),
    "keep_models": option("Keep the checkpoints; without, a finished run keeps its results and its recipe.", bool),
}


def sweep(arguments: list[str]) -> None:
    """Run one recipe with several methods, values and seeds, and compare."""
    options, training = parse_with_training(
        "sweep",
        "recipe",
        OPTIONS,
        arguments,
        usage="--recipe NAME_OR_PATH --sweep 'METHOD: KEY=VALUE,VALUE' --output_dir DIRECTORY [OPTION …]",
        description="Run one recipe with several methods, values of their training arguments, and seeds, and compare "
        "them; as in --sweep 'naive: learning_rate=1e-4,3e-4' --sweep 'das: soft_mask_strength=0.5,1'. What is given "
        "here goes before the recipe. The same command again does what is missing.",
    )
    from das_lm.run.sweep import sweep

    entries, seeds, keep = options.pop("sweep", []), options.pop("seeds", [0, 1, 2]), options.pop("keep_models", False)
    name = recipe_name(options)
    if "output_dir" not in options:
        raise UserError("--output_dir is missing; a sweep has a directory of its own")
    sweep(name, entries, seeds, options.pop("output_dir"), {**options, "training": training}, keep_models=keep)
