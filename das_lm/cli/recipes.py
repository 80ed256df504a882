"""``das-lm recipes``."""

from __future__ import annotations

from das_lm.cli.parsing import parse


def recipes(arguments: list[str]) -> None:
    """List the recipes that can be given by name."""
    parse("recipes", {}, arguments, recipes.__doc__)
    from das_lm.run.recipe_file import describe_recipes
    from das_lm.terminal import printable

    for name, description in describe_recipes().items():
        print(printable(f"{name:24} {description}"))
