"""The walk over the domains of a recipe: check, measure the base model, then learn, measure and record each stage."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from safetensors import SafetensorError

from das_lm.data.blocks import TrainingBlocks
from das_lm.data.built_in import MODELS
from das_lm.data.domains import data_kind
from das_lm.data.masking import labeling
from das_lm.data.remembered_text import is_self
from das_lm.data.streaming import TrainingStream
from das_lm.errors import UserError, one_line
from das_lm.files import copy_whole, is_about_disk, newest_checkpoint, partial_path, seal, write_text
from das_lm.measure.cache import DIRECTORY as CACHE_NAME
from das_lm.measure.cache import Cache, fingerprint, model_fingerprint
from das_lm.measure.leakage import find_leakage
from das_lm.measure.results import FILE_NAME as RESULTS_NAME
from das_lm.methods import METHODS, unread_options, without_effect
from das_lm.model import adapters
from das_lm.model.loading import check_model, is_causal, load_model, load_tokenizer, model_path
from das_lm.report.card import HubRepository, write_card
from das_lm.report.plain import plain_twin
from das_lm.report.shown import Results
from das_lm.run import live, samples
from das_lm.run.directory import (
    ASIDE_NAME,
    BASE_NAME,
    CURVES_NAME,
    RECIPE_NAME,
    Stage,
    batch_before,
    check_and_clean,
    drop_aside,
    length_of,
    open_output,
    stages_of,
    undo_overwriting,
    with_head,
)
from das_lm.run.facts import check_precision, check_text, run_facts, stage_facts
from das_lm.run.processes import begin, claimed, on_main, peak_memory
from das_lm.run.progress import Progress, in_short
from das_lm.run.reading import Reader, load_text, with_new_words
from das_lm.run.trainers import measuring_trainer, train_head
from das_lm.signals import ProcessLost, Signals, check_signals, is_about_processes, is_about_workers
from das_lm.training.inputs import data_seed
from das_lm.training.resuming import check_length, check_order
from das_lm.training.trainer import ContinualTrainer

if TYPE_CHECKING:
    from das_lm.data.domains import Domain
    from das_lm.data.remembered_text import RememberedText
    from das_lm.measure.held_out import HeldOut
    from das_lm.run.recipe import Recipe
    from das_lm.training.config import ContinualConfig


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
        walk = Walk(recipe, resume, overwrite, halves, report)
        with _faults_in_words(walk), claimed(walk.output), live.settled(walk):
            results = walk.run()
            if walk.draws:
                walk.say(f"Report: {live.finish(walk.output)}")
        return results


@dataclass
class Measured:
    """
    What one measurement of all held-out text gives.

    Args:
        row: of the result matrix, as `forgetting.json` holds it.
        held_out: domain -> what every document says, kept under the key that the row names.
    """

    row: dict[str, Any]
    held_out: dict[str, HeldOut]


class Walk:
    """[`continual_pretrain`] in a directory that is [`claimed`], with its arguments. Read [`run`] first."""

    def __init__(self, recipe: Recipe, resume: bool, overwrite: bool, halves: bool, report: bool):
        self.state, self.console = begin()
        self.draws = report and self.state.is_main_process  # the page, on the way and in the end
        self.recipe = self.asked = recipe  # `recipe` will name the base model with its new head, if it gets one
        self.resume, self.overwrite, self.halves = resume, overwrite, halves
        self.output = Path(recipe.output_dir)
        self.stages = stages_of(recipe, self.output)
        self.restored = False  # whether a failure has put back the run that was to be overwritten
        self.cost: dict[str, dict[str, float]] = {}  # of a stage that this process learned: seconds and memory
        self.earlier: Results | None = None  # of the run to go on with
        self.hub: HubRepository | None = None
        self.progress = Progress(self.console, recipe, self.stages)
        self.keeps_text = all(one.training.get("keep_text", True) for one in (recipe, *recipe.domains))

    def run(self) -> Results:
        """Learn, measure and record all that is not recorded yet; return the results."""
        self.before = on_main(self.state, check_and_clean, self.output, self.recipe, self.resume, self.overwrite)
        with self._or_as_before():
            self.check()
            if not self.results.stages:
                self.measure_base()
            self.recipe = with_head(self.asked, self.output)
            self.source: str | Path = model_path(self.recipe)
            for index, stage in enumerate(self.stages, 1):
                if not self.is_recorded(index, stage):
                    # No name here holds the trainer: its model would stay in memory beside the next.
                    measured = self.measure_stage(stage, None if stage.is_finished else self.learn(index, stage))
                    self.record(index, measured)
                self.source = stage.directory
            return self.finish()

    # ---- before anything is learned --------------------------------------------------------------------------------

    def check(self) -> None:
        """Read all text and compare it with that of the run to go on with; warn of what looks wrong in a new run."""
        recipe = self.recipe
        check_model(recipe)
        with self.state.main_process_first():
            self.text, self.tokenizer = load_text(recipe, self.console), load_tokenizer(model_path(recipe), recipe)
        learned = {domain.name: index for index, stage in enumerate(self.stages, 1) for domain in stage.domains}
        domains = {domain.name: learned.get(domain.name) for domain in [*recipe.measure, *recipe.domains]}
        args = recipe.training_arguments(None, str(self.output))
        self.causal = is_causal(recipe)
        read = [*domains, *(one.name for one in recipe.remember if one.name in self.text)]
        self.reader = Reader(recipe, {name: self.text[name] for name in read}, args, self.halves, self.state)
        if args.push_to_hub and self.state.is_main_process:
            self.hub = HubRepository(args, self.output.absolute().name)
        unit = f"nats per {'' if self.causal else 'masked '}token"
        self.results = Results(domains, run=run_facts(recipe, self.text, args), unit=unit)
        if (self.output / RESULTS_NAME).is_file() and not self.overwrite:
            self._go_on_with(Results.load(self.output))
        elif self.state.is_main_process:
            self._warn_of_slips()

    def _go_on_with(self, earlier: Results) -> None:
        check_text(earlier.run, self.results.run, "--resume")
        check_precision(earlier.run, self.results.run, "--resume")
        self.results.stages, self.results.run["warnings"] = earlier.stages, earlier.run.get("warnings", {})
        self.earlier = earlier

    def _warn_of_slips(self) -> None:
        for name, warning in find_leakage(self.text).warnings():
            self.warn(name, warning, "; see das-lm check-data")
        given = itertools.chain(self.recipe.training, *(domain.training for domain in self.recipe.domains))
        if unread := unread_options(given, self.recipe.method):
            self.warn("training", f"read by no chosen method ({', '.join(self.recipe.method)}): {', '.join(unread)}")
        self._warn_of_what_is_remembered()

    def _warn_of_what_is_remembered(self) -> None:
        recipe, kinds = self.recipe, [METHODS[name] for name in self.recipe.method]
        uses = any(kind.consolidates_base or kind.draws_remembered for kind in kinds)
        if recipe.remember and not uses and recipe.training.get("importance") != "remembered":
            self.warn("remember", f"no chosen method ({', '.join(recipe.method)}) uses what is remembered")
        foreign = [one.name for one in recipe.remember if data_kind(one.data) == "built-in"]
        if uses and foreign and recipe.model_name_or_path not in MODELS:
            self.warn(
                "remember",
                f"'{foreign[0]}' is built-in text, which stands for what the built-in models know, not for what "
                f"{recipe.model_name_or_path} does",
                "; write --remember self, or text of yours",
            )

    def measure_base(self) -> None:
        """
        Measure the model that has learned nothing, after its new LM head if it gets one.

        All that a wrong recipe can say shows here; only then is anything written, or an earlier run removed.
        """
        recipe, has_new_head = self.recipe, self.recipe.new_lm_head is not None
        with TemporaryDirectory() as scratch:
            model = load_model(model_path(recipe), recipe)
            self._try_every_stage(model, Path(scratch))
            if has_new_head:
                general = self.reader.packed(self.tokenizer, [domain.name for domain in recipe.measure])
                train_head(model, recipe, general, self.tokenizer, scratch)
            trainer = measuring_trainer(model, recipe, self.tokenizer, scratch)
            self.progress.header(recipe, model.num_parameters(), self.text)
            checkpoint = BASE_NAME if has_new_head else recipe.model_name_or_path
            measured = self.measure(trainer, "base", {"checkpoint": checkpoint})
            if has_new_head:
                _save(trainer, Path(scratch, BASE_NAME), replace(recipe, peft=None), None)
            larger = self.tokenizer
            for stage in self.stages:
                larger = with_new_words(model, larger, stage, self.text, recipe)
            if self.state.is_main_process:
                self._open_output()
                if has_new_head:
                    copy_whole(Path(scratch, BASE_NAME), self.output / BASE_NAME)
        self.record(0, measured)
        self.state.wait_for_everyone()

    def _try_every_stage(self, model: Any, scratch: Path) -> None:
        """Make the trainer of every stage, for what it refuses."""
        for stage in self.stages:
            trainer = self.trainer_of(stage, model, self.tokenizer, scratch)
            if self.recipe.peft:
                trainer.model.unload()
        if len(self.stages) == 1 and (warning := without_effect(trainer.methods)):
            self.warn(self.stages[0].name, warning)

    def _open_output(self) -> None:
        open_output(self.output, self.recipe, self.overwrite)
        if (self.output / ASIDE_NAME).is_dir():
            self.say(f"The run before stands in {self.output / ASIDE_NAME} until '{self.stages[0].name}' is learned")

    # ---- a stage ---------------------------------------------------------------------------------------------------

    def is_recorded(self, index: int, stage: Stage) -> bool:
        """Whether a stage is learned and measured already."""
        return len(self.results.stages) > index and stage.is_finished

    def learn(self, index: int, stage: Stage) -> ContinualTrainer:
        """Learn the domains of a stage, go on where this was interrupted, and save the model."""
        trainer = self._open_stage(stage)
        self.console.rule(f"[bold]{stage.name}[/bold] ({index} of {len(self.stages)})", align="left")
        self.progress.follow(trainer, stage.name, {} if self.halves else self.results.stages[0]["scores"])
        started = time.perf_counter()
        live.watch(self, trainer, stage.name)
        trainer.train(resume_from_checkpoint=self._checkpoint_of(index, stage, trainer))
        _save(trainer, stage.directory, self.recipe, None if index == 1 else Path(self.source))
        self.cost[stage.name] = {"seconds": round(time.perf_counter() - started, 1), "peak_memory": peak_memory()}
        return trainer

    def _open_stage(self, stage: Stage) -> ContinualTrainer:
        """The trainer of a stage, with the model of the one before and the words that its domains bring."""
        recipe = self.recipe
        tokenizer = load_tokenizer(str(self.source), recipe)
        is_apart = recipe.peft and recipe.peft["adapters"] == "apart"
        model = load_model(model_path(recipe) if is_apart else str(self.source), recipe)
        model.name_or_path = str(self.source)  # where the methods find what they keep
        tokenizer = with_new_words(model, tokenizer, stage, self.text, recipe)
        with _curves_in(self.output / CURVES_NAME / stage.directory.name):
            trainer = self.trainer_of(stage, model, tokenizer, stage.workshop)
        if recipe.peft and recipe.peft["adapters"] != "merge":
            trainer.model.active_peft_config.base_model_name_or_path = model_path(recipe)
        return trainer

    def _checkpoint_of(self, index: int, stage: Stage, trainer: ContinualTrainer) -> Any:
        """The newest checkpoint of a stage, if it has one; another batch or length than it began with is refused."""
        if self.earlier:
            check_order(trainer, batch_before(self.earlier.run, stage.name))
        checkpoint = on_main(self.state, newest_checkpoint, stage.workshop)
        if self.before and (told := check_length(trainer, length_of(self.before, stage, index - 1), checkpoint)):
            self.say(told)
            if self.state.is_main_process:
                write_text(self.output / RECIPE_NAME, self.asked.to_yaml())
        return checkpoint

    def trainer_of(self, stage: Stage, model: Any, tokenizer: Any, directory: Path) -> ContinualTrainer:
        """A trainer that learns the domains of a stage, and writes its checkpoints to a directory."""
        recipe, so_far = self.recipe, self._domains_until(stage)
        args = self._arguments_of(stage, directory)
        rows = self._rows_of(stage, tokenizer, args)
        held_out, development = self.reader.held_out(tokenizer)
        to_choose_by = {*args.interpolation_domains, *(one.name for one in so_far)}
        trainer = ContinualTrainer(
            model=model,
            args=args,
            method=recipe.method,
            train_dataset=rows,
            eval_dataset=development if self.halves else held_out,
            processing_class=tokenizer,
            domain=stage.name,
            development_dataset=development and {n: one for n, one in development.items() if n in to_choose_by},
            architecture=recipe.architecture(),
            peft_config=adapters.lora_config(recipe.peft) if recipe.peft else None,
            remember={one.name: self._remembered(one, tokenizer, stage) for one in recipe.remember} or None,
        )
        trainer.tells_of_methods_without_effect = False  # the walk does
        return trainer

    def _arguments_of(self, stage: Stage, directory: Path) -> ContinualConfig:
        args = self.recipe.training_arguments(stage.domain, str(directory))
        if stage is not self.stages[0] and not (stage.domain and "importance" in stage.domain.training):
            args.importance = "auto"  # where the importance of the base model comes from has been settled
        if args.drift_budget is not None:
            args.drift_budget *= self._part_of(stage)
        args.push_to_hub = False  # the walk pushes, when a stage is finished and measured
        return args

    def _rows_of(self, stage: Stage, tokenizer: Any, args: ContinualConfig) -> TrainingBlocks:
        """What a stage learns from: its own domains, or all so far for a method that needs them."""
        masking, seed = labeling(tokenizer, self.causal, args.mlm_probability), data_seed(args)
        domain = stage.domain
        if domain and domain.streaming:
            documents, buffer = self.text[domain.name].train, domain.shuffle_buffer
            return TrainingStream(documents, tokenizer, args.max_length, masking, seed, domain.name, buffer)
        needs_earlier = any(METHODS[name].needs_earlier_domains for name in self.recipe.method)
        learned = self._domains_until(stage) if needs_earlier else stage.domains
        blocks = self.reader.packed(tokenizer, [domain.name for domain in learned])
        return TrainingBlocks(blocks, masking, seed, "interleaved" if needs_earlier else self.recipe.schedule)

    def _remembered(self, entry: RememberedText, tokenizer: Any, stage: Stage) -> tuple[Any, float, float | None]:
        """What a trainer is given for an entry of `remember`: data, weight, and how far it may drift by this stage."""
        if is_self(entry.data):
            path = entry.data.partition(":")[2]
            data = Path(path).expanduser() if path else entry.rows or "self"
        else:
            data = self.reader.packed(tokenizer, [entry.name])[entry.name]
        return data, entry.weight, entry.budget and entry.budget * self._part_of(stage)

    def _part_of(self, stage: Stage) -> float:
        """How much of what may be lost in all may be lost by the end of a stage."""
        return (self.stages.index(stage) + 1) / len(self.stages)

    def _domains_until(self, stage: Stage) -> list[Domain]:
        return [domain for one in self.stages[: self.stages.index(stage) + 1] for domain in one.domains]

    # ---- measure and record ----------------------------------------------------------------------------------------

    def measure_stage(self, stage: Stage, trainer: ContinualTrainer | None) -> Measured:
        """Measure what a stage has saved, with the trainer that has just learned it, if one has."""
        tokenizer = trainer.processing_class if trainer else load_tokenizer(str(stage.directory), self.recipe)
        if self.state.is_main_process:
            drop_aside(self.output)
        if trainer is None or self.recipe.peft:
            with TemporaryDirectory() as scratch:
                model = load_model(str(stage.directory), self.recipe)
                trainer = measuring_trainer(model, self.recipe, tokenizer, scratch)
        how = {"checkpoint": stage.directory.name, **self.cost.get(stage.name, {"seconds": None})}
        return self.measure(trainer, stage.name, {**how, **stage_facts(stage, trainer)})

    def measure(self, trainer: ContinualTrainer, name: str, facts: dict[str, Any]) -> Measured:
        """
        Measure a model on the held-out text of every domain, and say what it gives.

        Args:
            trainer: of the model.
            name: of the row.
            facts: what else the row tells.

        Raises:
            UserError: a loss is not finite.
        """
        windows = self.reader.held_out(trainer.processing_class).measured
        measured = trainer.measure(windows)
        scores = {domain: one.measures(trainer.criterion.causal) for domain, one in measured.items()}
        for domain, score in scores.items():
            if not math.isfinite(score["loss"]):
                raise UserError(f"the held-out loss of '{domain}' is {score['loss']} for {name}: see its weights")
        self.progress.measured(name, scores, self.results.stages, facts)
        weights = model_fingerprint(trainer.model)
        keys = {domain: fingerprint("held out", weights, one.fingerprint) for domain, one in windows.items()}
        said = {"samples": samples.of(trainer, windows)} if self.keeps_text else {}
        return Measured({"name": name, "scores": scores, "measured": keys, **said, **facts}, measured)

    def record(self, index: int, measured: Measured) -> None:
        """Put a row and its intervals into the results, and write them; of a stage its card before, and push it."""
        results = self.results
        results.stages[index : index + 1] = [measured.row]  # there is one if a domain was deleted and learned again
        if self.state.is_main_process:
            self._add_intervals(measured)
            if index:  # whatever is interrupted here is measured and pushed again
                self._publish(index, measured.row)
            results.save(self.output)
            if self.draws and index < len(self.stages):
                live.draw(self.output, results)

    def _add_intervals(self, measured: Measured) -> None:
        cache, row, stages = Cache(self.output / CACHE_NAME), measured.row, self.results.stages
        for domain, one in measured.held_out.items():
            cache.put(row["measured"][domain], one.tensors(), {"stage": row["name"], "domain": domain})
        kept = [{name: cache.held_out(key) for name, key in stage["measured"].items()} for stage in stages]
        if all(one for stage in kept for one in stage.values()):
            self.results.add_held_out_intervals(kept)

    def _publish(self, index: int, row: dict[str, Any]) -> None:
        directory = self.output / row["checkpoint"]
        so_far = replace(self.results, stages=self.results.stages[: index + 1])
        write_card(directory, so_far, self.hub and self.hub.id)
        if self.hub:
            self.hub.push(directory, f"{row['name']} ({index} of {len(self.stages)})")

    def finish(self) -> Results:
        """Remove what only training needs, and show the results."""
        for stage in self.stages:
            if self.state.is_main_process:
                shutil.rmtree(stage.workshop, ignore_errors=True)
        self.console.print(*self.results.tables(), sep="\n")
        self.say(in_short(self.results, plain_twin(self.results, self.output)))
        self.say(f"Results: {self.output / RESULTS_NAME}    Model: {self.source}")
        return self.results

    # ---- what people see, and failures -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print one line, however long, as it is."""
        self.console.print(text, soft_wrap=True, markup=False)

    def warn(self, about: str, warning: str, hint: str = "") -> None:
        """Print a warning, with a hint, and keep it in the results."""
        self.console.print("[yellow]warning:[/yellow]", escape(f"{warning}{hint}"), soft_wrap=True)
        self.results.run["warnings"].setdefault(about, []).append(warning)

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """On a failure, put back the run that was to be overwritten, unless the new one can be gone on with."""
        try:
            yield
        except Exception:
            check_signals()
            self.restored = self.overwrite and self.state.is_main_process and undo_overwriting(self.output)
            raise


@contextmanager
def _faults_in_words(walk: Walk) -> Iterator[None]:
    """Say in words what is no fault of the code: a full disk, and processes that were killed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        check_signals()  # which may have ended others first: data-loader workers, the processes of a launcher
        if is_about_workers(error):
            raise UserError(
                "dataloader_num_workers: a worker of the data loader was killed, perhaps for its memory; write a "
                "smaller number, and use --resume to go on"
            ) from error
        state = walk.state
        if state.num_processes > 1 and is_about_processes(error):
            raise ProcessLost(
                f"process {state.process_index} of {state.num_processes} lost another one, which was killed or says "
                f"why it ended; use --resume to go on ({one_line(error)})"
            ) from error
        if is_about_disk(error):
            where = getattr(error, "filename", None) or walk.output
            raise UserError(
                f"output_dir: cannot write to {where}: {one_line(error)}; free some space, or make it writable, and "
                f"{'give the same command again' if walk.restored else 'use --resume'}"
            ) from error
        raise


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
