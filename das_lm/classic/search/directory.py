"""The directory of a search: its settings, every run at once, and no mixing with other searches."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from das_lm.errors import UserError
from das_lm.files import write_json, write_text
from das_lm.run.directory import ASIDE_NAME, LOCK_NAME, foreign_files, move_aside, put_back

SETTINGS_NAME, EVALUATIONS_NAME = "search.json", "evaluations.jsonl"
RESULT_NAME, PLOT_NAME = "result.json", "curve.png"


class Ledger:
    """What has been measured, in a file: (trial, λ) -> figures. Every line is on the disk before the next run."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}; start again with --overwrite_output_dir") from None
            whole = []
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    _ = entry["measure"]  # or the line is none
                    self.entries[entry["trial"], entry["lambda"]] = entry
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if number < len(lines):
                        raise UserError(f"{path}:{number}: cannot be read: {error}; remove this line") from None
                    continue  # the last one: what wrote it was killed
                whole.append(line if line.endswith("\n") else f"{line}\n")
            if whole != lines:
                write_text(path, "".join(whole))

    def add(self, trial: int, weight: float, figures: Mapping[str, Any]) -> None:
        """Write down what a weight gave in a trial, before anything else happens."""
        entry = {"trial": trial, "lambda": weight, **figures}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[trial, weight] = entry

    def trial(self, trial: int) -> dict[float, float | None]:
        """λ -> measure, in the order of measuring."""
        return {weight: entry["measure"] for (number, weight), entry in self.entries.items() if number == trial}


def open_output(output: Path, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Refuse to mix searches, before anything runs."""
    settings = json.loads(json.dumps(settings))
    path = output / SETTINGS_NAME
    if resume and overwrite:
        raise UserError("--resume goes on with a search, --overwrite_output_dir removes it: give one of them")
    if not resume or not all(one.is_file() for one in (path, output / ASIDE_NAME / SETTINGS_NAME)):
        put_back(output, written, SETTINGS_NAME)  # a search that was to take its place was killed
    entries = written(output)
    if not entries and any(one.name != LOCK_NAME for one in output.iterdir()):
        raise UserError(f"output_dir: {output} is not empty and holds no search; name another directory")
    if resume and not entries:
        raise UserError(f"--resume: {output} holds no search to go on with; leave --resume out")
    if entries and not resume and not overwrite:
        raise UserError(
            f"output_dir: {output} holds another search; give --resume to go on with it, --overwrite_output_dir to "
            "start again, or another --output_dir"
        )
    if overwrite and entries:
        foreign = []
        for one in output.glob("runs/*/*"):
            name = one.relative_to(output)
            foreign += [name / inside for inside in foreign_files(one, beside=True)] if one.is_dir() else []
            foreign += [name] if one.is_file() and one.suffix != ".log" else []
        if foreign:
            raise UserError(
                f"--overwrite_output_dir: no search wrote {foreign[0]} in {output}, among what is removed; move it "
                "elsewhere, or name another --output_dir"
            )
        move_aside(entries)
    if resume:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(kind, key) for kind in settings for key in {**before[kind], **settings[kind]}]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}; start again with --overwrite_output_dir") from None
        for kind, key in pairs:
            old, new = before[kind].get(key), settings[kind].get(key)
            if old != new and (kind, key) not in (("search", "trials"), ("search", "confirm")):
                if key == "recipe" and old and new:  # its lines that differ
                    lines = old.splitlines(), new.splitlines()
                    old, new = ("; ".join(x.strip() for x in a if x not in b) for a, b in (lines, lines[::-1]))
                raise UserError(
                    f"--resume: the search in {output} has another '{key}': {old!r}, not {new!r}; give the same, or "
                    "another --output_dir"
                )
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {output}: {error.strerror}") from error


def written(output: Path) -> list[Path]:
    """All that a search has written, its settings last; nothing where there is none of ours."""
    try:
        settings = json.loads((output / SETTINGS_NAME).read_text(encoding="utf-8"))
        if set(settings) != {"search", "objective"} or not settings["search"].keys() >= {"trials", "confirm"}:
            return []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    names = ("runs", EVALUATIONS_NAME, RESULT_NAME, PLOT_NAME, SETTINGS_NAME)
    return [output / name for name in names if (output / name).exists()]
