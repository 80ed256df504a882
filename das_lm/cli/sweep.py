"""``das-lm sweep``."""

from __future__ import annotations

import dataclasses

from das_lm.cli.parsing import RecipeOptions, parse_training, recipe_and_overrides
from das_lm.errors import UserError


@dataclasses.dataclass
class SweepOptions(RecipeOptions):
    """Options of ``das-lm sweep`` that are no training arguments."""

    sweep: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "'METHOD: KEY=VALUE,VALUE'",
            "help": "Run a method (several: naive,das; together: das+replay) with every value of a training argument, "
            "and with every combination of several; repeatable. Required.",
        },
    )
    seeds: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Seeds of every configuration (default: 0 1 2)."}
    )
    keep_models: bool = dataclasses.field(
        default=False,
        metadata={"help": "Keep the checkpoints; without, a finished run keeps its results and its recipe."},
    )


def sweep(arguments: list[str]) -> None:
    """Run one recipe with several methods, values and seeds, and compare."""
    options = parse_training(
        SweepOptions,
        arguments,
        prog="das-lm sweep",
        usage="%(prog)s --recipe NAME_OR_PATH --sweep 'METHOD: KEY=VALUE,VALUE' --output_dir DIRECTORY [OPTION …]",
        description="Run one recipe with several methods, values of their training arguments, and seeds, and compare "
        "them; as in --sweep 'naive: learning_rate=1e-4,3e-4' --sweep 'das: soft_mask_strength=0.5,1'. What is given "
        "here goes before the recipe. The same command again does what is missing.",
    )
    from das_lm.run.sweep import sweep

    entries, seeds, keep = options.pop("sweep", []), options.pop("seeds", [0, 1, 2]), options.pop("keep_models", False)
    name, overrides = recipe_and_overrides(SweepOptions, options)
    if "output_dir" not in overrides:
        raise UserError("--output_dir is missing; a sweep has a directory of its own")
    sweep(name, entries, seeds, overrides.pop("output_dir"), overrides, keep_models=keep)
