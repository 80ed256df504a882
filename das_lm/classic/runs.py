"""One run: a small model learns the tasks of an experiment one after the other."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from das_lm import __version__
from das_lm.classic.tasks import Experiment, Task, TrainingExamples, build_experiment
from das_lm.errors import NotFinite, UserError
from das_lm.measure.results import Results
from das_lm.methods import METHODS, Method
from das_lm.training.config import ContinualConfig
from das_lm.training.trainer import ContinualTrainer

#: Of every run, where nothing else is given: Adam at a constant learning rate, no decay, no clipping.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "importance_batch_size": 256,
    "use_cpu": True,
}


@dataclass(frozen=True)
class BenchmarkRun:
    """
    One model that learns the tasks of an experiment.

    Args:
        experiment: name of it.
        method: name of a method, or several as `"ewc+replay"`.
        seed: of the model, the order, the methods, and the experiment (its permutations).
        parameters: of the experiment, see `build_experiment`.
        options: fields of [`ContinualConfig`] over [`DEFAULTS`] and [`Method.needs`].
        schedule: task after task (`"sequential"`), or all together, `"alternating"` or `"interleaved"`.
        epochs: passes over each task; the experiment's own if `None`.
        split: what is measured after every epoch, `"test"` or (for a search) `"development"`.
    """

    experiment: str
    method: str
    seed: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "sequential"
    epochs: int | None = None
    split: str = "test"

    @property
    def name(self) -> str:
        """Name of the run's directory: readable, and another one for every configuration and release."""
        content = json.dumps([asdict(self), __version__], sort_keys=True, default=str)
        return f"{self.method}-seed{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def build(self) -> Experiment:
        """The experiment that the run learns."""
        return build_experiment(self.experiment, **{"seed": self.seed, **self.parameters})

    def arguments(self, experiment: Experiment, directory: str) -> ContinualConfig:
        """
        The Trainer's arguments.

        Raises:
            UserError: options that do not fit.
        """
        methods = self.method.split("+")
        try:
            return ContinualConfig(
                output_dir=directory,
                num_train_epochs=self.epochs or experiment.epochs,
                seed=self.seed,
                per_device_eval_batch_size=max(len(getattr(task, self.split)) for task in experiment.tasks),
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **{
                    "per_device_train_batch_size": experiment.batch_size,
                    "memory_size": max(1, len(experiment.tasks[0].train) // 10),
                    **DEFAULTS,
                    **{key: value for name in methods for key, value in METHODS[name].needs.items()},
                    **self.options,
                },
            )
        except Exception as error:  # whatever transformers makes of values that do not go together
            raise UserError(f"method '{self.method}': {' '.join(str(error).split())}") from error


def stages_of(run: BenchmarkRun, experiment: Experiment) -> list[tuple[str, list[Task]]]:
    """(name, tasks) of what is learned together: one task, unless the schedule mixes them."""
    if run.schedule == "sequential":
        return [(task.name, [task]) for task in experiment.tasks]
    return [("+".join(task.name for task in experiment.tasks), list(experiment.tasks))]


def learn(run: BenchmarkRun) -> Results:
    """
    Learn the tasks of a run, and measure all of them before the first and after every epoch.

    Returns:
        the results as in `forgetting.json`; every stage but `base` has a `curve`, the score of every task after each
        of its epochs. Of a regression, every stage has its `predictions` at `run["inputs"]`, all days in order.

    Raises:
        UserError: options that do not fit, or a loss that is no number.
    """
    experiment = run.build()
    model = experiment.build_model(run.seed)
    methods: list[Method] = [METHODS[name]() for name in run.method.split("+")]
    stages = stages_of(run, experiment)
    results = Results(
        {task.name: number for number, (_, tasks) in enumerate(stages, 1) for task in tasks},
        run={
            **asdict(run),
            "measure": experiment.measure,
            "description": experiment.description,
            "versions": {"das_lm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        },
        unit="nats" if experiment.measure == "accuracy" else "squared error",
    )
    line = _line(experiment) if experiment.measure == "r2" and run.split == "test" else None
    if line:
        results.run |= {"inputs": line[0][:, 0].tolist(), "targets": line[1].tolist()}
    with TemporaryDirectory() as scratch, _older_objects_left_alone():
        for number in range(len(stages)):
            trainer = make_trainer(run, experiment, model, methods, number, scratch)
            if not results.stages:
                results.stages.append(_stage("base", trainer.evaluate(), experiment, model, line))
            started = time.perf_counter()
            epochs = train_and_measure(trainer)
            seconds = time.perf_counter() - started
            stage = _stage(stages[number][0], trainer.evaluate(), experiment, model, line)
            final = {name: scores[experiment.measure] for name, scores in stage["scores"].items()}
            rows = [{name: metrics[f"eval_{name}_{experiment.measure}"] for name in final} for metrics in epochs]
            rows[-1] = final  # with what the methods made of the weights in the end
            results.stages.append({**stage, "curve": rows, "seconds": round(seconds, 2)})
    return results


def make_trainer(
    run: BenchmarkRun, experiment: Experiment, model: nn.Module, methods: list[Method], number: int, directory: str
) -> ContinualTrainer:
    """The trainer of stage `number` (0, 1, …)."""
    stages = stages_of(run, experiment)
    name, tasks = stages[number]
    schedule = run.schedule
    so_far = [task for _, together in stages[: number + 1] for task in together]
    if any(method.needs_earlier_domains for method in methods):
        tasks, schedule = so_far, "interleaved"
    trainer = ContinualTrainer(
        model=model,
        args=run.arguments(experiment, directory),
        method=methods,
        train_dataset=TrainingExamples({task.name: task.train for task in tasks}, run.seed, schedule),
        eval_dataset={task.name: getattr(task, run.split) for task in experiment.tasks},
        development_dataset={task.name: task.development for task in so_far},
        domain=name,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.tells_of_methods_without_effect = False
    return trainer


@contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts: over all that is imported a fifth of the time of a run."""
    gc.collect()  # what an earlier run left: frozen, it would stay for good
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train_and_measure(trainer: ContinualTrainer) -> list[dict[str, float]]:
    """Learn a stage. Returns the metrics after every epoch."""
    metrics: list[dict[str, float]] = []

    class Measure(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            metrics.append(trainer.evaluate())

    trainer.add_callback(Measure())
    trainer.train()
    return metrics


def _stage(name: str, metrics: dict[str, float], experiment: Experiment, model: nn.Module, line: Any) -> dict:
    keys = ("loss", experiment.measure, "tokens", "documents")
    scores = {task.name: {key: metrics[f"eval_{task.name}_{key}"] for key in keys} for task in experiment.tasks}
    broken = [task for task, score in scores.items() if not math.isfinite(score["loss"])]
    if broken:
        raise NotFinite(f"the loss of '{broken[0]}' is {scores[broken[0]]['loss']} after '{name}'")
    stage = {"name": name, "scores": scores}
    if line:
        with torch.no_grad():
            stage["predictions"] = model(line[0])["logits"][:, 0].tolist()
    return stage


def _line(experiment: Experiment) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of all tasks and splits of a regression, in the order of the inputs."""
    parts = [part.columns for task in experiment.tasks for part in (task.train, task.development, task.test)]
    inputs, targets = (torch.cat([part[name] for part in parts]) for name in ("inputs", "labels"))
    order = inputs[:, 0].argsort()
    return inputs[order], targets[order]
