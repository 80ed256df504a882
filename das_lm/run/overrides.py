"""What the command line writes over the data of a recipe file, before it is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from das_lm.data.domains import data_kind
from das_lm.errors import UserError, did_you_mean
from das_lm.run.arguments import KeyPath


def override(data: dict[str, Any], places: dict[KeyPath, str], overrides: dict[str, Any]) -> None:
    """Write what the command line gives over the recipe's data, and its options over the places."""
    overrides = dict(overrides)
    column = overrides.pop("text_column", None)
    domains = _parse("--domain", overrides.pop("domain", []), column)
    measure = _parse("--measure", overrides.pop("measure", []), column)
    if "remember" in overrides:
        overrides["remember"] = [_by_self(entry) for entry in _parse("--remember", overrides["remember"], column)]
    if column and not any("data" in entry for entry in domains + measure):
        raise UserError("--text_column: it is the column of text given as --domain NAME=DATA or --measure NAME=DATA")

    training = overrides.pop("training", {})
    places.update({("training", key): f"--{key}" for key in training})
    data.setdefault("training", {})
    for _, entry in with_training(data):
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


def with_training(data: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The recipe and its domains, where they have training arguments that are a mapping."""
    entries: list[tuple[KeyPath, Any]] = [((), data)]
    for key in ("domains", "measure"):
        if isinstance(data.get(key), list):
            entries += [((key, index), entry) for index, entry in enumerate(data[key])]
    for at, entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("training"), dict):
            yield at, entry


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


def _by_self(entry: dict[str, Any]) -> dict[str, Any]:
    """`self`, `self=ROWS` and `self=FILE` as `remember` has them."""
    if entry["name"] != "self":
        return entry
    data = entry.get("data")
    return {"self": int(data) if isinstance(data, str) and data.isdigit() else data}


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
