"""The walk over the domains of a recipe: load → measure → learn → consolidate → measure → save."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import peft
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.markup import escape
from safetensors import SafetensorError
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from das_lm import __version__
from das_lm.data.added_tokens import add_words, find_new_words
from das_lm.data.blocks import HeldOutWindows, TrainingBlocks
from das_lm.data.masking import labeling
from das_lm.data.packing import pack, windows
from das_lm.data.streaming import TrainingStream
from das_lm.errors import UserError, one_line
from das_lm.files import (
    copy_whole,
    is_about_disk,
    newest_checkpoint,
    partial_path,
    seal,
    write_text,
)
from das_lm.measure.cache import DIRECTORY as CACHE_NAME
from das_lm.measure.cache import Cache, fingerprint, model_fingerprint
from das_lm.measure.leakage import find_leakage
from das_lm.measure.results import FILE_NAME as RESULTS_NAME
from das_lm.measure.results import Results
from das_lm.methods import METHODS, unread_options, without_effect
from das_lm.model import adapters
from das_lm.model.loading import check_model, head_parameters, is_causal, load_model, load_tokenizer, model_path
from das_lm.report.card import HubRepository, write_card
from das_lm.run.directory import (
    ASIDE_NAME,
    BASE_NAME,
    CURVES_NAME,
    RECIPE_NAME,
    Stage,
    batch_before,
    check_and_clean,
    check_precision,
    drop_aside,
    length_of,
    locked,
    open_output,
    stages_of,
    undo_overwriting,
    with_head,
)
from das_lm.signals import ProcessLost, Signals, check_signals, is_about_processes, is_about_workers
from das_lm.terminal import Console
from das_lm.training.cpu import use_all_cores
from das_lm.training.inputs import data_seed
from das_lm.training.trainer import STATE_NAME, ContinualTrainer
from das_lm.units import Architecture
from das_lm.units.importance import FILE_NAME as IMPORTANCE_NAME
from das_lm.units.importance import Importance
from das_lm.units.sharding import is_sharded

if TYPE_CHECKING:
    from das_lm.data.domains import Documents
    from das_lm.measure.held_out import HeldOut
    from das_lm.run.recipe import Recipe


def continual_pretrain(
    recipe: Recipe, resume: bool = False, overwrite: bool = False, halves: bool = False, report: bool = True
) -> Results:
    """
    Take a model through the domains of a recipe, one after the other, and measure after each what it learned and lost.

    Args:
        recipe: the recipe.
        resume: go on with the run in the recipe's output directory: finished domains are not repeated, an interrupted
            one goes on at its newest checkpoint, with the result of an uninterrupted run.
        overwrite: remove what an earlier run left in the output directory.
        halves: the curves during training are measured on one half of the held-out documents, so that something can
            be chosen by them, and the result matrix on the other.
        report: in the end, show all of it in `report.html`.

    Returns:
        the result matrix and its figures, as in `forgetting.json`.

    Raises:
        UserError: bad input (nothing of an earlier run has been touched), a disk that cannot be written to, or
            another process that is gone.
        Interrupted: SIGTERM or Ctrl-C; what is learned is saved.
    """
    with Signals():
        return _continual_pretrain(recipe, resume, overwrite, halves, report)


def _continual_pretrain(recipe: Recipe, resume: bool, overwrite: bool, halves: bool, report: bool) -> Results:
    state = PartialState(cpu=not torch.cuda.is_available())
    console = Console(quiet=not state.is_main_process, highlight=False)
    if state.device.type == "cpu" and state.num_processes == 1:
        use_all_cores()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights
    output = Path(recipe.output_dir)
    restored = False
    try:
        with claimed(output):
            before = on_main(state, check_and_clean, output, recipe, resume, overwrite)
            try:
                check_model(recipe)
                with state.main_process_first():
                    text, tokenizer = _load_text(recipe, console), load_tokenizer(model_path(recipe), recipe)
                results = _walk(recipe, before, output, overwrite, halves, text, tokenizer, state, console)
            except Exception:
                check_signals()
                restored = overwrite and state.is_main_process and undo_overwriting(output)
                raise
            if report and state.is_main_process:
                console.print(f"Report: {_report(output)}", soft_wrap=True, markup=False)
        return results
    except (OSError, SafetensorError, RuntimeError) as error:
        check_signals()  # which may have ended others first: data-loader workers, the processes of a launcher
        if is_about_workers(error):
            raise UserError(
                "dataloader_num_workers: a worker of the data loader was killed, perhaps for its memory; write a "
                "smaller number, and use --resume to go on"
            ) from error
        if state.num_processes > 1 and is_about_processes(error):
            raise ProcessLost(
                f"process {state.process_index} of {state.num_processes} lost another one, which was killed or says "
                f"why it ended; use --resume to go on ({one_line(error)})"
            ) from error
        if is_about_disk(error):
            where = getattr(error, "filename", None) or output
            raise UserError(
                f"output_dir: cannot write to {where}: {one_line(error)}; free some space, or make it writable, and "
                f"{'give the same command again' if restored else 'use --resume'}"
            ) from error
        raise


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """[`locked`], by the main process for all."""
    state = PartialState(cpu=not torch.cuda.is_available())
    with ExitStack() as until_end:
        on_main(state, lambda: until_end.enter_context(locked(output)))
        yield


def on_main(state: PartialState, function: Any, *args: Any) -> Any:
    """What a function returns in the main process, or the `UserError` that it raises there, in every process."""
    result: Any = None
    if state.is_main_process:
        try:
            result = function(*args)
        except UserError as error:
            result = error
    (result,) = broadcast_object_list([result])
    if isinstance(result, UserError):
        raise result
    return result


def _walk(
    recipe: Recipe,
    before: Recipe | None,
    output: Path,
    overwrite: bool,
    halves: bool,
    text: dict[str, Documents],
    tokenizer: Any,
    state: PartialState,
    console: Console,
) -> Results:
    stages = stages_of(recipe, output)
    learned = {domain.name: index for index, stage in enumerate(stages, 1) for domain in stage.domains}
    domains = {domain.name: learned.get(domain.name) for domain in [*recipe.measure, *recipe.domains]}
    args = recipe.training_arguments(None, str(output))
    causal = is_causal(recipe)
    read = _Reader(recipe, {name: text[name] for name in domains}, args, halves, state)
    needs_earlier = any(METHODS[name].needs_earlier_domains for name in recipe.method)

    def make_trainer(model: Any, tokenizer: Any, stage: Stage, directory: Path) -> ContinualTrainer:
        domain = stage.domains[0] if len(stage.domains) == 1 else None
        args = recipe.training_arguments(domain, str(directory))
        if stage is not stages[0] and not (domain and "importance" in domain.training):
            args.importance = "auto"  # where the importance of the base model comes from has been settled
        args.push_to_hub = False  # the walk pushes, when a stage is finished and measured
        so_far = [d for s in stages[: stages.index(stage) + 1] for d in s.domains]
        learned = so_far if needs_earlier else stage.domains
        masking, seed = labeling(tokenizer, causal, args.mlm_probability), data_seed(args)
        rows: TrainingBlocks
        if domain and domain.streaming:
            documents, buffer = text[domain.name].train, domain.shuffle_buffer
            rows = TrainingStream(documents, tokenizer, args.max_length, masking, seed, domain.name, buffer)
        else:
            blocks = read.packed(tokenizer, [domain.name for domain in learned])
            rows = TrainingBlocks(blocks, masking, seed, "interleaved" if needs_earlier else recipe.schedule)
        held_out, development = read.held_out(tokenizer)
        to_choose_by = {*args.interpolation_domains, *(one.name for one in so_far)}
        trainer = ContinualTrainer(
            model=model,
            args=args,
            method=recipe.method,
            train_dataset=rows,
            eval_dataset=development if halves else held_out,
            processing_class=tokenizer,
            domain=stage.name,
            development_dataset=development and {n: one for n, one in development.items() if n in to_choose_by},
            architecture=Architecture.from_dict(recipe.units) if recipe.units else None,
            peft_config=adapters.lora_config(recipe.peft) if recipe.peft else None,
        )
        trainer.tells_of_methods_without_effect = False  # the walk does
        return trainer

    def warn(about: str, warning: str, hint: str = "") -> None:
        console.print("[yellow]warning:[/yellow]", escape(f"{warning}{hint}"), soft_wrap=True)
        results.run["warnings"].setdefault(about, []).append(warning)

    hub = HubRepository(args, output.absolute().name) if args.push_to_hub and state.is_main_process else None
    results = Results(domains, run=_facts(recipe, text, args), unit=f"nats per {'' if causal else 'masked '}token")
    earlier = None
    if (output / RESULTS_NAME).is_file() and not overwrite:
        earlier = Results.load(output)
        check_text(earlier.run, results.run, "--resume")
        check_precision(earlier.run, results.run, "--resume")
        results.stages, results.run["warnings"] = earlier.stages, earlier.run.get("warnings", {})
    elif state.is_main_process:
        for name, warning in find_leakage(text).warnings():
            warn(name, warning, "; see das-lm check-data")
        given = itertools.chain(recipe.training, *(domain.training for domain in recipe.domains))
        if unread := unread_options(given, recipe.method):
            warn("training", f"read by no chosen method ({', '.join(recipe.method)}): {', '.join(unread)}")
    if not results.stages:
        # All that a wrong recipe can say shows here; only then is anything written, or an earlier run removed.
        with TemporaryDirectory() as scratch:
            model = load_model(model_path(recipe), recipe)
            for stage in stages:
                trainer = make_trainer(model, tokenizer, stage, Path(scratch))
                if recipe.peft:
                    trainer.model.unload()
            if len(stages) == 1 and (warning := without_effect(trainer.methods)):
                warn(stages[0].name, warning)
            if recipe.new_lm_head is not None:
                general = read.packed(tokenizer, [domain.name for domain in recipe.measure])
                train_head(model, recipe, general, tokenizer, scratch)
            trainer = measuring_trainer(model, recipe, tokenizer, scratch)
            measured = _measure(trainer, read.held_out(tokenizer)[0], "base", console)
            if recipe.new_lm_head is not None:
                _save(trainer, Path(scratch, BASE_NAME), replace(recipe, peft=None), None)
            larger = tokenizer
            for stage in stages:
                larger = _with_new_words(model, larger, stage, text, recipe)
            if state.is_main_process:
                open_output(output, recipe, overwrite)
                if (output / ASIDE_NAME).is_dir():
                    aside = f"The run before stands in {output / ASIDE_NAME} until '{stages[0].name}' is learned"
                    console.print(aside, soft_wrap=True, markup=False)
                if recipe.new_lm_head is not None:
                    copy_whole(Path(scratch, BASE_NAME), output / BASE_NAME)
        base = recipe.model_name_or_path if recipe.new_lm_head is None else BASE_NAME
        _keep(results, *measured, {"checkpoint": base}, 0, output, state, None)
        del model, trainer
        state.wait_for_everyone()

    asked, recipe = recipe, with_head(recipe, output)
    source: str | Path = model_path(recipe)
    for index, stage in enumerate(stages, 1):
        if len(results.stages) > index and stage.is_finished:
            source = stage.directory
            continue
        is_finished, seconds = stage.is_finished, None  # and not yet measured
        tokenizer = load_tokenizer(str(stage.directory if is_finished else source), recipe)
        if not is_finished:
            is_apart = recipe.peft and recipe.peft["adapters"] == "apart"
            model = load_model(model_path(recipe) if is_apart else str(source), recipe)
            model.name_or_path = str(source)  # where the methods find what they keep
            tokenizer = _with_new_words(model, tokenizer, stage, text, recipe)
            with _curves_in(output / CURVES_NAME / stage.directory.name):
                trainer = make_trainer(model, tokenizer, stage, stage.workshop)
            if recipe.peft and recipe.peft["adapters"] != "merge":
                trainer.model.active_peft_config.base_model_name_or_path = model_path(recipe)
            console.rule(f"[bold]{stage.name}[/bold] ({index} of {len(stages)})", align="left")
            started = time.perf_counter()
            if earlier:
                trainer.check_order(batch_before(earlier.run, stage.name))
            checkpoint = on_main(state, newest_checkpoint, stage.workshop)
            if before and (told := trainer.check_length(length_of(before, stage, index - 1), checkpoint)):
                console.print(told, soft_wrap=True, markup=False)
                if state.is_main_process:
                    write_text(output / RECIPE_NAME, asked.to_yaml())
            trainer.train(resume_from_checkpoint=checkpoint)
            _save(trainer, stage.directory, recipe, None if stage is stages[0] else Path(source))
            seconds = round(time.perf_counter() - started, 1)
        if state.is_main_process:
            drop_aside(output)
        if is_finished or recipe.peft:
            with TemporaryDirectory() as scratch:
                model = load_model(str(stage.directory), recipe)
                trainer = measuring_trainer(model, recipe, tokenizer, scratch)
        facts = {"checkpoint": stage.directory.name, "seconds": seconds, **_facts_of(stage, trainer)}
        _keep(
            results,
            *_measure(trainer, read.held_out(tokenizer)[0], stage.name, console, facts),
            facts,
            index,
            output,
            state,
            hub,
        )
        source = stage.directory
    for stage in stages:
        if state.is_main_process:
            shutil.rmtree(stage.workshop, ignore_errors=True)
    console.print(*results.tables(), sep="\n")
    console.print(f"Results: {output / RESULTS_NAME}    Model: {source}", soft_wrap=True, markup=False)
    return results


class _Reader:
    """The text as a tokenizer reads it; done again only for a tokenizer that has new words."""

    def __init__(self, recipe: Recipe, text: dict[str, Documents], args: Any, halves: bool, state: PartialState):
        self.recipe, self.text, self.args, self.halves, self.state = recipe, text, args, halves, state
        self.tokenizer: Any = None

    def packed(self, tokenizer: Any, names: list[str]) -> dict[str, Any]:
        """Blocks of domains."""
        self._use(tokenizer)
        with self.state.main_process_first():
            for name in names:
                if name not in self._packed:
                    self._packed[name] = _pack(self.text[name].train, tokenizer, self.args.max_length)
        return {name: self._packed[name] for name in names}

    def held_out(self, tokenizer: Any) -> tuple[dict[str, HeldOutWindows], dict[str, HeldOutWindows] | None]:
        """What `held_out_windows` gives."""
        self._use(tokenizer)
        if self._held_out is None:
            with self.state.main_process_first():
                documents = {name: one.held_out for name, one in self.text.items()}
                self._held_out = held_out_windows(self.recipe, documents, tokenizer, self.args, self.halves)
        return self._held_out

    def _use(self, tokenizer: Any) -> None:
        if self.tokenizer is None or len(tokenizer) != len(self.tokenizer):
            self.tokenizer, self._packed, self._held_out = tokenizer, {}, None


def _with_new_words(model: Any, tokenizer: Any, stage: Stage, text: dict[str, Documents], recipe: Recipe) -> Any:
    """The tokenizer with the words that the domains of a stage bring; the model's embeddings grow with it."""
    for domain in stage.domains:
        if domain.add_tokens:
            if not all(METHODS[name].works_with_adapters for name in recipe.method):
                raise UserError(
                    f"domain '{domain.name}': add_tokens: {', '.join(recipe.method)} remembers single parameters, and "
                    "the embeddings grow; leave add_tokens out, or use another method, such as das, replay or lwf"
                )
            if is_sharded(model):
                raise UserError(
                    f"domain '{domain.name}': add_tokens: fsdp has cut the embeddings into slices, which cannot grow; "
                    "leave add_tokens out, or use DDP"
                )
            words = find_new_words(text[domain.name].train, tokenizer, domain.add_tokens)
            tokenizer = add_words(model, tokenizer, words)
    return tokenizer


def measuring_trainer(model: Any, recipe: Recipe, tokenizer: Any, directory: str) -> ContinualTrainer:
    """A trainer that only measures a model."""
    args = recipe.training_arguments(None, directory)
    args.push_to_hub, args.eval_strategy = False, IntervalStrategy.NO
    # The Trainer takes no quantized model without an adapter; a fresh one adds nothing.
    bare = getattr(model.config, "quantization_config", None) and not isinstance(model, PeftModel)
    return ContinualTrainer(
        model,
        args,
        "naive",
        processing_class=tokenizer,
        architecture=Architecture.from_dict(recipe.units) if recipe.units else None,
        peft_config=adapters.lora_config(recipe.peft) if bare else None,
    )


def train_head(model: Any, recipe: Recipe, text: dict[str, Any], tokenizer: Any, directory: str) -> None:
    """
    Train the LM head of a model alone, for `new_lm_head` steps with the recipe's training arguments.

    Args:
        text: blocks by domain, which are mixed.
        directory: a temporary one.

    Raises:
        UserError: the model is sharded.
    """
    args = recipe.training_arguments(None, directory)
    args.max_steps, args.report_to = recipe.new_lm_head, []
    args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    args.push_to_hub = args.load_best_model_at_end = False
    masking = labeling(tokenizer, is_causal(recipe), args.mlm_probability)
    rows = TrainingBlocks(text, masking, data_seed(args), "interleaved")
    architecture = Architecture.from_dict(recipe.units) if recipe.units else None
    trainer = ContinualTrainer(
        model, args, "naive", rows, processing_class=tokenizer, domain="new LM head", architecture=architecture
    )
    if trainer.is_sharded:
        raise UserError("new_lm_head: with fsdp there is no head to train alone; begin with one process, or DDP")
    model.requires_grad_(False)
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
    trainer.train()
    model.requires_grad_(True)


def held_out_windows(
    recipe: Recipe, text: dict[str, Any], tokenizer: Any, args: Any, halves: bool = False
) -> tuple[dict[str, HeldOutWindows], dict[str, HeldOutWindows] | None]:
    """Held-out documents by domain as they are measured; and, where something is chosen by a score, one half of them
    to choose by, while the other is measured."""
    masking = labeling(tokenizer, is_causal(recipe), args.mlm_probability)
    held_out = {
        name: HeldOutWindows(windows(documents, tokenizer, args.max_length), masking, data_seed(args))
        for name, documents in text.items()
    }
    if not halves and not (args.interpolation_alpha == "auto" and "interpolate" in recipe.method):
        return held_out, None
    return {name: one.half(1) for name, one in held_out.items()}, {name: one.half(0) for name, one in held_out.items()}


def _measure(
    trainer: ContinualTrainer,
    held_out: dict[str, HeldOutWindows],
    name: str,
    console: Console,
    facts: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, HeldOut]]:
    """A row of the result matrix, and what every document says, under the key that it is kept by."""
    measured = trainer.measure(held_out)
    scores = {domain: one.measures(trainer.criterion.causal) for domain, one in measured.items()}
    broken = [domain for domain, score in scores.items() if not math.isfinite(score["loss"])]
    if broken:
        raise UserError(
            f"the held-out loss of '{broken[0]}' is {scores[broken[0]]['loss']} for {name}: see its weights"
        )
    losses = "   ".join(f"{domain} {score['loss']:.3f}" for domain, score in scores.items())
    console.print(f"held-out loss of {name}:   {losses}")
    if facts and "mean_importance" in facts:
        means = "   ".join(f"{kind} {mean:.3f}" for kind, mean in facts["mean_importance"].items())
        console.print(f"mean importance, which the next domain's mask holds back:   {means}")
    if facts and "interpolation_chosen_on" in facts:
        console.print(f"α {facts['interpolation_alpha']}, chosen on {', '.join(facts['interpolation_chosen_on'])}")
    weights = model_fingerprint(trainer.model)
    keys = {domain: fingerprint("held out", weights, one.fingerprint) for domain, one in held_out.items()}
    return {"name": name, "scores": scores, "measured": keys}, measured


def _keep(
    results: Results,
    row: dict[str, Any],
    measured: dict[str, HeldOut],
    facts: dict[str, Any],
    index: int,
    output: Path,
    state: PartialState,
    hub: HubRepository | None,
) -> None:
    """Put a row and its intervals into the results, and write them; of a stage its card before, and push it."""
    results.stages[index : index + 1] = [{**row, **facts}]  # there is one if a domain was deleted and learned again
    if state.is_main_process:
        cache = Cache(output / CACHE_NAME)
        for domain, one in measured.items():
            cache.put(row["measured"][domain], one.tensors(), {"stage": row["name"], "domain": domain})
        kept = [{name: cache.held_out(key) for name, key in stage["measured"].items()} for stage in results.stages]
        if all(one for stage in kept for one in stage.values()):
            results.add_held_out_intervals(kept)
        if index:  # whatever is interrupted here is measured and pushed again
            so_far = replace(results, stages=results.stages[: index + 1])
            write_card(output / facts["checkpoint"], so_far, hub and hub.id)
            if hub:
                stages = max(filter(None, results.domains.values()))
                message = f"{row['name']} ({index} of {stages})"
                hub.push(output / facts["checkpoint"], message)
        results.save(output)


def _facts_of(stage: Stage, trainer: ContinualTrainer) -> dict[str, Any]:
    """How a finished domain was learned: from what is saved with it, so that a resumed walk says the same."""
    state = json.loads((stage.directory / STATE_NAME).read_text(encoding="utf-8"))
    log = json.loads((stage.directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    facts = {**state, "history": history(log)}
    if (stage.directory / IMPORTANCE_NAME).is_file():
        facts["importance"] = Importance.load(stage.directory, trainer.units).maps()
    return facts


def history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log as a curve: one entry per step, with the held-out loss of every domain under `held_out`."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in log:
        row = steps.setdefault(entry["step"], {"step": entry["step"]})
        for key, value in entry.items():
            if match := re.fullmatch(r"eval_(.+)_loss", key):
                row.setdefault("held_out", {})[match[1]] = value
            elif key in ("loss", "learning_rate", "grad_norm") or key.startswith("loss_"):
                row[key] = value
    return [row for _, row in sorted(steps.items()) if len(row) > 1]


@contextmanager
def _curves_in(directory: Path) -> Iterator[None]:
    """Where the TensorBoard of a trainer made here writes: with the results, since the workshop goes."""
    if "TENSORBOARD_LOGGING_DIR" in os.environ:
        yield
        return
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory)
    try:
        yield
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]


def _report(output: Path) -> Path:
    from das_lm.report.page import write_report

    return write_report([output])


def _save(trainer: ContinualTrainer, directory: Path, recipe: Recipe, before: Path | None) -> None:
    """Save a finished domain, after the one in the directory `before`: whole under its name, or not there."""
    partial = partial_path(directory)
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if recipe.peft:
            adapters.finish(trainer.model, partial, recipe.peft["adapters"], recipe.model_name_or_path, before)
        trainer.state.save_to_json(str(partial / "trainer_state.json"))  # with the curves of the losses
        seal(partial)
        os.replace(partial, directory)
    trainer.accelerator.wait_for_everyone()


# ---- text and facts ----------------------------------------------------------------------------------------------


def _load_text(recipe: Recipe, console: Console) -> dict[str, Documents]:
    text = recipe.load_text()
    for documents in text.values():
        for warning in documents.warnings:
            console.print("[yellow]warning:[/yellow]", escape(warning), soft_wrap=True)
    return text


def _pack(documents: Any, tokenizer: Any, max_length: int) -> Any:
    """Blocks of a domain; large domains are tokenized by as many processes as there are cores."""
    return pack(documents, tokenizer, max_length, num_proc=os.cpu_count() if len(documents) > 100_000 else None)


def _facts(recipe: Recipe, text: dict[str, Documents], args: Any) -> dict[str, Any]:
    return {
        "recipe": yaml.safe_load(recipe.to_yaml()),
        **machine_facts(),
        **({"device": "cpu"} if args.device.type == "cpu" else {}),
        "precision": args.precision,
        "processes": args.world_size,
        "text": {name: one.fingerprints for name, one in text.items()},
        "documents": {n: len(d.train) if d.has_length else None if d.train else 0 for n, d in text.items()},
        "warnings": {name: d.warnings for name, d in text.items() if d.warnings},
    }


def check_text(before: dict[str, Any], now: dict[str, Any], option: str) -> None:
    """Whether a run goes on with the text that it began with: the facts of both, and the option that asks for it."""
    for name, parts in now["text"].items():
        for part, digest in parts.items():
            then: Any = before
            for key in ("text", name, part):  # an older release wrote none
                then = then.get(key) if isinstance(then, dict) else None
            if then not in (None, digest):
                raise UserError(
                    f"{option}: the {part} text of domain '{name}' is not what the run began with; put it back, or "
                    "start a new run"
                )


def machine_facts() -> dict[str, Any]:
    """Versions and device."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, accelerate, peft)}
    return {
        "versions": {"das_lm": __version__, **versions, "python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
