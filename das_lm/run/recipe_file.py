"""The file of a recipe: find it, read it, know where each key stands, and check it as a whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from das_lm.errors import UserError, did_you_mean
from das_lm.files import recipe_folders
from das_lm.plain_words import describe_value, explain, key_path
from das_lm.run.arguments import NO_SECRET, KeyPath, check_training, secrets_in
from das_lm.run.overrides import override, with_training
from das_lm.run.recipe import Recipe

#: Keys of a recipe file; a few aliases of aliases stand for billions.
MOST_KEYS = 10_000


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes that can be named; of one name, the working directory's."""
    return {path.stem: path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))}


def describe_recipes() -> dict[str, str]:
    """Name -> description of the recipes that can be named."""
    return {name: str(read_yaml(path)[0].get("description", "")) for name, path in sorted(recipes().items())}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: A path, or the name of a recipe in `recipes/`.

    Raises:
        UserError: There is none; the message lists those that there are.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = recipes()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    if path.is_dir():
        raise UserError(f"recipe '{name_or_path}': a directory; name a .yaml file in it")
    near = did_you_mean(path.stem, known)
    there_are = f" There are {', '.join(sorted(known))}." if near.startswith(" Did") else near
    raise UserError(
        f"recipe '{name_or_path}': no such file, and no recipe of that name."
        f"{near if near.startswith(' Did') else ''}{there_are} Write one of these names, or the path of a .yaml file"
    )


def load_recipe(
    name_or_path: str | Path, overrides: dict[str, Any] | None = None, check_device: bool = True
) -> Recipe:
    """Read and check a recipe as a whole.

    Args:
        name_or_path: A path, or the name of a recipe in `recipes/`.
        overrides: What the command line gives: recipe keys; `training`, merged key by key, over the domains' own too;
            `domain` and `measure`, lists of `"NAME"` or `"NAME=DATA"` (see `recipes/README.md`); `text_column`, the
            column of that DATA.
        check_device: Refuse training arguments that this machine cannot follow, such as bf16 without a GPU for it.

    Raises:
        UserError: All that is wrong, one line each: file, line, key, and what to write instead.
    """
    path = find_recipe(name_or_path)
    data, places = read_yaml(path)
    problems = [(at, NO_SECRET) for at in secrets_in(data)]
    key = "trust_remote_code"
    if data.get(key, False) is not False and key not in (overrides or {}):
        problems.append(((key,), f"a file cannot let code run; leave it out, and give --{key} on the command line"))
    if problems:
        raise UserError("\n".join(_tell(at, message, places) for at, message in problems))
    override(data, places, overrides or {})

    problems = []
    for at, entry in with_training(data):
        entry["training"], wrong = check_training(entry["training"], (*at, "training"))
        problems += wrong
    try:
        recipe = TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        problems = explain(error, Recipe) + problems
    if problems:
        raise UserError("\n".join(_tell(at, message, places) for at, message in problems))

    for index, domain in enumerate(recipe.domains):
        try:
            recipe.training_arguments(domain, recipe.output_dir, check_device)
        except UserError as error:
            keys = re.findall(r"\w+", str(error))
            own = [("domains", index, "training", key) for key in keys if key in domain.training]
            shared = [("training", key) for key in keys if key in recipe.training]
            raise UserError(f"{_place((own + shared + [()])[0], places)}: {error}") from error
    return recipe


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The data of a YAML file, and where each of its keys stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        places = {(): str(path)}
        if node is not None:
            _find_places(node, (), path, places)
        data = yaml.safe_load(text)  # plain data: a tag of a Python object is refused
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start:,}); a recipe is a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError:
        raise UserError(
            f"{path}: broken YAML: an alias refers to what contains it, or it is nested too deeply"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: broken YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # such as a date in month 13
        raise UserError(f"{path}: broken YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a mapping of keys to values, such as 'model_name_or_path: built-in', not "
            f"{'an empty file' if data is None else describe_value(data)}"
        )
    return data, places


def _find_places(node: yaml.Node, at: KeyPath, path: Path, places: dict[KeyPath, str]) -> None:
    if len(places) > MOST_KEYS:
        raise UserError(f"{path}: more than {MOST_KEYS:,} keys and entries, aliases counted; that is no recipe")
    if isinstance(node, yaml.ScalarNode) and re.search("[\0\ud800-\udfff]", node.value):
        raise UserError(
            f"{path}:{node.start_mark.line + 1}: {key_path(at)}: holds NUL, or half of a surrogate pair; neither can "
            "stand in a text or a path"
        )
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            places[(*at, index)] = f"{path}:{child.start_mark.line + 1}"
            _find_places(child, (*at, index), path, places)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            place = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{place}: broken YAML: a list or a mapping cannot be a key; a key is a word")
            here = (*at, key.value)
            if here in places:
                raise UserError(f"{place}: {key_path(here)}: the key stands there twice, first at {places[here]}")
            places[here] = place
            _find_places(child, here, path, places)


def _tell(at: KeyPath, message: str, places: dict[KeyPath, str]) -> str:
    place = _place(at, places)
    return f"{place}: {message}" if place == f"--{at[-1]}" else f"{place}: {key_path(at)}: {message}"


def _place(at: KeyPath, places: dict[KeyPath, str]) -> str:
    """Where a key stands, or the nearest key that contains it."""
    while at not in places:
        at = at[:-1]
    return places[at]
