"""Methods side by side on classic tasks: a search on development data, runs over seeds, a table with intervals, plots.

OUTPUT_DIR/
    benchmark.json          what was run; at the end the grids, their scores, what was chosen, and the figures
    table.md, *.png         the same for people
    runs/RUN/forgetting.json, search/RUN/forgetting.json   one finished run each, with its curves
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from das_lm import __version__
from das_lm.classic.tasks import Experiment, Task, TrainingExamples, build_experiment
from das_lm.data.blocks import SCHEDULES
from das_lm.errors import NotFinite, UserError, did_you_mean
from das_lm.files import write_json
from das_lm.measure.results import FILE_NAME, Results
from das_lm.methods import METHODS, Method
from das_lm.report.benchmark import SUMMARY_NAME, TABLE_NAME, Choice, Report
from das_lm.run.arguments import check_training
from das_lm.signals import Signals, check_signals
from das_lm.terminal import Console
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
#: What the benchmark sets itself, and where a person does.
ELSEWHERE = {
    "seed": "is set by --seeds",
    "data_seed": "is set by --seeds",
    "num_train_epochs": "is set by --epochs",
    "max_steps": "is set by --epochs",
    "hub_token": "is of no use, for nothing is pushed to the hub",
    **dict.fromkeys(
        ("eval_strategy", "save_strategy", "logging_strategy", "per_device_eval_batch_size", "report_to"),
        "is set by the benchmark, which evaluates after every epoch and writes no checkpoints",
    ),
}


# ---- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
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


def stages_of(run: Run, experiment: Experiment) -> list[tuple[str, list[Task]]]:
    """(name, tasks) of what is learned together: one task, unless the schedule mixes them."""
    if run.schedule == "sequential":
        return [(task.name, [task]) for task in experiment.tasks]
    return [("+".join(task.name for task in experiment.tasks), list(experiment.tasks))]


def learn(run: Run) -> Results:
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
    run: Run, experiment: Experiment, model: nn.Module, methods: list[Method], number: int, directory: str
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


# ---- many runs -----------------------------------------------------------------------------------------------------


def finished(run: Run, directory: Path) -> Results | None:
    """The results of a run, if it is finished."""
    place = directory / run.name
    return Results.load(place) if (place / FILE_NAME).is_file() else None


def learn_all(
    runs: Sequence[Run], directory: Path, workers: int, progress: Callable[[Run], None], may_fail: bool = False
) -> list[Results | None]:
    """
    The results of all runs, in their order: those of finished runs are read, each new one is written at once.

    Args:
        directory: where every run has its directory.
        workers: processes; with 1 the runs are made in this one.
        progress: called for every run that is finished.
        may_fail: a run that cannot be finished (its loss became no number) is `None`; otherwise an error.

    Raises:
        UserError: a run cannot be finished, or a worker was killed.
        Interrupted: SIGTERM or Ctrl-C; no worker is left.
    """
    results: dict[int, Results | None] = {}
    todo = []
    for index, run in enumerate(runs):
        results[index] = finished(run, directory)
        if results[index] is None:
            todo.append(index)
        else:
            progress(run)
    with Signals(), closing(_outcomes([runs[index] for index in todo], workers)) as outcomes:
        for index, (outcome, error) in outcomes:
            run = runs[todo[index]]
            if error and not may_fail:
                raise UserError(f"method '{run.method}', seed {run.seed}: {error}")
            if outcome:
                (directory / run.name).mkdir(parents=True, exist_ok=True)
                outcome.save(directory / run.name)
            results[todo[index]] = outcome
            progress(run)
            check_signals()
    return [results[index] for index in range(len(runs))]


def _outcomes(runs: Sequence[Run], workers: int) -> Iterator[tuple[int, tuple[Results | None, str]]]:
    """(index, outcome) of every run as it is finished."""
    if workers == 1 or len(runs) < 2:
        yield from ((index, _attempt(run)) for index, run in enumerate(runs))
        return
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        min(workers, len(runs)), multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        futures = {executor.submit(_attempt, run): index for index, run in enumerate(runs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError("workers: one was killed, perhaps for its memory; write a smaller number") from error
    except BaseException:  # after an error or a signal nothing goes on in the background
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends this one
    torch.set_num_threads(1)


def _attempt(run: Run) -> tuple[Results | None, str]:
    try:
        return learn(run), ""
    except UserError as error:
        return None, str(error)


# ---- search --------------------------------------------------------------------------------------------------------


def grid(method: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The grid points of a method, or of a combination, without what the options already settle."""
    knobs: dict[str, tuple[Any, ...]] = {}
    for name in method.split("+"):
        key, values = METHODS[name].search_grid or ("", ())
        if values and key not in options:
            knobs.setdefault(key, values)
    return [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())] if knobs else []


def choose(points: list[dict[str, Any]], scores: list[float | None], method: str) -> Choice:
    """
    The grid point with the best score.

    Raises:
        UserError: no point has one.
    """
    tried = [{"options": point, "score": score} for point, score in zip(points, scores, strict=True)]
    complete = [one for one in tried if one["score"] is not None]
    if not complete:
        raise UserError(
            f"method '{method}': no run of the search could be finished, the loss became no number; try a smaller "
            "--learning_rate"
        )
    return Choice(tried, max(complete, key=lambda one: one["score"])["options"])


# ---- the benchmark -------------------------------------------------------------------------------------------------


def benchmark(
    experiment: str = "permuted",
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    parameters: Mapping[str, Any] | None = None,
    schedule: str = "sequential",
    epochs: int | None = None,
    search: bool = True,
    search_seeds: Sequence[int] = (1000,),
    chosen_from: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    workers: int | None = None,
) -> Report:
    """
    Run methods on an experiment over seeds, after a search that sees development data only, and write table and plots.
    Finished runs in the output directory are not repeated.

    Args:
        experiment: name in `EXPERIMENTS`.
        methods: names in `METHODS`, combinations as `"ewc+replay"`; by default all that apply.
        seeds: of the reported runs.
        parameters: of the experiment, see `build_experiment`.
        schedule: `"sequential"`, `"alternating"` or `"interleaved"`.
        epochs: passes over each task, instead of the experiment's own.
        search: choose each method's main knob by its `search_grid`; otherwise it has its default.
        search_seeds: of the search; never those of the reported runs.
        chosen_from: directory of another benchmark, such as one on smaller images, whose choices are taken instead of
            a search.
        options: fields of [`ContinualConfig`] for all runs. What is given here is not searched for.
        output_dir: `output/classic/EXPERIMENT` by default.
        workers: processes; as many as there are cores by default.

    Raises:
        UserError: bad input; nothing has been written.
    """
    output = Path(output_dir or Path("output", "classic", experiment))
    workers = os.cpu_count() or 1 if workers is None else workers
    parameters, options = _plain(parameters or {}), checked_options(options or {})
    _check_numbers(seeds, search_seeds, epochs, workers, search)
    if schedule not in SCHEDULES:
        raise UserError(f"schedule: there is no '{schedule}'.{did_you_mean(schedule, SCHEDULES)}")
    methods = _checked_methods(methods, schedule)
    runs = {
        method: Run(experiment, method, seeds[0], parameters, dict(options), schedule, epochs) for method in methods
    }
    known = {} if chosen_from is None else _choices_of(Path(chosen_from), methods, options)
    search = search and not known
    runs = {method: replace(run, options={**options, **known.get(method, {})}) for method, run in runs.items()}
    described = _try_out(runs.values())
    _open_output(output, experiment, parameters)

    console = Console(highlight=False)
    console.print(f"[bold]{experiment}[/bold]: {described.description}", soft_wrap=True)
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[newest]}"),
        console=console,
    ) as bar:

        def go(name: str, todo: list[Run], may_fail: bool) -> list[Results | None]:
            row = bar.add_task(name, total=len(todo), newest="")
            return learn_all(
                todo,
                output / name,
                workers,
                lambda run: bar.update(row, advance=1, newest=f"{run.method}, seed {run.seed}"),
                may_fail,
            )

        choices = {method: Choice(chosen=known.get(method, {})) for method in methods}
        if search:
            points = {method: grid(method, options) for method in methods}
            todo = [
                replace(runs[method], seed=seed, options={**options, **point}, split="development")
                for method, one in points.items()
                for point in one
                for seed in search_seeds
            ]
            scores = iter([_final(outcome, described.measure) for outcome in go("search", todo, may_fail=True)])
            for method, one in points.items():
                if one:
                    means = [_mean([next(scores) for _ in search_seeds]) for _ in one]
                    choices[method] = choose(one, means, method)
        todo = [
            replace(runs[method], seed=seed, options={**options, **choices[method].chosen})
            for method in methods
            for seed in seeds
        ]
        outcomes = iter(go("runs", todo, may_fail=False))
    report = Report(
        experiment=experiment,
        description=described.description,
        measure=described.measure,
        seeds=list(seeds),
        results={method: [next(outcomes) for _ in seeds] for method in methods},
        choices=choices,
        run={
            "parameters": parameters,
            "options": options,
            "schedule": schedule,
            "epochs": epochs or described.epochs,
            "search_seeds": list(search_seeds) if search else [],
            **({"chosen_from": str(chosen_from)} if chosen_from is not None else {}),
            "runs": [f"runs/{run.name}" for run in todo],
            "seconds": round(time.perf_counter() - started, 1),  # finished runs that were read take none
            "versions": {"das_lm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        },
    )
    report.save(output)
    console.print(*report.tables(), sep="\n")
    console.print(f"Tables: {output / TABLE_NAME}    Plots: {output}/*.png", soft_wrap=True, markup=False)
    return report


def _choices_of(directory: Path, methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> what another benchmark chose for it, without what the options already settle."""
    path = directory / SUMMARY_NAME
    try:
        chosen = {
            name: dict(entry["chosen"])
            for name, entry in json.loads(path.read_text(encoding="utf-8"))["methods"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"chosen_from: {directory} holds no finished benchmark of das-lm classic") from None
    missing = [method for method in methods if method not in chosen]
    if missing:
        raise UserError(f"chosen_from: {directory} has no '{missing[0]}'; run it there, or search here")
    return {method: {k: v for k, v in chosen[method].items() if k not in options} for method in methods}


def _final(results: Results | None, measure: str) -> float | None:
    return results.summary()[measure]["average"] if results else None


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is `None`, and with paths as text."""
    return {key: json.loads(json.dumps(value, default=str)) for key, value in parameters.items() if value is not None}


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_numbers(
    seeds: Sequence[int], search_seeds: Sequence[int], epochs: int | None, workers: int, search: bool
) -> None:
    for name, numbers in (("seeds", seeds), *([("search_seeds", search_seeds)] if search else [])):
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise UserError(f"{name}: {' '.join(map(str, numbers))}: write different whole numbers from 0 on")
    both = sorted(set(seeds) & set(search_seeds)) if search else []
    if both:
        raise UserError(f"search_seeds: {both[0]} is among the seeds that are reported; search with others")
    for name, number in (("epochs", epochs), ("workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{name}: {number} must be 1 or more")


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for key in options:
        if key in ELSEWHERE:
            raise UserError(f"{key}: {ELSEWHERE[key]}")
    converted, problems = check_training(dict(options), ())
    if problems:
        raise UserError("\n".join(f"{at[-1]}: {message}" for at, message in problems))
    return {key: getattr(value, "value", value) for key, value in converted.items()}


def _checked_methods(methods: Sequence[str] | None, schedule: str) -> list[str]:
    if methods is None:
        usable = [name for name, kind in METHODS.items() if not kind.language_models_only]
        return [name for name in usable if schedule == "sequential" or not METHODS[name].needs_domain_ends]
    if not methods:
        raise UserError("method: is empty; for training without a method write naive")
    seen = set()
    for method in methods:
        names = method.split("+")
        for name in names:
            if name not in METHODS:
                raise UserError(f"method: there is no method '{name}'.{did_you_mean(name, METHODS)}")
            if METHODS[name].language_models_only:
                raise UserError(f"method: '{name}' acts on language models, not on small ones; leave it out")
            if schedule != "sequential" and METHODS[name].needs_domain_ends:
                raise UserError(
                    f"schedule: '{schedule}' does not go with the method '{name}', which consolidates when a domain "
                    "ends; write sequential, or another method"
                )
        if len(set(names)) < len(names) or frozenset(names) in seen:
            raise UserError(f"method: {' '.join(methods)}: a method stands there twice")
        seen.add(frozenset(names))
    return list(methods)


def _try_out(runs: Iterable[Run]) -> Experiment:
    """Raises `UserError` for all that a trainer of any run would refuse; gives the experiment."""
    for run in runs:
        experiment = run.build()
        methods = [METHODS[name]() for name in run.method.split("+")]
        with TemporaryDirectory() as scratch:
            make_trainer(run, experiment, experiment.build_model(run.seed), methods, 0, scratch)
    return experiment


def _open_output(output: Path, experiment: str, parameters: dict[str, Any]) -> None:
    """Refuse to mix experiments, before anything is written."""
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir: {output} is a file; name a directory")
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"output_dir: cannot write to {existing}; name another directory")
    summary = output / SUMMARY_NAME
    now = {"experiment": experiment, "parameters": parameters}
    if summary.is_file():
        try:
            before = json.loads(summary.read_text(encoding="utf-8"))
            before = {key: before[key] for key in now}
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise UserError(f"{summary} cannot be read: {error}; name another output_dir") from None
        if before != now:
            raise UserError(
                f"output_dir: {output} holds another experiment, {before['experiment']} {before['parameters']}; name "
                "another directory"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"output_dir: {output} is not empty and holds no benchmark; name another directory")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(summary, now)
