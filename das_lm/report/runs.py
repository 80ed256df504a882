"""Finished runs: where they are, what they were given, and whether they were measured alike."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from das_lm.errors import UserError, did_you_mean
from das_lm.measure.results import FILE_NAME, Results

#: Training arguments that make no other configuration: the seeds, and what changes no number.
NO_SETTINGS = {
    *("seed", "data_seed", "disable_tqdm", "report_to", "run_name", "use_cpu", "per_device_eval_batch_size"),
    *("logging_steps", "logging_strategy", "save_steps", "save_strategy", "save_total_limit"),
    *("eval_steps", "eval_strategy", "dataloader_num_workers"),
}
#: Scores of the base model that differ by less, relatively, are the same: devices round differently.
SAME = 1e-3


@dataclass
class FinishedRun:
    """
    A finished run.

    Args:
        directory: where its `forgetting.json` is.
        results: what is in it.
        method: its name, or several as `"ewc+replay"`.
        seed: `"0"`; with another seed of the data `"0/7"`. Runs of one seed see the same held-out masks and order.
        settings: what else it was given: training arguments, those of a domain as `"bio.max_steps"`, and so on.
    """

    directory: Path
    results: Results
    method: str
    seed: str
    settings: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> FinishedRun:
        """
        Read `forgetting.json`.

        Raises:
            UserError: it is broken, or does not say how the run came about.
        """
        results = Results.load(directory)
        try:
            return cls._of(directory, results)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{directory / FILE_NAME} is not as das-lm writes it ({error!r})") from None

    @classmethod
    def _of(cls, directory: Path, results: Results) -> FinishedRun:
        run = results.run
        _ = [int(score["documents"]) for stage in results.stages for score in stage["scores"].values()]
        if "recipe" in run:
            recipe = run["recipe"]
            training = recipe.get("training", {})
            seed, data_seed = training.get("seed", 42), training.get("data_seed")
            settings = dict(training)
            for domain in recipe["domains"]:
                own = {**domain, **domain.get("training", {})}
                settings |= {f"{domain['name']}.{key}": own[key] for key in own if key not in ("name", "training")}
            more = ("model_name_or_path", "schedule", "units", "attn_implementation")
            settings |= {key: recipe[key] for key in more if key in recipe}
            methods = recipe["method"]
        elif "method" in run:  # a small model
            seed, data_seed, methods = run["seed"], None, [run["method"]]
            settings = {**run["options"], "schedule": run["schedule"], "epochs": run["epochs"]}
        elif "checkpoints" in run:  # measured by das-lm evaluate: how they were trained is not known
            seed, data_seed, methods, settings = 42, None, [directory.absolute().name], dict(run["training"])
        else:
            raise UserError(
                f"{directory / FILE_NAME} names no method and no recipe: there is nothing to compare it by"
            )
        seed = str(seed) if data_seed in (None, seed) else f"{seed}/{data_seed}"
        settings = {key: value for key, value in settings.items() if key.rpartition(".")[2] not in NO_SETTINGS}
        return cls(directory, results, "+".join(methods), seed, settings)

    def setting(self, key: str) -> Any:
        """A setting, or what holds where it was not given; `None` where that is not known."""
        if key in self.settings:
            return self.settings[key]
        _, dot, shared = key.partition(".")
        if dot:
            return self.setting(shared)
        if "recipe" not in self.results.run:  # the defaults of a small model are its experiment's
            return None
        from das_lm.training.config import ContinualConfig

        argument = ContinualConfig.__dataclass_fields__.get(key)
        if argument is None:
            return None
        return argument.default_factory() if argument.default is MISSING else argument.default


def is_finished(results: Results) -> bool:
    """Whether all stages of a run have been measured."""
    return len(results.stages) > max(stage or 0 for stage in results.domains.values())


def find_runs(paths: Sequence[Path | str]) -> list[Path]:
    """
    The directories that hold a `forgetting.json`: those given, and those below them.

    Raises:
        UserError: there is none in or below one of them.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        here = []
        for directory, below, files in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if FILE_NAME in files:
                here.append(Path(directory))
                below.clear()
        if not here:
            problem = f"there is no {FILE_NAME} in it or below it" if path.is_dir() else "there is no such directory"
            raise UserError(f"{path}: {problem}; give directories of runs, as das-lm pretrain writes them")
        found |= {directory.resolve(): directory for directory in here}
    return list(found.values())


def check_comparable(runs: Sequence[FinishedRun], measure: str) -> None:
    """
    Refuse to compare what was not measured alike.

    Raises:
        UserError: other domains, another model, or other held-out text.
    """
    for run in runs:
        if measure not in run.results.measures:
            raise UserError(
                f"{run.directory}: '{measure}' was not measured.{did_you_mean(measure, run.results.measures)}"
            )
    first: dict[str, FinishedRun] = {}
    for run in runs:
        for other in (runs[0], first.setdefault(run.seed, run)):
            what = _difference(other, run, measure)
            if what:
                raise UserError(f"{other.directory} and {run.directory} cannot be compared: {what}")


def _difference(one: FinishedRun, other: FinishedRun, measure: str) -> str | None:
    """In what two runs were measured differently, in words."""
    left, right = one.results, other.results
    for taken_of in ("loss", measure):
        if left.columns(taken_of) != right.columns(taken_of):
            columns = (_in_words(results.columns(taken_of)) for results in (left, right))
            return "the one measures {}; the other {}".format(*columns)
    if left.unit != right.unit:
        return f"the losses of the one are in {left.unit}, those of the other in {right.unit}"
    for key in ("experiment", "parameters", "split"):
        if left.run.get(key) != right.run.get(key):
            return f"{key} is {left.run.get(key)} for the one, {right.run.get(key)} for the other"
    for domain, score in left.stages[0]["scores"].items():
        base = right.stages[0]["scores"][domain]
        if score["documents"] != base["documents"]:
            return (
                f"the held-out text of '{domain}' has {score['documents']:,} documents in the one, "
                f"{base['documents']:,} in the other"
            )
        if one.seed == other.seed and not math.isclose(score["loss"], base["loss"], rel_tol=SAME):
            return (
                f"before training the loss on '{domain}' is {score['loss']:.3f} in the one, {base['loss']:.3f} in the "
                "other: another model, or other held-out text"
            )
    return None


def _in_words(columns: dict[str, int | None]) -> str:
    return ", ".join(f"{name} ({f'stage {stage}' if stage else 'never learned'})" for name, stage in columns.items())
