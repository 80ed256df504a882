"""What a run shows of itself while it learns: what it begins with, a line per logging step and per evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from das_lm.report.plain import plain_finding
from das_lm.report.words import change, duration, score
from das_lm.run.directory import length_of
from das_lm.terminal import is_watched

if TYPE_CHECKING:
    from das_lm.measure.results import Results
    from das_lm.run.directory import Stage
    from das_lm.run.recipe import Recipe
    from das_lm.terminal import Console
    from das_lm.training.trainer import ContinualTrainer


def changes(losses: Mapping[str, float], base: Mapping[str, float]) -> Columns:
    """Held-out losses, each with its change since the base model."""
    cells = []
    for name, loss in losses.items():
        cell = f"{escape(name)} {score(loss, 'loss')}"
        if name in base:
            better = loss <= base[name]
            arrow, colour = ("↓", "green") if better else ("↑", "red")
            cell += f" [{colour}]{arrow}{change(abs(loss - base[name]), 'loss').lstrip('+')}[/{colour}]"
        cells.append(cell)
    return Columns(cells, padding=(0, 3))


def in_short(results: Results, plain: Results | None) -> str:
    """What a finished run gained, lost and took, and what plain training did."""
    figures = {name: results.summary()["loss"][name] for name in ("gain", "drift", "forgetting")}
    parts = [f"{name} {change(value, 'loss')}" for name, value in figures.items() if value is not None]
    seconds = [stage.get("seconds") for stage in results.stages[1:]]
    parts += [f"training took {duration(sum(seconds))}"] if None not in seconds else []
    return f"In short: {'   '.join(parts)}\n{plain_finding(results, plain)}".rstrip()


class Progress(ProgressCallback):
    """
    Takes the place of the Trainer's printing, in every stage of a run: bars on a terminal, and lines.

    Args:
        console: where the lines go.
        recipe: what is run.
        stages: of the run.
    """

    def __init__(self, console: Console, recipe: Recipe, stages: list[Stage]):
        super().__init__()
        self.console = console
        self.steps = {
            stage.name: max(0, int(length.get("max_steps", 0)))
            for index, stage in enumerate(stages)
            for length in [length_of(recipe, stage, index)]
        }  # 0: its trainer will know
        self.done, self.began = 0, 0.0
        self.base: dict[str, float] = {}
        self.losses: dict[str, float] = {}

    def header(self, recipe: Recipe, parameters: int, text: Mapping[str, Any]) -> None:
        """What begins."""
        sizes = [
            f"{one.name} ({len(text[one.name].train):,} documents)" if text[one.name].has_length else one.name
            for one in recipe.domains
        ]
        rows = Table.grid(padding=(0, 3))
        rows.add_row("model", escape(f"{recipe.model_name_or_path}, {parameters:,} parameters"))
        rows.add_row("method", escape(" + ".join(recipe.method)))
        rows.add_row("domains", escape(", then ".join(sizes)))
        if all(self.steps.values()) and self.steps:
            rows.add_row("cost", f"{sum(self.steps.values()):,} steps in all")
        self.console.print(rows)

    def measured(self, name: str, scores: Mapping[str, Any], stages: list[Any], facts: Mapping[str, Any]) -> None:
        """The base model or a finished stage has been measured."""
        base = stages[0]["scores"] if stages else {}
        self.console.print(f"held-out loss of {escape(name)}:")
        losses = [{domain: score["loss"] for domain, score in one.items()} for one in (scores, base)]
        self.console.print(changes(*losses))
        if "mean_importance" in facts:
            means = "   ".join(f"{kind} {mean:.3f}" for kind, mean in facts["mean_importance"].items())
            self.console.print(f"mean importance, which the next domain's mask holds back:\n{means}")
        if "interpolation_chosen_on" in facts:
            chosen_on = ", ".join(facts["interpolation_chosen_on"])
            self.console.print(f"α {facts['interpolation_alpha']}, chosen on {chosen_on}")

    def follow(self, trainer: ContinualTrainer, stage: str, base: Mapping[str, Any]) -> None:
        """Show what a trainer does, beside the scores of the base model."""
        for shown in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(shown)
        trainer.add_callback(self)
        self.stage, self.domains = stage, list(trainer.eval_dataset or ())
        self.base = {name: scores["loss"] for name, scores in base.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps[self.stage], self.began = state.max_steps, self.began or time.perf_counter()
        self.since = self.current_step = state.global_step
        if state.is_world_process_zero:
            hidden = args.disable_tqdm or not is_watched()
            self.training_bar = tqdm(total=state.max_steps, initial=self.since, dynamic_ncols=True, disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.done += 1
        super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        """Measuring has a bar of its own."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A line of what was logged; one when the last of the held-out domains has been measured."""
        step = f"{state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "loss" in logs:
            numbers = {"loss": ".3f", "learning_rate": ".1e", "grad_norm": ".2f"}
            parts = [f"{key.replace('_', ' ')} {logs[key]:{style}}" for key, style in numbers.items() if key in logs]
            self._print("   ".join([step, *parts, f"{self._time_left(state)} left"]))
        self.losses |= {name: logs[f"eval_{name}_loss"] for name in self.domains if f"eval_{name}_loss" in logs}
        if self.losses and len(self.losses) == len(self.domains):
            row = Table.grid(padding=(0, 3))
            row.add_row(step, changes(self.losses, self.base))
            self._print(row)
            self.losses = {}

    def _time_left(self, state: Any) -> str:
        """Of the whole run, all stages: the time so far, times what is left."""
        names = list(self.steps)
        later = [self.steps[name] or state.max_steps for name in names[names.index(self.stage) + 1 :]]
        ahead = state.max_steps - state.global_step + sum(later)
        return duration((time.perf_counter() - self.began) / max(1, self.done) * ahead)

    def _print(self, shown: Any) -> None:
        with tqdm.external_write_mode(file=sys.stdout):
            self.console.print(shown)
