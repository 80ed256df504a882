"""Options as tables, and one line for every mistake in them. Nothing heavy is imported where nothing is parsed."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import textwrap
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from das_lm.errors import UserError, did_you_mean

#: Name -> keywords of `add_argument`; see [`option`].
Options = Mapping[str, Mapping[str, Any]]

#: Column in which the lines of a list begin.
LIST_INDENT = 17
MORE_HELP = "Training arguments go here too, such as --learning_rate 1e-4; --help_all lists them."


def option(help: str, kind: Any = str, **more: Any) -> dict[str, Any]:
    """
    Describe an option, for a table of them.

    Args:
        help: a line for people.
        kind: of its value: text, a number, `list[…]` of one, `bool` (with or without a value), or what reads it.
        more: further keywords of `add_argument`; `aliases`; and `positional`, for words without an option.
    """
    if kind is bool:
        return {"help": help, "type": truth, "nargs": "?", "const": True, **more}
    if typing.get_origin(kind) is list:
        return {"help": help, "type": typing.get_args(kind)[0], "nargs": "+", **more}
    return {"help": help, "type": kind, **more}


def switch(help: str, **more: Any) -> dict[str, Any]:
    """Describe an option that takes no value, so that a word after it is none."""
    return {"help": help, "action": "store_true", **more}


def truth(text: str) -> bool:
    """Read yes or no."""
    from transformers.hf_argparser import string_to_bool

    return string_to_bool(text)


def json_value(text: str) -> Any:
    """Read an option whose type is neither text, number nor switch: it is written as JSON."""
    return json.loads(text)


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of a text, each wrapped; those of a list begin with two spaces. Shows one spelling."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        indents = ((line, " " * LIST_INDENT * line.startswith("  ")) for line in text.splitlines())
        return "\n".join(textwrap.fill(line, width, subsequent_indent=indent) for line, indent in indents)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown)


def listed(lines: Mapping[str, str]) -> str:
    """Write names with a line each, as the help shows them."""
    return "\n".join(f"  {name:{LIST_INDENT - 3}} {line}" for name, line in lines.items())


class Parser(argparse.ArgumentParser):
    """Gives the options that are given, and no others; raises one line instead of printing the usage and leaving."""

    def __init__(self, *arguments: Any, **keywords: Any):
        fixed = {"formatter_class": _Formatter, "allow_abbrev": False, "argument_default": argparse.SUPPRESS}
        super().__init__(*arguments, **{**fixed, **keywords})

    def add_options(self, options: Options, title: str | None = None) -> None:
        """Add a table of options, as a group where it has a title."""
        group = self.add_argument_group(title) if title else self
        for name, keywords in options.items():
            keywords = dict(keywords)
            flags = [f"--{name}", f"--{name.replace('_', '-')}", *keywords.pop("aliases", ())]
            positional = keywords.pop("positional", False)
            group.add_argument(*([name] if positional else dict.fromkeys(flags)), **keywords)

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """
        Read the arguments of a command.

        Raises:
            UserError: one is unknown or wrong.
        """
        secret = next((one.partition("=")[0] for one in arguments if re.match(r"--[\w-]*token\b", one)), None)
        self._may_quote = secret is None
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            word = unknown[0].partition("=")[0]
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
        if not self._may_quote:  # what is quoted may be the secret
            message = re.sub(r"""(['"]).*\1""", "'…'", message)
        raise UserError(message)


def parse(command: str, options: Options, arguments: list[str], description: str | None) -> dict[str, Any]:
    """Read the arguments of a command that trains nothing: the options that are given, and no others."""
    parser = Parser(prog=f"das-lm {command}", description=description)
    parser.add_options(options)
    return parser.parse(arguments)


def parse_with_training(
    command: str,
    title: str,
    options: Options,
    arguments: list[str],
    usage: str,
    description: str,
    epilog: str = MORE_HELP,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Read the arguments of a command that takes training arguments.

    Args:
        command: its name.
        title: of its own options in the help.
        options: these.
        arguments: the command line.
        usage, description, epilog: of the help.
        only: the training arguments that the command reads; all by default.

    Returns:
        The own options, and the training arguments, that are given.
    """
    about = {"prog": f"das-lm {command}", "usage": f"%(prog)s {usage}", "description": description, "epilog": epilog}
    own = Parser(**about)
    own.add_argument("--help_all", "--help-all", action="help", help="show the training arguments too and exit")
    own.add_options(options, title)
    if "--help" in arguments or "-h" in arguments:
        own.parse(arguments)  # shows its own options, without the seconds that it takes to import all others
    given = _training_parser(own, about, only).parse(arguments)
    names = {action.dest for action in own._actions}
    return {key: given.pop(key) for key in list(given) if key in names}, given


def _training_parser(own: Parser, about: Mapping[str, str], only: Collection[str] | None) -> Parser:
    """A parser of a command's own options and of training arguments: all, or these only."""
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.hf_argparser import string_to_bool

    from das_lm.training.config import ContinualConfig

    class TrainingParser(Parser, HfArgumentParser):
        pass

    hints = typing.get_type_hints(ContinualConfig)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    groups: dict[str, list] = {"DAS": [], "training": []}
    for field in dataclasses.fields(ContinualConfig):
        if field.name != "output_dir" and (only is None or field.name in only):
            alone = {"default": field.default, "default_factory": field.default_factory, "metadata": field.metadata}
            group = "training" if field.name in inherited else "DAS"
            groups[group].append((field.name, hints[field.name], dataclasses.field(**alone)))
    classes = [
        dataclasses.make_dataclass("Options", fields, namespace={"_argument_group_name": group})
        for group, fields in groups.items()
    ]
    parser = TrainingParser(classes, parents=[own], add_help=False, argument_default=None, **about)
    for action in parser._actions:
        if action.default is argparse.SUPPRESS:  # the command's own
            continue
        action.help = f"{action.help or ''} (default: {action.default})".strip()
        if action.type not in (str, int, float, string_to_bool) and action.type and not action.choices:
            action.type = json_value
        if action.type is string_to_bool:
            action.nargs, action.const = "?", True
        action.default = argparse.SUPPRESS
    return parser


def pairs(option: str, specs: Iterable[str]) -> dict[str, str]:
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
