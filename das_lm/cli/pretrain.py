"""``das-lm pretrain``."""

from __future__ import annotations

import dataclasses

from das_lm.cli.parsing import RecipeOptions, parse_training, recipe_and_overrides


@dataclasses.dataclass
class PretrainOptions(RecipeOptions):
    """Options of ``das-lm pretrain`` that are no training arguments."""

    method: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Continual-learning method, one or several."}
    )
    resume: bool = dataclasses.field(
        default=False, metadata={"help": "Continue the run in output_dir where it was interrupted."}
    )
    overwrite_output_dir: bool = dataclasses.field(
        default=False, metadata={"help": "Delete what an earlier run left in output_dir."}
    )
    print_recipe: bool = dataclasses.field(
        default=False, metadata={"help": "Print the recipe with all that is given here, and stop."}
    )


def pretrain(arguments: list[str]) -> None:
    """Learn the domains of a recipe one after the other."""
    options = parse_training(
        PretrainOptions,
        arguments,
        prog="das-lm pretrain",
        usage="%(prog)s --recipe NAME_OR_PATH [OPTION …]",
        description="Learn the domains of a recipe one after the other. What is given here goes before the recipe.",
    )
    from das_lm.run.recipe_file import load_recipe

    resume, overwrite, print_only = (
        options.pop(key, False) for key in ("resume", "overwrite_output_dir", "print_recipe")
    )
    name, overrides = recipe_and_overrides(PretrainOptions, options)
    recipe = load_recipe(name, overrides, check_device=not print_only)
    if print_only:
        print(recipe.to_yaml(), end="")
        return

    from das_lm.run.walk import continual_pretrain

    continual_pretrain(recipe, resume=resume, overwrite=overwrite)
