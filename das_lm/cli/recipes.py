"""``das-lm recipes``."""

from __future__ import annotations

import argparse

from das_lm.cli.parsing import OneLineErrors


def recipes(arguments: list[str]) -> None:
    """List the recipes that can be given by name."""

    class Parser(OneLineErrors, argparse.ArgumentParser):
        pass

    Parser(prog="das-lm recipes", description=recipes.__doc__).parse(arguments)
    from das_lm.run.recipe_file import describe_recipes

    for name, description in describe_recipes().items():
        print(f"{name:24} {description}")
