"""What is measured of a λ: the integrated loss of an experiment, or of a recipe."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from das_lm.classic.benchmark import checked_options
from das_lm.classic.runs import BenchmarkRun, make_trainer, train_and_measure
from das_lm.errors import NotFinite, UserError, did_you_mean
from das_lm.files import write_text
from das_lm.measure.results import FILE_NAME, Results
from das_lm.methods import METHODS
from das_lm.methods.penalty import Penalty
from das_lm.run.directory import RECIPE_NAME, mark, stages_of
from das_lm.run.recipe import Recipe
from das_lm.run.walk import continual_pretrain

#: λ -> `measure`, the integrated loss (`None`: training diverged), and whatever else is worth keeping, as JSON.
LearnAt = Callable[[float], Mapping[str, Any]]
#: Seed of a trial -> its runs, which share everything but λ.
Objective = Callable[[int], LearnAt]


def integrated_loss(curves: Sequence[Sequence[float]]) -> float | None:
    """
    The area under every task's loss after it was introduced, per unit of time: its mean over the evaluations since
    then; summed over the tasks.

    Args:
        curves: by task, the loss at every evaluation since the task's training began.

    Returns:
        `None` where a loss is no finite number.
    """
    total = float(sum(np.mean(curve) for curve in curves))
    return total if math.isfinite(total) else None


def _curves(names: Sequence[str], stages: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Task -> its loss at every evaluation from its own stage on. Each stage is a list of metrics."""
    return {
        name: [metrics[key] for stage in stages[number:] for metrics in stage if key in metrics]
        for number, name, key in ((number, name, f"eval_{name}_loss") for number, name in enumerate(names))
    }


def check_method(method: str) -> None:
    """
    Raises:
        UserError: there is no such method, or it has no λ.
    """
    penalties = [name for name, kind in METHODS.items() if issubclass(kind, Penalty)]
    if method not in METHODS:
        raise UserError(f"method: there is no '{method}'.{did_you_mean(method, penalties)}")
    if method not in penalties:
        raise UserError(f"method: '{method}' has no penalty_weight to search for; write {', '.join(penalties)}")


def experiment_objective(
    experiment: str,
    method: str = "ewc",
    parameters: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    epochs: int | None = None,
) -> Objective:
    """
    λ of a small model's experiment: the loss on the development splits after every epoch, of every task since it was
    introduced. The first task is learned once per trial: before a domain has ended, there is no penalty. The test
    splits are measured at the end of every run, and play no part in the search.

    Args:
        experiment: name of it.
        method: a penalty.
        parameters: of the experiment, see `build_experiment`.
        options: fields of [`ContinualConfig`], over the benchmark's `DEFAULTS`.
        epochs: passes over each task; the experiment's own if `None`.

    Raises:
        UserError: a method without λ, no such experiment, one with a single task, or wrong options.
    """
    check_method(method)
    if "penalty_weight" in (options or {}):
        raise UserError("penalty_weight: is what is searched for; leave it out")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs: {epochs} must be 1 or more")
    options = checked_options(options or {})
    run = BenchmarkRun(experiment, method, 0, dict(parameters or {}), options, epochs=epochs, split="development")
    built = run.build()
    if len(built.tasks) < 2:
        raise UserError(f"experiment '{experiment}': a single task has nothing to hold on to; give two or more")
    with TemporaryDirectory() as scratch:
        run.arguments(built, scratch)  # what is wrong shows here
    return lambda seed: _ExperimentTrial(replace(run, seed=seed))


class _ExperimentTrial:
    """The runs of a trial: one model after the first task, and from there every λ."""

    def __init__(self, run: BenchmarkRun):
        self.run, self.experiment = run, run.build()

    def _trainer(self, number: int, model: Any, method: Any, weight: float, scratch: str) -> Any:
        run = replace(self.run, options={**self.run.options, "penalty_weight": weight})
        return make_trainer(run, self.experiment, model, [method], number, scratch)

    def _new(self) -> tuple[Any, Any]:
        return self.experiment.build_model(self.run.seed), METHODS[self.run.method]()

    @cached_property
    def _first(self) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
        """Parameters and the method's state after the first task, and its metrics."""
        model, method = self._new()
        with TemporaryDirectory() as scratch:
            metrics = train_and_measure(self._trainer(0, model, method, 0.0, scratch))
        return *copy.deepcopy((model.state_dict(), method.state_dict())), metrics

    def __call__(self, weight: float) -> dict[str, Any]:
        parameters, state, metrics = self._first
        model, method = self._new()
        model.load_state_dict(parameters)
        stages, tasks = [metrics], self.experiment.tasks
        with TemporaryDirectory() as scratch:
            for number in range(1, len(tasks)):
                trainer = self._trainer(number, model, method, weight, scratch)
                if number == 1:
                    method.load_state_dict(copy.deepcopy(state))
                try:
                    stages.append(train_and_measure(trainer))
                except NotFinite:
                    return {"measure": None}
            curves = _curves([task.name for task in tasks], stages)
            measure = integrated_loss(list(curves.values()))
            if measure is None:
                return {"measure": None}
            metrics = trainer.evaluate({task.name: task.test for task in tasks})
        kinds = ("loss", self.experiment.measure)
        test = {task.name: {kind: metrics[f"eval_{task.name}_{kind}"] for kind in kinds} for task in tasks}
        return {"measure": measure, "curves": curves, "test": test}


def recipe_objective(recipe: Recipe, method: str, directory: str | Path) -> Objective:
    """
    λ of a recipe's walk: the loss at every `eval_steps` (by default five times per domain) and so at its end, of every
    domain that is learned, since it was introduced, on one half of its held-out documents. The other half is measured
    when all is learned, and plays no part in the search; nor does text that is only measured. The base model is
    measured, and the first domain learned, once per trial.

    Args:
        recipe: the walk; its method is replaced.
        method: a penalty.
        directory: where the runs go. Of each, `forgetting.json` and the curves stay; the weights do not.

    Raises:
        UserError: a method without λ, fewer than two domains, or domains that do not come one after the other.
    """
    check_method(method)
    if len(recipe.domains) < 2:
        raise UserError("domains: a single one has nothing to hold on to; give two or more")
    if recipe.schedule != "sequential":
        raise UserError(f"schedule: '{recipe.schedule}' leaves nothing to hold on to; write sequential")
    for domain in recipe.domains:
        for name in ("penalty_weight", "seed", "data_seed"):
            if name in domain.training:
                raise UserError(f"domain '{domain.name}': training: '{name}' is set by the search; leave it out")
    return lambda seed: _RecipeTrial(recipe, method, Path(directory), seed)


class _RecipeTrial:
    """The walks of a trial; they share the directory of the first domain."""

    def __init__(self, recipe: Recipe, method: str, directory: Path, seed: int):
        training = {"eval_strategy": "steps", "eval_steps": 0.2, "report_to": [], "disable_tqdm": True}
        training |= {**recipe.training, "seed": seed, "data_seed": seed}
        self.recipe = replace(recipe, method=[method], training=training)
        self.directory = directory / f"seed-{seed}"

    def __call__(self, weight: float) -> dict[str, Any]:
        output = self.directory / f"lambda-{weight!r}"
        training = {**self.recipe.training, "penalty_weight": weight}
        recipe = replace(self.recipe, training=training, output_dir=str(output))
        stages, shared = stages_of(recipe, output), self.directory / "first"
        first = shared / stages[0].directory.name
        if (output / FILE_NAME).is_file() and len(Results.load(output).stages) > len(stages):
            shutil.rmtree(output)  # finished and then killed, perhaps with its weights already gone
        if not (output / RECIPE_NAME).is_file() and (shared / FILE_NAME).is_file():
            output.mkdir(parents=True, exist_ok=True)
            if not stages[0].directory.exists():
                stages[0].directory.symlink_to(first.absolute(), target_is_directory=True)
            mark(output, recipe)
            results = Results.load(shared)
            results.save(output)
            write_text(output / RECIPE_NAME, recipe.to_yaml())  # the last: now there is a run to go on with
        output.mkdir(parents=True, exist_ok=True)
        with open(f"{output}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                results = continual_pretrain(recipe, (output / RECIPE_NAME).is_file(), halves=True, report=False)
            except NotFinite:
                return {"measure": None}
        if not (shared / FILE_NAME).is_file():
            shared.mkdir(exist_ok=True)
            mark(shared, recipe)
            shutil.copytree(stages[0].directory, first, dirs_exist_ok=True)
            Results(results.domains, results.stages[:2], results.run).save(shared)
        histories = [
            json.loads((stage.directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            for stage in stages
        ]
        curves = _curves([stage.name for stage in stages], histories)
        for stage in stages:
            if stage.directory.is_symlink():
                stage.directory.unlink()
            else:
                shutil.rmtree(stage.directory)
        last = results.stages[-1]["scores"]
        test = {stage.name: {kind: last[stage.name][kind] for kind in results.measures} for stage in stages}
        return {"measure": integrated_loss(list(curves.values())), "curves": curves, "test": test}
