"""The walk over the domains of a recipe: load → measure → learn → consolidate → measure → save."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import PartialState
from rich.markup import escape
from safetensors import SafetensorError

from das_lm.data.blocks import HeldOutWindows, TrainingBlocks
from das_lm.data.masking import labeling
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
from das_lm.model.loading import check_model, is_causal, load_model, load_tokenizer, model_path
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
    open_output,
    stages_of,
    undo_overwriting,
    with_head,
)
from das_lm.run.facts import check_text, run_facts, stage_facts
from das_lm.run.processes import claimed, on_main
from das_lm.run.reading import Reader, load_text, with_new_words
from das_lm.run.trainers import measuring_trainer, train_head
from das_lm.signals import ProcessLost, Signals, check_signals, is_about_processes, is_about_workers
from das_lm.terminal import Console
from das_lm.training.cpu import use_all_cores
from das_lm.training.inputs import data_seed
from das_lm.training.trainer import ContinualTrainer
from das_lm.units import Architecture

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
                    text, tokenizer = load_text(recipe, console), load_tokenizer(model_path(recipe), recipe)
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
    read = Reader(recipe, {name: text[name] for name in domains}, args, halves, state)
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
    results = Results(domains, run=run_facts(recipe, text, args), unit=f"nats per {'' if causal else 'masked '}token")
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
                larger = with_new_words(model, larger, stage, text, recipe)
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
            tokenizer = with_new_words(model, tokenizer, stage, text, recipe)
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
        facts = {"checkpoint": stage.directory.name, "seconds": seconds, **stage_facts(stage, trainer)}
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
