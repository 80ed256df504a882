"""The directory of a run: what it holds, and whether a run may begin or go on there."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainingArguments

from das_lm.errors import UserError
from das_lm.evaluation.cache import DIRECTORY as CACHE_NAME
from das_lm.evaluation.forgetting import FIGURES_NAME, PAGE_NAME
from das_lm.evaluation.forgetting import FILE_NAME as RESULTS_NAME
from das_lm.files import broken_file, is_partial, remove_partial, write_text

if TYPE_CHECKING:
    from das_lm.data.domains import Domain
    from das_lm.recipe import Recipe

RECIPE_NAME = "recipe.yaml"
CURVES_NAME = "tensorboard"
#: Training arguments that change with the number of processes, and their defaults.
PER_PROCESS = {
    name: TrainingArguments.__dataclass_fields__[name].default
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
}


@dataclass
class Stage:
    """
    Domains that are learned together: one, unless the schedule mixes them.

    Args:
        directory: where the finished checkpoint goes.
        workshop: where the Trainer keeps its checkpoints meanwhile.
    """

    name: str
    domains: list[Domain]
    directory: Path

    @property
    def workshop(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.training")

    @property
    def is_finished(self) -> bool:
        return self.directory.is_dir()  # it gets its name when it is whole; what was damaged since is refused


def stages_of(recipe: Recipe, output: Path) -> list[Stage]:
    """What is learned together, in its order: one domain, unless the schedule mixes them."""
    if recipe.schedule == "sequential":
        return [
            Stage(domain.name, [domain], output / f"{index}-{domain.name}")
            for index, domain in enumerate(recipe.domains, 1)
        ]
    name = "+".join(domain.name for domain in recipe.domains)
    return [Stage(name, list(recipe.domains), output / f"1-{recipe.schedule}")]


def check_output(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Refuse to mix runs, before anything is loaded or written."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite_output_dir removes it: give one of them")
    existing = next((path for path in (output, *output.absolute().parents) if path.exists()), None)
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir: {output} is a file; name a directory")
    if existing is not None and not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"output_dir: cannot write to {existing}; name another directory with --output_dir")
    if not output.is_dir() or all(is_partial(path) for path in output.iterdir()):
        if resume:
            raise UserError(f"--resume: {output} holds no run to go on with; leave --resume out")
        return
    if not (output / RECIPE_NAME).is_file():
        raise UserError(
            f"output_dir: {output} is not empty and holds no run; name another directory with --output_dir"
        )
    if not resume and not overwrite:
        raise UserError(
            f"output_dir: {output} holds the results of another run; give --resume to go on with it, "
            "--overwrite_output_dir to start again, or another --output_dir"
        )
    if resume:
        from das_lm.recipe import load_recipe

        before = load_recipe(output / RECIPE_NAME, check_device=False)  # as it was written, or a message
        before = _without_batch(yaml.safe_load(before.to_yaml()))
        now = _without_batch(yaml.safe_load(recipe.to_yaml()))
        for key in {**before, **now}:
            if key not in ("output_dir", "description") and before.get(key) != now.get(key):
                raise UserError(
                    f"--resume: the run in {output} has another '{key}': {before.get(key)!r}, not {now.get(key)!r}; "
                    "give the same, or another --output_dir"
                )


def check_and_clean(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """[`check_output`]; and of the run to go on with, whether its finished domains are what was saved."""
    check_output(output, recipe, resume, overwrite)
    if not resume:
        return
    for stage in stages_of(recipe, output):
        broken = broken_file(stage.directory) if stage.is_finished else None
        if broken:
            raise UserError(
                f"--resume: {stage.directory} is damaged: {broken} is not what was saved; put back a copy of the "
                f"directory, or delete it to learn '{stage.name}' again"
            )
    for directory in (output, output / CACHE_NAME):
        remove_partial(directory)


def open_output(output: Path, recipe: Recipe, overwrite: bool) -> None:
    if overwrite and (output / RECIPE_NAME).is_file():
        # Only what a run writes, and the recipe last: whatever is interrupted here can be overwritten again.
        for path in output.glob("[0-9]*-*"):
            shutil.rmtree(path)
        for name in (CACHE_NAME, CURVES_NAME, FIGURES_NAME):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (PAGE_NAME, RESULTS_NAME):
            (output / name).unlink(missing_ok=True)
        (output / RECIPE_NAME).unlink()
    output.mkdir(parents=True, exist_ok=True)
    remove_partial(output)
    if not (output / RECIPE_NAME).is_file():
        write_text(output / RECIPE_NAME, recipe.to_yaml())


def batch_before(run: dict[str, Any], name: str) -> dict[str, int]:
    """[`ContinualTrainer.batch`] of a domain, as `forgetting.json` tells how the run was begun."""
    domain = next((one for one in run["recipe"]["domains"] if one["name"] == name), {})
    training = {**run["recipe"].get("training", {}), **domain.get("training", {})}
    return {
        "processes": run.get("processes", 1),
        **{key: training.get(key, default) for key, default in PER_PROCESS.items()},
    }


def _without_batch(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what another number of processes has to change; the trainer compares the product of them."""
    for one in (recipe, *recipe["domains"]):
        training = {name: value for name, value in one.pop("training", {}).items() if name not in PER_PROCESS}
        if training:
            one["training"] = training
    return recipe
