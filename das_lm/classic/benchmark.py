"""Methods side by side on classic tasks: a search on development data, runs over seeds, a table with intervals, plots.

OUTPUT_DIR/
    benchmark.json          what was run; at the end the grids, their scores, what was chosen, and the figures
    table.md, *.png         the same for people
    runs/RUN/forgetting.json, search/RUN/forgetting.json   one finished run each, with its curves
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from das_lm import __version__
from das_lm.classic.runs import BenchmarkRun, learn, make_trainer
from das_lm.classic.tasks import Experiment
from das_lm.data.blocks import SCHEDULES
from das_lm.errors import UserError, did_you_mean
from das_lm.files import write_json
from das_lm.measure.results import FILE_NAME, Results
from das_lm.methods import METHODS
from das_lm.report.benchmark import SUMMARY_NAME, TABLE_NAME, Choice, Report
from das_lm.run.arguments import check_training
from das_lm.signals import Signals, check_signals
from das_lm.terminal import Console

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


# ---- many runs -----------------------------------------------------------------------------------------------------


def finished(run: BenchmarkRun, directory: Path) -> Results | None:
    """The results of a run, if it is finished."""
    place = directory / run.name
    return Results.load(place) if (place / FILE_NAME).is_file() else None


def learn_all(
    runs: Sequence[BenchmarkRun],
    directory: Path,
    workers: int,
    progress: Callable[[BenchmarkRun], None],
    may_fail: bool = False,
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


def _outcomes(runs: Sequence[BenchmarkRun], workers: int) -> Iterator[tuple[int, tuple[Results | None, str]]]:
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


def _attempt(run: BenchmarkRun) -> tuple[Results | None, str]:
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
        method: BenchmarkRun(experiment, method, seeds[0], parameters, dict(options), schedule, epochs)
        for method in methods
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

        def go(name: str, todo: list[BenchmarkRun], may_fail: bool) -> list[Results | None]:
            """Make runs behind a bar of their own."""
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
            choices |= _searched(runs, options, search_seeds, described.measure, go)
        todo = [
            replace(runs[method], seed=seed, options={**options, **choices[method].chosen})
            for method in methods
            for seed in seeds
        ]
        outcomes = iter(go("runs", todo, False))
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


def _searched(
    runs: Mapping[str, BenchmarkRun],
    options: Mapping[str, Any],
    seeds: Sequence[int],
    measure: str,
    go: Callable[[str, list[BenchmarkRun], bool], list[Results | None]],
) -> dict[str, Choice]:
    """What each method's main knob is to be, by development data: all points of all methods, each over the seeds."""
    points = {method: grid(method, options) for method in runs}
    todo = [
        replace(runs[method], seed=seed, options={**options, **point}, split="development")
        for method, one in points.items()
        for point in one
        for seed in seeds
    ]
    scores = iter([_final(outcome, measure) for outcome in go("search", todo, True)])
    means = {method: [_mean([next(scores) for _ in seeds]) for _ in one] for method, one in points.items()}
    return {method: choose(one, means[method], method) for method, one in points.items() if one}


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
    """Fields of [`ContinualConfig`] for all runs, as it has them. Raises `UserError` for what is none, or is given
    elsewhere."""
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


def _try_out(runs: Iterable[BenchmarkRun]) -> Experiment:
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
