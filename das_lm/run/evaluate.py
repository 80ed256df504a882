"""What checkpoints know and what they lost: held-out text, questions, end-tasks; nothing is measured twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from das_lm.data.blocks import HeldOutWindows, SingleMasks
from das_lm.data.built_in import MODELS
from das_lm.data.domains import Domain, text_fingerprint
from das_lm.errors import UserError
from das_lm.files import broken_file
from das_lm.measure.cache import DIRECTORY as CACHE_NAME
from das_lm.measure.cache import Cache, fingerprint, model_fingerprint
from das_lm.measure.cloze import Questions, cloze_accuracy, load_questions
from das_lm.measure.drift import check_drifts, drift_table, drifts
from das_lm.measure.end_task import EndTaskConfig, TaskData, fine_tune, load_task
from das_lm.measure.harness import Harness, HarnessConfig
from das_lm.measure.held_out import HeldOut
from das_lm.measure.results import FILE_NAME, PAGE_NAME, Results
from das_lm.model.adapters import base_of
from das_lm.model.loading import is_causal, load_model, load_tokenizer, model_path
from das_lm.run.directory import RECIPE_NAME, stages_of, with_head
from das_lm.run.facts import check_precision, check_text, machine_facts
from das_lm.run.processes import begin, claimed
from das_lm.run.reading import held_out_windows
from das_lm.run.recipe import Recipe
from das_lm.run.recipe_file import load_recipe
from das_lm.run.trainers import measuring_trainer

if TYPE_CHECKING:
    from datasets import Dataset


QUIET = {"report_to": "none", "disable_tqdm": True}
#: Training arguments that change no result.
SPEED = ("per_device_eval_batch_size", "use_cpu", "dataloader_num_workers")


@dataclass
class Probes:
    """
    What is measured beside held-out text.

    Args:
        cloze: name -> source of questions, see `load_questions`.
        lm_eval: name -> task of lm-eval, which asks causal models.
        harness: how those are asked.
        end_tasks: name -> source of labelled text, see `load_task`.
        end_task: how classifiers are fine-tuned.
        pseudo_perplexity: documents of every domain whose tokens are masked one at a time; a forward pass per token.
        max_drift: domain -> how much its loss may rise from the base model, nats per predicted token.
    """

    cloze: Mapping[str, str] = field(default_factory=dict)
    lm_eval: Mapping[str, str] = field(default_factory=dict)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    end_tasks: Mapping[str, str] = field(default_factory=dict)
    end_task: EndTaskConfig = field(default_factory=EndTaskConfig)
    pseudo_perplexity: int = 0
    max_drift: Mapping[str, float] = field(default_factory=dict)


def evaluate_run(
    run: str | Path,
    measure: Sequence[str] = (),
    probes: Probes | None = None,
    output_dir: str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """
    Measure the stages of a finished run of `das-lm pretrain` further, and write all into its `forgetting.json`.

    Args:
        run: directory of the run.
        measure: further held-out text, `"NAME=DATA"` or the name of a built-in domain.
        probes: what else to measure.
        output_dir: write `forgetting.json` and the cache there instead.
        training: fields of [`ContinualConfig`] that change no result: [`SPEED`].
        trust_remote_code: run the code that comes with a model of the hub.

    Raises:
        UserError: no run, one that is not finished or has lost its checkpoints, or bad input.
        DriftExceeded: all is measured and written, and a checkpoint has lost more than `max_drift` allows.
    """
    for key in training or {}:
        if key not in SPEED:
            raise UserError(f"--{key}: a run is measured as it was; with --run give only {', '.join(SPEED)}")
    run = Path(run)
    if not (run / RECIPE_NAME).is_file() or not (run / FILE_NAME).is_file():
        raise UserError(f"--run {run}: holds no run of das-lm pretrain; name its output directory")
    output = Path(output_dir or run)
    with claimed(output):
        overrides = {"training": {**(training or {}), **QUIET}, "trust_remote_code": trust_remote_code}
        recipe = load_recipe(run / RECIPE_NAME, {**overrides, "measure": list(measure)})
        return _evaluate_run(run, recipe, measure, probes or Probes(), output)


def _evaluate_run(run: Path, recipe: Recipe, measure: Sequence[str], probes: Probes, output: Path) -> Results:
    results, stages = Results.load(run), stages_of(recipe, run)
    check_precision(results.run, {"precision": recipe.training_arguments(None, str(run)).precision}, f"--run {run}")
    if not output.samefile(run):
        _check_not_anothers(output, results)
    if len(results.stages) <= len(stages):
        missing = stages[max(len(results.stages) - 1, 0)].name
        raise UserError(f"--run {run}: not finished, '{missing}' is missing; go on with das-lm pretrain … --resume")
    if len(results.stages) > len(stages) + 1:
        raise UserError(f"--run {run}: its {FILE_NAME} has more stages than its {RECIPE_NAME} has domains")
    for stage in stages:
        broken = broken_file(stage.directory)
        if broken:
            raise UserError(f"--run {run}: the checkpoint {stage.directory} is not there or not whole: {broken}")
    text = {name: one.held_out for name, one in replace(recipe, remember=[]).load_text().items()}
    given = [spec.partition("=")[0] for spec in measure if "=" in spec]
    now = {name: {"held-out": text_fingerprint(one)} for name, one in text.items() if name not in given}
    check_text(results.run, {"text": now}, f"--run {run}")
    order = {**results.domains, **dict.fromkeys(text)}
    results.domains = {name: results.domains.get(name) for name in order if name in text}
    recipe = with_head(recipe, run)
    paths = [model_path(recipe), *(str(stage.directory) for stage in stages)]
    text = {name: text[name] for name in results.domains}
    return _evaluate(results, paths, recipe, text, probes, output)


def evaluate_checkpoints(
    checkpoints: Mapping[str, str],
    domains: Sequence[str],
    output_dir: str | Path,
    probes: Probes | None = None,
    training: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """
    Measure any checkpoints, in the order in which they were trained, and write `forgetting.json`.

    Args:
        checkpoints: name -> directory or name on the hub; the first is the base model. A domain that has the name of a
            checkpoint was learned there.
        domains: held-out text, `"NAME=DATA"` or the name of a built-in domain. All of DATA is measured.
        output_dir: of the results.
        probes: what else to measure.
        training: fields of [`ContinualConfig`]: `max_length`, `per_device_eval_batch_size`, …
        trust_remote_code: run the code that comes with a model of the hub.

    Raises:
        UserError: bad input; nothing has been written.
        DriftExceeded: see [`evaluate_run`].
    """
    if len(checkpoints) < 1 or not domains:
        raise UserError("give a --checkpoint NAME=PATH, the base model first, and a --domain NAME=DATA to measure")
    output = Path(output_dir)
    if (output / RECIPE_NAME).is_file():
        raise UserError(f"output_dir: {output} holds a run; give --run {output} to measure it, or another directory")
    entries = []
    for spec in domains:
        name, given, data = spec.partition("=")
        entries.append(Domain(name, [path for path in data.split(",") if path]) if given else Domain(name))
    recipe = Recipe(
        next(iter(checkpoints.values())),
        entries,
        str(output),
        method="naive",
        training={**(training or {}), **QUIET},
        trust_remote_code=trust_remote_code,
    )
    names = list(checkpoints)
    learned = {name: number for number, name in enumerate(names) if number > 0}
    results = Results({domain.name: learned.get(domain.name) for domain in entries})
    results.stages = [{"name": name} for name in names]
    results.run = {
        "checkpoints": dict(checkpoints),
        "training": {key: value for key, value in (training or {}).items() if not key.endswith("token")},
        **machine_facts(),
        "precision": recipe.training_arguments(None, str(output)).precision,
    }
    text = {domain.name: domain.load(measure_only=True).held_out for domain in entries}
    paths = [str(MODELS.get(path, path)) for path in checkpoints.values()]
    with claimed(output):
        _check_not_anothers(output, results)
        return _evaluate(results, paths, recipe, text, probes or Probes(), output)


def _check_not_anothers(output: Path, results: Results) -> None:
    """Whether a directory is free for results, or holds those of the same run, or of checkpoints if these are."""
    before = Results.load(output).run if (output / FILE_NAME).is_file() else results.run
    kinds = ["checkpoints" in one for one in (before, results.run)]
    if before.get("recipe") != results.run.get("recipe") or kinds[0] != kinds[1] or (output / RECIPE_NAME).is_file():
        raise UserError(f"output_dir: {output} holds the results of another run; name another directory")


# ---- all stages, all measures --------------------------------------------------------------------------------------

Measurement = tuple[dict[str, torch.Tensor], dict[str, Any]]  # tensors, and facts as JSON


def _evaluate(
    results: Results, paths: list[str], recipe: Recipe, text: Mapping[str, Dataset], probes: Probes, output: Path
) -> Results:
    """Measure every stage, add intervals, write and show the results."""
    state, console = begin()
    if probes.pseudo_perplexity and any(is_causal(recipe, path) for path in paths):
        raise UserError("pseudo_perplexity: is of masked language models; a causal one has a perplexity of its own")
    if probes.lm_eval and not all(is_causal(recipe, path) for path in paths):
        raise UserError("lm_eval: asks causal language models; ask a masked one questions with a blank, with --cloze")
    if probes.lm_eval and probes.harness.apply_chat_template:
        for name, path in zip((stage["name"] for stage in results.stages), paths, strict=True):
            if load_tokenizer(path, recipe).chat_template is None:
                raise UserError(f"apply_chat_template: the tokenizer of '{name}' has no chat template; leave it out")
    if unknown := probes.max_drift.keys() - text.keys():
        raise UserError(
            f"max_drift: there is no held-out text of '{min(unknown)}' (there is {', '.join(text)}); give it with "
            f"--domain {min(unknown)}=PATH"
        )
    questions = {name: load_questions(source) for name, source in probes.cloze.items()}
    harness = Harness(probes.lm_eval, probes.harness) if probes.lm_eval else None
    tasks = {name: load_task(source) for name, source in probes.end_tasks.items()}
    tokenizers = [load_tokenizer(path, recipe) for path in paths]
    remembered = _Remembered(Cache(output / CACHE_NAME), state)
    held_out, words = [], None
    answers: dict[str, list[dict[str, np.ndarray]]] = {"cloze": [], "lm_eval": []}
    per_stage = len(text) * (2 if probes.pseudo_perplexity else 1)
    per_stage += len(questions) + len(probes.lm_eval) + len(tasks)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with TemporaryDirectory() as scratch, bar as remembered.bar:
        remembered.row = remembered.bar.add_task("", total=len(paths) * per_stage)
        for stage, path, tokenizer in zip(results.stages, paths, tokenizers, strict=True):
            model = _Model(stage, path, recipe, tokenizer, scratch, remembered)
            stage.setdefault("checkpoint", path)
            if tokenizer.backend_tokenizer.to_str() != words:  # the first, or one with other words
                words = tokenizer.backend_tokenizer.to_str()
                windows = held_out_windows(recipe, dict(text), tokenizer, model.trainer.args).measured
            measured = {name: model.held_out(name, one) for name, one in windows.items()}
            held_out.append(measured)
            stage["scores"] = {name: one.measures(model.trainer.criterion.causal) for name, one in measured.items()}
            if probes.pseudo_perplexity:
                stage["pseudo"] = {
                    name: model.pseudo_perplexity(name, one, probes.pseudo_perplexity) for name, one in windows.items()
                }
            asked = {
                "cloze": {name: model.cloze(name, one) for name, one in questions.items()},
                "lm_eval": {name: model.lm_eval(name, harness) for name in probes.lm_eval},
            }
            for measure, found in asked.items():
                answers[measure].append({name: tensors["right"].numpy() for name, (tensors, _) in found.items()})
                if found:
                    stage.setdefault(measure, {}).update({name: facts for name, (_, facts) in found.items()})
            if tasks:
                tuned = {name: model.end_task(name, task, probes.end_task) for name, task in tasks.items()}
                stage.setdefault("end_tasks", {}).update(tuned)
    _add_intervals(results, held_out, answers)
    if state.is_main_process:
        results.save(output)
    console.print(*results.tables(), sep="\n")
    console.print(f"Results: {output / FILE_NAME}", soft_wrap=True, markup=False)
    if state.is_main_process and (output / PAGE_NAME).is_file():  # it shows what was known before
        from das_lm.report.page import write_report

        console.print(f"Report: {write_report([output])}", soft_wrap=True, markup=False)
    if probes.max_drift:
        found = drifts([stage["name"] for stage in results.stages], held_out, probes.max_drift)
        console.print(drift_table(found))
        check_drifts(found)
    return results


class _Model:
    """A checkpoint and what can be measured of it, which is remembered."""

    def __init__(
        self, stage: dict[str, Any], path: str, recipe: Recipe, tokenizer: Any, scratch: str, remembered: _Remembered
    ):
        self.stage, self.path, self.tokenizer, self.scratch = stage, path, tokenizer, scratch
        self.remembered = remembered
        self.trainer = measuring_trainer(load_model(path, recipe), recipe, tokenizer, scratch)
        self.weights = model_fingerprint(self.trainer.model)
        self.name = fingerprint(self.weights, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map)

    def held_out(self, name: str, windows: HeldOutWindows) -> HeldOut:
        """Loss and accuracy of every held-out document."""
        key = fingerprint("held out", self.weights, windows.fingerprint)  # as the walk names it
        self.stage.setdefault("measured", {})[name] = key
        tensors, _ = self._get(f"held-out text of {name}", key, lambda: self._measured(name, windows))
        return HeldOut.from_tensors(tensors)

    def pseudo_perplexity(self, name: str, windows: HeldOutWindows, documents: int) -> dict[str, Any]:
        """The same with one mask at a time, of some documents."""
        key = fingerprint("pseudo-perplexity", self.name, windows.fingerprint, documents)
        tensors, _ = self._get(
            f"pseudo-perplexity of {name}", key, lambda: self._measured(name, SingleMasks(windows, documents))
        )
        return HeldOut.from_tensors(tensors).measures()

    def _measured(self, name: str, rows: Any) -> Measurement:
        return self.trainer.measure({name: rows})[name].tensors(), {}

    def cloze(self, name: str, questions: Questions) -> Measurement:
        """Which questions it answers."""

        def measure() -> Measurement:
            found = cloze_accuracy(self.trainer.model, self.tokenizer, questions)
            return {"right": torch.from_numpy(found.right)}, found.measures()

        return self._get(f"questions {name}", fingerprint("cloze", self.name, questions), measure)

    def lm_eval(self, name: str, harness: Harness) -> Measurement:
        """How well it does a task of lm-eval."""
        batch_size = self.trainer.args.per_device_eval_batch_size

        def measure() -> Measurement:
            found = harness.ask(name, self.trainer.model, self.tokenizer, batch_size)
            return {"right": torch.from_numpy(found.scores)}, found.measures()

        tensors, facts = self._get(
            f"lm-eval {name}", fingerprint("lm_eval", self.name, harness.identity(name)), measure
        )
        asked = {key: value for key, value in asdict(harness.config).items() if key != "include_path"}
        return tensors, {**facts, **asked, "task": harness.tasks[name], "version": harness.version}

    def end_task(self, name: str, task: TaskData, config: EndTaskConfig) -> dict[str, Any]:
        """How well it can be fine-tuned."""

        def measure() -> Measurement:
            found = fine_tune(self._whole_path(), task, config)
            return {"predictions": torch.from_numpy(found.predictions)}, found.measures()

        return self._get(f"end-task {name}", fingerprint("end-task", self.name, task, config), measure)[1]

    def _whole_path(self) -> str:
        """A directory with all of its weights: its own, or, of an adapter, one with the sum."""
        if base_of(self.path) is None:
            return self.path
        if self.trainer.has_adapter:
            raise UserError("end_task: fine-tunes all weights, which a quantized model does not let; leave it out")
        whole = os.path.join(self.scratch, "whole")
        self.trainer.model.save_pretrained(whole)
        self.tokenizer.save_pretrained(whole)
        return whole

    def _get(self, what: str, key: str, measure: Callable[[], Measurement]) -> Measurement:
        return self.remembered(f"{self.stage['name']}: {what}", key, measure)


class _Remembered:
    """Makes a measurement unless it was made before; several processes make it together, and the main one keeps it."""

    bar: Progress
    row: TaskID

    def __init__(self, cache: Cache, state: PartialState):
        self.cache, self.state = cache, state

    def __call__(self, what: str, key: str, measure: Callable[[], Measurement]) -> Measurement:
        self.bar.update(self.row, description=what)
        (found,) = broadcast_object_list([self.cache.get(key) if self.state.is_main_process else None])
        if found is None:
            found = measure()
            if self.state.is_main_process:
                self.cache.put(key, *found)
        self.bar.advance(self.row)
        return found


def _add_intervals(
    results: Results, held_out: list[dict[str, HeldOut]], answers: Mapping[str, list[dict[str, np.ndarray]]]
) -> None:
    """Of what was measured of the same documents, or questions, at every stage."""
    if len({tuple((name, len(one.tokens)) for name, one in stage.items()) for stage in held_out}) == 1:
        results.add_held_out_intervals(held_out)
    for measure, rights in answers.items():
        if not any(rights):
            continue
        results.intervals.pop(measure, None)
        asked = {tuple((name, len(right)) for name, right in stage.items()) for stage in rights}
        if len(asked) == 1 and {name for name, _ in asked.pop()} == set(results.columns(measure)):
            sums = [{name: (right, np.ones(len(right))) for name, right in stage.items()} for stage in rights]
            results.add_intervals(measure, sums)
    if "end_task" in results.measures:
        results.add_end_task_intervals()
