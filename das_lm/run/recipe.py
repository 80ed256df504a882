"""Recipes: one YAML file is one experiment, checked as a whole before anything heavy loads."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
import os
import re
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from das_lm.data.domains import Domain, data_kind
from das_lm.errors import UserError, did_you_mean
from das_lm.plain_words import describe_type, describe_value, explain, in_plain_words, key_path

if TYPE_CHECKING:
    from das_lm.data.domains import Documents
    from das_lm.training.config import DASConfig

KeyPath = tuple[str | int, ...]

#: Keys of a recipe file; a few aliases of aliases stand for billions.
MOST_KEYS = 10_000

NO_SECRET = "a recipe is no place for a secret; leave it out, and log in with `hf auth login`"
#: Training arguments that have another place.
ELSEWHERE = {
    "output_dir": "belongs to the top level of the recipe",
    "resume_from_checkpoint": "is not for recipes; continue a run with --resume",
}


@in_plain_words
@dataclass(config=ConfigDict(extra="forbid"))
class Recipe:
    """
    A continual pre-training run. A recipe file has the same keys; `recipes/README.md` explains them with examples.

    Args:
        model_name_or_path: `"built-in"`, a directory, or a model of the Hugging Face hub.
        domains: What to learn, in this order.
        output_dir: Where checkpoints and results go.
        measure: Domains that are measured after every stage and never trained on.
        method: Name of a continual-learning method of `das_lm.methods.METHODS`, or several; stored as a list.
        schedule: Domain after domain (`"sequential"`), their epochs in turns (`"alternating"`), or mixed in every
            batch (`"interleaved"`). Methods that consolidate when a domain ends need the first.
        training: Training arguments, any field of [`DASConfig`]; a domain may override them in its own `training`.
        trust_remote_code: Run the code that comes with a model of the hub. A recipe file cannot say so; the command
            line can.
        attn_implementation: Attention of the model, as `from_pretrained` takes it.
        units: Where the units of an architecture are that the package does not know.
        peft: Train LoRA adapters instead of all weights: arguments of PEFT's `LoraConfig`; `adapters`, what becomes of
            a domain's (`"merge"` into the model, `"stack"` beside it, or keep every domain's `"apart"`); and
            `load_in_4bit`.
        new_lm_head: The model is an encoder without its LM head. It gets a new one, tied to the embeddings, which is
            trained alone for so many steps, on the text of `measure` (of which `held_out` is then split off).
        description: One line for people.

    Raises:
        UserError: A wrong key, type or combination.
    """

    model_name_or_path: str
    domains: list[Domain]
    output_dir: str
    measure: list[Domain] = Field(default_factory=list)
    method: str | list[str] = Field(default="das", validate_default=True)
    schedule: Literal["sequential", "alternating", "interleaved"] = "sequential"
    training: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    units: dict[str, Any] | None = None
    peft: dict[str, Any] | None = None
    new_lm_head: int | None = None
    description: str = ""

    @field_validator("model_name_or_path", "output_dir")
    @classmethod
    def _check_not_empty(cls, value: str, info: ValidationInfo) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return os.path.expanduser(value) if info.field_name == "output_dir" else value

    @field_validator("domains")
    @classmethod
    def _check_domains(cls, domains: list[Domain]) -> list[Domain]:
        if not domains:
            raise ValueError("is empty; name at least one domain to learn")
        _check_names(domains, [])
        return domains

    @field_validator("measure")
    @classmethod
    def _check_measure(cls, measure: list[Domain], info: ValidationInfo) -> list[Domain]:
        _check_names(measure, info.data.get("domains", []))
        for domain in measure:
            if domain.training:
                raise ValueError(f"'{domain.name}' is never trained on; leave out its training arguments")
        return measure

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str | list[str], info: ValidationInfo) -> list[str]:
        from das_lm.methods import METHODS

        methods = [method] if isinstance(method, str) else method
        if not methods:
            raise ValueError("is empty; for training without a method write naive")
        streamed = [domain.name for domain in info.data.get("domains", []) if domain.streaming]
        for name in methods:
            if name not in METHODS:
                raise ValueError(f"there is no method '{name}'.{did_you_mean(name, METHODS)}")
            if METHODS[name].needs_earlier_domains and streamed:
                raise ValueError(
                    f"'{name}' mixes all domains so far, and '{streamed[0]}' is streamed; leave streaming out of it, "
                    "or write another method, such as replay"
                )
        if len(set(methods)) < len(methods):
            raise ValueError(f"{', '.join(methods)}: a method stands there twice")
        return methods

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, schedule: str, info: ValidationInfo) -> str:
        from das_lm.methods import METHODS

        if schedule != "sequential":
            for name in info.data.get("method", []):
                if METHODS[name].needs_domain_ends:
                    raise ValueError(
                        f"'{schedule}' does not go with the method '{name}', which consolidates when a domain ends; "
                        "write sequential, or another method"
                    )
            for domain in info.data.get("domains", []):
                if domain.streaming:
                    raise ValueError(
                        f"'{schedule}' mixes whole domains, and '{domain.name}' is streamed; write sequential, or "
                        "leave streaming out of it"
                    )
                if domain.training:
                    raise ValueError(
                        f"'{schedule}' trains on all domains at once, so '{domain.name}' cannot have training "
                        "arguments of its own; write sequential, or leave them out"
                    )
        return schedule

    @field_validator("training")
    @classmethod
    def _check_steps_of_streams(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for domain in info.data.get("domains", []):
            if domain.streaming and {**training, **domain.training}.get("max_steps") in (None, -1):
                raise ValueError(
                    f"domain '{domain.name}' is streamed, and how long it is, is not known: write max_steps, such as "
                    "max_steps: 1000"
                )
        return training

    @field_validator("training")
    @classmethod
    def _check_importance(cls, training: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from das_lm.training.config import DASConfig

        for before, domain in itertools.pairwise(info.data.get("domains", [])):
            for key in ("importance_normalization", "importance_accumulation"):
                ways = [{**training, **one.training}.get(key, getattr(DASConfig, key)) for one in (before, domain)]
                if "importance" not in domain.training and ways[0] != ways[1]:
                    raise ValueError(
                        f"domain '{domain.name}' has {key} '{ways[1]}', and '{before.name}', whose importance it "
                        f"takes over, '{ways[0]}': write the same for both"
                    )
        return training

    @field_validator("peft")
    @classmethod
    def _check_peft(cls, peft: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        from das_lm.methods import METHODS

        if peft is None:
            return None
        for name in info.data.get("method", []):
            if not METHODS[name].works_with_adapters:
                raise ValueError(
                    f"the method '{name}' remembers single parameters, and the next domain's adapter has others; "
                    "leave peft out, or write another method, such as das or replay"
                )
        return check_peft(peft)

    @field_validator("new_lm_head")
    @classmethod
    def _check_new_lm_head(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if steps is None:
            return None
        if steps < 1:
            raise ValueError(f"{steps} must be at least 1: how many steps is the new head trained alone?")
        if not info.data.get("measure"):
            raise ValueError("a new head learns from general text before all else; name some as `measure`")
        for domain in info.data["measure"]:
            if domain.streaming:
                raise ValueError(f"it learns from the text of '{domain.name}', which is streamed; leave streaming out")
        if (info.data.get("peft") or {}).get("adapters", "merge") != "merge":
            raise ValueError("adapters without their model would lack the head; write adapters: merge")
        return steps

    def load_text(self) -> dict[str, Documents]:
        """The text of all domains by name, those that are learned first."""
        text = {domain.name: domain.load() for domain in self.domains}
        return text | {one.name: one.load(measure_only=self.new_lm_head is None) for one in self.measure}

    def training_arguments(self, domain: Domain | None, output_dir: str, check_device: bool = True) -> DASConfig:
        """The training arguments of the recipe with those of a domain over them.

        Args:
            domain: `None` for what belongs to no single domain.
            output_dir: The directory that the trainer is given.
            check_device: Refuse what this machine cannot follow; without, they are those of a CPU.

        Raises:
            UserError: Unknown or wrong training arguments, or some that this machine cannot follow.
        """
        from das_lm.training.config import DASConfig

        where = f"domain '{domain.name}': " if domain else ""
        given = {**self.training, **(domain.training if domain else {}), **({} if check_device else {"use_cpu": True})}
        arguments, problems = check_training(given, ())
        if problems:
            raise UserError("\n".join(f"{where}training.{key_path(path)}: {message}" for path, message in problems))
        try:
            config = DASConfig(output_dir=output_dir, **arguments)
            self._check_metric(config.metric_for_best_model)
            if check_device:
                config.check_packages()
            return config
        except Exception as error:  # whatever transformers makes of values that do not go together
            raise UserError(f"{where}training arguments: {' '.join(str(error).split())}") from error

    def _check_metric(self, metric: str | None) -> None:
        domain, _, score = (metric or "").removeprefix("eval_").rpartition("_")
        names = [one.name for one in [*self.domains, *self.measure]]
        if metric is not None and not (domain in names and score in ("loss", "accuracy")):
            raise ValueError(
                f"metric_for_best_model: '{metric}' is not measured; write the loss or accuracy of a domain, such as "
                f"{names[0]}_loss"
            )

    def to_yaml(self) -> str:
        """The recipe as a file that [`load_recipe`] reads back to an equal one, without what no file may hold: secrets
        like `hub_token`, and `trust_remote_code`."""
        adapter = TypeAdapter(Recipe)
        recipe = adapter.dump_python(self, mode="json")
        explicit = adapter.dump_python(self, mode="json", exclude_defaults=True)
        for key in ("domains", "measure"):  # of a domain, only what is not the default
            recipe[key] = [{"name": entry.pop("name"), "data": "built-in", **entry} for entry in explicit.get(key, [])]
        for entry in (recipe, *recipe["domains"]):
            if "training" in entry:
                entry["training"] = {k: v for k, v in entry["training"].items() if not k.endswith("token")}
        recipe.pop("trust_remote_code")
        recipe = {"description": recipe.pop("description"), **recipe}
        recipe = {key: value for key, value in recipe.items() if value not in (None, "", [], {})}
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _check_names(domains: list[Domain], others: list[Domain]) -> None:
    seen = {domain.name.lower() for domain in others}
    for domain in domains:
        name = domain.name.lower()  # folders are named after domains, and some file systems ignore case
        if name in seen:
            raise ValueError(
                f"'{domain.name}' stands there twice; the domains that are learned and those that are only measured "
                "all need different names"
            )
        seen.add(name)


# Training arguments


def secrets_in(data: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Where keys of secrets stand: `hub_token` and its like."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if str(key).endswith("token"):
            yield (*at, key)
        yield from secrets_in(value, (*at, key))


@functools.cache
def _training_hints() -> dict[str, Any]:
    from das_lm.training.config import DASConfig

    hints = typing.get_type_hints(DASConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(DASConfig)}


def check_training(training: dict[str, Any], at: KeyPath) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Convert training arguments to the types of [`DASConfig`]'s fields; (path, message) of those that do not fit."""
    problems = [((*at, key), ELSEWHERE[key]) for key in training if key in ELSEWHERE]
    problems += [((*at, *path), NO_SECRET) for path in secrets_in(training) if len(path) > 1]
    converted, wrong = _converted({k: v for k, v in training.items() if k not in ELSEWHERE}, _training_hints(), at)
    measures = converted.get("eval_strategy", "no") != "no"
    without_effect = {
        "do_train": (False, "training is what this does; to measure only, use das-lm evaluate"),
        "do_eval": (not measures, "eval_strategy decides whether to measure while training; write it alone"),
        "do_predict": (True, "predicts nothing here; leave it out"),
    }
    for key, (value, message) in without_effect.items():
        if converted.get(key) is value:
            wrong.append(((*at, key), f"{describe_value(value)} has no effect: {message}"))
    return converted, problems + wrong


def check_peft(peft: dict[str, Any]) -> dict[str, Any]:
    """Convert what a recipe says of adapters to the types of [`LoraConfig`]'s fields, with `adapters` spelled out.

    Raises:
        ValueError: All that does not fit.
    """
    from peft import LoraConfig

    from das_lm.model.adapters import ADAPTERS, LORA_ARGUMENTS

    hints = typing.get_type_hints(LoraConfig)
    hints = {"adapters": Literal[ADAPTERS], "load_in_4bit": bool} | {name: hints[name] for name in LORA_ARGUMENTS}
    converted, problems = _converted({"adapters": "merge", **peft}, hints, ())
    if problems:
        raise ValueError("; ".join(f"{key_path(path)}: {message}" for path, message in problems))
    if converted.get("load_in_4bit") and converted["adapters"] != "apart":
        raise ValueError(
            f"load_in_4bit: an adapter cannot be added to weights of 4 bits without loss, so that no domain can start "
            f"from the one before; write adapters: apart, not {converted['adapters']}, or leave load_in_4bit out"
        )
    return converted


def _converted(
    given: dict[str, Any], hints: dict[str, Any], at: KeyPath
) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """Arguments converted to their types; (path, message) of those that do not fit."""
    converted, problems = {}, []
    for key, value in given.items():
        if key not in hints:
            problems.append(((*at, str(key)), f"unknown key.{did_you_mean(str(key), hints)}"))
        else:
            try:
                converted[key] = _convert(value, hints[key])
            except ValueError as error:
                problems.append(((*at, key), str(error)))
    return converted, problems


def _convert(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
            choices = [str(choice.value) for choice in kind]
            if value not in choices:
                near = did_you_mean(value, choices) or f" Valid: {', '.join(choices)}."
                raise ValueError(f"there is no '{value}'.{near}")
    misread = isinstance(value, bool) and bool not in kinds  # a number to pydantic, a slip in a recipe
    try:
        if not misread:
            converted = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
            if not isinstance(converted, float) or math.isfinite(converted):
                return converted
    except ValidationError:
        pass
    raise ValueError(f"expected {describe_type(hint)}, not {describe_value(value)}")


# Files


def recipes() -> dict[str, Path]:
    """Name -> file of the recipes in `recipes/` of the working directory, or else of the package: within it where a
    wheel was installed, beside it in a source checkout."""
    package = Path(str(resources.files("das_lm")))
    shipped = package / "recipes"
    folders = [shipped if shipped.is_dir() else package.with_name("recipes"), Path("recipes")]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


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
    _override(data, places, overrides or {})

    problems = []
    for at, entry in _with_training(data):
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


def _with_training(data: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The recipe and its domains, where they have training arguments that are a mapping."""
    entries: list[tuple[KeyPath, Any]] = [((), data)]
    for key in ("domains", "measure"):
        if isinstance(data.get(key), list):
            entries += [((key, index), entry) for index, entry in enumerate(data[key])]
    for at, entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("training"), dict):
            yield at, entry


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


# Overrides


def _override(data: dict[str, Any], places: dict[KeyPath, str], overrides: dict[str, Any]) -> None:
    """Write what the command line gives over the recipe's data, and its options over the places."""
    overrides = dict(overrides)
    column = overrides.pop("text_column", None)
    domains = _parse("--domain", overrides.pop("domain", []), column)
    measure = _parse("--measure", overrides.pop("measure", []), column)
    if column and not any("data" in entry for entry in domains + measure):
        raise UserError("--text_column: it is the column of text given as --domain NAME=DATA or --measure NAME=DATA")

    training = overrides.pop("training", {})
    places.update({("training", key): f"--{key}" for key in training})
    data.setdefault("training", {})
    for _, entry in _with_training(data):
        kept = {key: value for key, value in entry["training"].items() if key not in training}
        entry["training"] = kept | training if entry is data else kept
    for key, value in overrides.items():
        data[key] = value
        _forget_places(places, key)
        places[(key,)] = f"--{key}"

    if domains or measure:
        learned, measured = (_entries(data, key, places) for key in ("domains", "measure"))
        known = measured | learned
        if domains:
            learned = {entry["name"]: _merge(entry, known, "--domain") for entry in domains}
            measured = {name: item for name, item in measured.items() if name not in learned}
        for entry in measure:
            measured[entry["name"]] = _merge(entry, known, "--measure")
            measured[entry["name"]][0].pop("training", None)
        for key, items, option in (("domains", learned, "--domain"), ("measure", measured, "--measure")):
            _forget_places(places, key)
            places[(key,)] = option
            data[key] = [entry for entry, _ in items.values()]
            for index, (_, where) in enumerate(items.values()):
                places.update({(key, index, *at): place for at, place in where.items()})


def _parse(option: str, specs: list[str], column: str | None) -> list[dict[str, Any]]:
    """``"NAME=DATA"`` as an entry of `domains` or `measure`."""
    entries: list[dict[str, Any]] = []
    for spec in specs:
        name, given, data = spec.partition("=")
        entry: dict[str, Any] = {"name": name}
        if given:
            paths = [path for path in data.split(",") if path]
            if not paths:
                raise UserError(f"{option} {spec}: no data after '='; write {option} {name}=PATH")
            entry["data"] = paths[0] if len(paths) == 1 else paths
            if column:
                entry["column"] = column
        if any(name == other["name"] for other in entries):
            raise UserError(f"{option} {spec}: '{name}' is given twice; several paths go as {name}=PATH,PATH")
        entries.append(entry)
    return entries


def _entries(
    data: dict[str, Any], key: str, places: dict[KeyPath, str]
) -> dict[str, tuple[dict[str, Any], dict[KeyPath, str]]]:
    """Name -> (entry of `domains` or `measure`, the places of its keys)."""
    entries = {}
    for index, entry in enumerate(data[key] if isinstance(data.get(key), list) else []):
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            where = {at[2:]: place for at, place in places.items() if at[:2] == (key, index)}
            entries[entry["name"]] = (entry, where)
    return entries


def _merge(
    given: dict[str, Any], known: dict[str, tuple[dict[str, Any], dict[KeyPath, str]]], option: str
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """What a `NAME[=DATA]` stands for: the recipe's entry of that name, if any, with the data exchanged."""
    from das_lm.data.built_in import DOMAINS

    name = given["name"]
    entry, where = known.get(name, ({}, {}))
    if "data" not in given:
        if not entry and name not in DOMAINS:
            raise UserError(
                f"{option} {name}: neither the recipe nor the built-in text has a domain of that name."
                f"{did_you_mean(name, [*known, *DOMAINS])} For your own text write {option} {name}=PATH"
            )
        return {"name": name, **entry}, where or {(): option}
    kept = {key: entry[key] for key in ("min_characters", "training") if key in entry}
    held_out = entry.get("held_out", "split:")
    if data_kind(entry.get("data", "built-in")) != "built-in" and not str(held_out).startswith("split:"):
        kept["held_out"] = held_out
    return {**given, **kept}, {**where, (): option, ("data",): option, ("column",): "--text_column"}


def _forget_places(places: dict[KeyPath, str], key: str) -> None:
    for at in [at for at in places if at[:1] == (key,)]:
        del places[at]
