"""Options of the commands, and one line for every mistake in them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import typing
from typing import Any, NoReturn

from das_lm.errors import UserError, did_you_mean


@dataclasses.dataclass
class RecipeOptions:
    """What goes before a recipe and is no training argument; the defaults are the recipe's."""

    _argument_group_name = "recipe"

    recipe: str | None = dataclasses.field(
        default=None, metadata={"help": "Name of a recipe (see 'das-lm recipes') or path of a .yaml file. Required."}
    )
    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "'built-in', 'built-in-causal', a directory, or a model of the hub."}
    )
    domain: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Learn these domains, in this order, instead of the recipe's. NAME is one of the recipe's or "
            "built in; DATA is a path or glob, several with commas, or hub:ORGANISATION/NAME.",
        },
    )
    measure: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME[=DATA]",
            "help": "Measure this text too after every stage, without training on it.",
        },
    )
    text_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Column of the text in DATA. The default is 'text'."}
    )
    schedule: str | None = dataclasses.field(
        default=None, metadata={"help": "sequential, alternating or interleaved."}
    )
    output_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Directory for checkpoints and results."}
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "Attention of the model, such as sdpa or eager."}
    )
    peft: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Train LoRA adapters: the recipe's mapping as JSON, such as '{\"r\": 8}'."},
    )
    new_lm_head: int | None = dataclasses.field(
        default=None,
        metadata={
            "metavar": "STEPS",
            "help": "The model is an encoder without its LM head: begin with a new one, and train it alone for so "
            "many steps on the text of --measure.",
        },
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with a model of the hub."}
    )


class OneLineErrors(argparse.ArgumentParser):
    """Raises `UserError` with one line instead of printing the usage and leaving."""

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            word = unknown[0].partition("=")[0]
            secret = next((one.partition("=")[0] for one in arguments if re.match(r"--\w*token\b", one)), None)
            if secret and not re.fullmatch(r"--\w+", word):  # it may be the secret
                raise UserError(f"a word belongs to no option; write {secret} TOKEN, one word each, and no more")
            if not word.startswith("-"):
                raise UserError(f"unexpected argument '{word}'; see {self.prog} --help")
            near = did_you_mean(word, self._option_string_actions)
            raise UserError(f"unknown option '{word}'.{near} See {self.prog} --help")
        options = vars(namespace)
        if options.get("output_dir"):
            options["output_dir"] = os.path.expanduser(options["output_dir"])
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def json_value(text: str) -> Any:
    """An option whose type is neither text, number nor switch is written as JSON."""
    return json.loads(text)


def parse_training(options: type, arguments: list[str], **description: str) -> dict[str, Any]:
    """
    The options that are given, and no others.

    Args:
        options: a dataclass of the command's own options; to them come all training arguments.
        arguments: the command line.
        description: `prog`, `usage` and `description` of the command.
    """
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.hf_argparser import string_to_bool

    from das_lm.training.config import DASConfig

    class Parser(OneLineErrors, HfArgumentParser):
        pass

    hints = typing.get_type_hints(DASConfig)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    groups: dict[str, list] = {"DAS": [], "training": []}
    for field in dataclasses.fields(DASConfig):
        if field.name != "output_dir":
            copy = dataclasses.field(
                default=field.default, default_factory=field.default_factory, metadata=field.metadata
            )
            group = "training" if field.name in inherited else "DAS"
            groups[group].append((field.name, hints[field.name], copy))
    classes = [
        dataclasses.make_dataclass("Options", fields, namespace={"_argument_group_name": group})
        for group, fields in groups.items()
    ]
    parser = Parser(
        [options, *classes],
        **description,
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest in hints and action.dest != "output_dir":
            action.help = f"{action.help or ''} (default: {action.default})".strip()
            if action.type not in (str, int, float, string_to_bool) and action.type and not action.choices:
                action.type = json_value
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True
        if action.dest == "peft":
            action.type = json_value
        action.default = argparse.SUPPRESS
    return parser.parse(arguments)


def recipe_and_overrides(kind: type[RecipeOptions], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name or path of the recipe, and what goes before it."""
    from das_lm.run.recipe_file import recipes

    if "recipe" not in options:
        raise UserError(f"--recipe is missing; give the path of a .yaml file or one of {', '.join(sorted(recipes()))}")
    ours = {field.name for field in dataclasses.fields(kind)}
    overrides = {key: value for key, value in options.items() if key in ours and key != "recipe"}
    overrides["training"] = {key: value for key, value in options.items() if key not in ours}
    return options["recipe"], overrides


def pairs(option: str, specs: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` of an option that can be given several times."""
    pairs: dict[str, str] = {}
    for spec in specs:
        name, _, value = spec.partition("=")
        if not name or not value:
            raise UserError(f"--{option} {spec}: write --{option} NAME=PATH")
        if name in pairs:
            raise UserError(f"--{option} {spec}: '{name}' is given twice")
        pairs[name] = value
    return pairs
