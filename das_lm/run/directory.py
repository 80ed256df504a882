"""The directory of a run: what it holds, and whether a run may begin or go on there."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainingArguments

from das_lm.data.remembered_text import paths_of
from das_lm.errors import UserError
from das_lm.files import (
    MANIFEST,
    broken_file,
    is_partial,
    manifest_of,
    partial_path,
    remove_partial,
    write_json,
    write_text,
)
from das_lm.measure.cache import DIRECTORY as CACHE_NAME
from das_lm.measure.results import FIGURES_NAME, PAGE_NAME, VALUES_NAME, Results
from das_lm.measure.results import FILE_NAME as RESULTS_NAME
from das_lm.plain_words import key_path
from das_lm.training.config import ContinualConfig

if TYPE_CHECKING:
    from das_lm.data.domains import Domain
    from das_lm.run.recipe import Recipe

RECIPE_NAME = "recipe.yaml"
CURVES_NAME = "tensorboard"
MARKER_NAME, MARKER_FORMAT = ".das-lm.json", "das_lm.run"
LOCK_NAME = ".das-lm.lock"  # a file of one's own may be called .lock
ASIDE_NAME = ".overwritten"
BASE_NAME = "0-base"  # the base model, where it got a new LM head
STAGE_PATTERN = re.compile(r"\d+-[\w.-]+")
#: Training arguments that change with the number of processes, and their defaults.
PER_PROCESS = {
    name: TrainingArguments.__dataclass_fields__[name].default
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
}
#: How long a domain is learned, and the defaults.
LENGTH = {name: TrainingArguments.__dataclass_fields__[name].default for name in ("max_steps", "num_train_epochs")}
#: What of a recipe and its training arguments changes neither weights nor figures: a run may go on with another.
HARMLESS = {
    *("output_dir", "description", "trust_remote_code", "do_train", "do_eval", "do_predict", "length_column_name"),
    *("logging_strategy", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm"),
    *("include_num_input_tokens_seen", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    *("save_total_limit", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_private_repo"),
    *("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "torch_empty_cache_steps", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "skip_memory_metrics"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "logging_nan_inf_filter"),
}
#: The same, unless training follows what is measured meanwhile.
CADENCE = {
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_steps", "save_strategy", "save_steps"),
    *("metric_for_best_model", "greater_is_better"),
}
FOLLOWING = {"load_best_model_at_end": (True,), "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy")}


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
    def domain(self) -> Domain | None:
        """The domain, if it is only one."""
        return self.domains[0] if len(self.domains) == 1 else None

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


def with_head(recipe: Recipe, output: Path) -> Recipe:
    """
    The recipe whose base model is the one of a run that has its LM head, be it new or not.

    Raises:
        UserError: it was damaged.
    """
    if recipe.new_lm_head is None:
        return recipe
    if broken := broken_file(output / BASE_NAME):
        raise UserError(
            f"{output / BASE_NAME}, the base model with its new head, is damaged: {broken} is not what was saved; put "
            "back a copy of the directory, or start a new run"
        )
    return replace(recipe, model_name_or_path=str(output / BASE_NAME), new_lm_head=None)


def check_output(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> Recipe | None:
    """Refuse to mix runs, before anything is loaded or written. Returns the recipe of the run to go on with."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite_output_dir removes it: give one of them")
    _check_place(output)
    for key, path in _inputs(recipe):
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"{key}: {path} is inside of the output directory {output}; what a run reads stands elsewhere: name "
                "another --output_dir, or move it"
            )
    if not is_run(output):
        if output.is_dir() and not all(_is_no_result(path) for path in output.iterdir()):
            raise UserError(
                f"output_dir: {output} is not empty and holds no run; name another directory with --output_dir"
            )
        if resume:
            raise UserError(f"--resume: {output} holds no run to go on with; leave --resume out")
        return None
    if not resume and not overwrite:
        aside = output / ASIDE_NAME
        before = f" ({aside} holds the one before, until it has learned a domain)" if aside.exists() else ""
        raise UserError(
            f"output_dir: {output} holds the results of another run{before}; give --resume to go on with it, "
            "--overwrite_output_dir to start again, or another --output_dir"
        )
    if overwrite and (foreign := foreign_files(output) + _in_the_way(output, recipe)):
        raise UserError(
            f"--overwrite_output_dir: no run wrote {', '.join(foreign[:3])}{' …' * (len(foreign) > 3)} in {output}, "
            "among what is removed or written; move it elsewhere, or name another --output_dir"
        )
    if resume:
        from das_lm.run.recipe_file import load_recipe

        trusts = {"trust_remote_code": recipe.trust_remote_code}
        before = load_recipe(output / RECIPE_NAME, trusts, check_device=False)  # as it was written, or a message
        _check_same(before, recipe, output)
        return before
    return None


def check_and_clean(output: Path, recipe: Recipe, resume: bool, overwrite: bool) -> Recipe | None:
    """[`check_output`] of a directory that is [`locked`]; and whether the finished domains of the run to go on with
    are what was saved."""
    if not (output / RECIPE_NAME).is_file() or not all(marker.is_file() for marker in _markers(output, MARKER_NAME)):
        put_back(output)  # a process that was about to overwrite it was killed
    before = check_output(output, recipe, resume, overwrite)
    if not resume:
        return None
    for stage in stages_of(recipe, output):
        broken = broken_file(stage.directory) if stage.is_finished else None
        if broken:
            raise UserError(
                f"--resume: {stage.directory} is damaged: {broken} is not what was saved; put back a copy of the "
                f"directory, or delete it to learn '{stage.name}' again"
            )
    for directory in (output, output / CACHE_NAME):
        remove_partial(directory)
    return before


def open_output(output: Path, recipe: Recipe, overwrite: bool) -> None:
    """Set aside what is overwritten, and say what will be written here before it is."""
    if overwrite and is_run(output):
        set_aside(output)
    output.mkdir(parents=True, exist_ok=True)
    remove_partial(output)
    if not (output / RECIPE_NAME).is_file():
        mark(output, recipe)
        write_text(output / RECIPE_NAME, recipe.to_yaml())


# ---- what a run writes -------------------------------------------------------------------------------------------


def mark(output: Path, recipe: Recipe) -> None:
    """Write the marker that tells a run, and what it writes, from what else a directory may hold."""
    base = [] if recipe.new_lm_head is None else [BASE_NAME]
    _mark(output, [*base, *(stage.directory.name for stage in stages_of(recipe, output))])


def _mark(output: Path, stages: list[str]) -> None:
    write_json(output / MARKER_NAME, {"format": MARKER_FORMAT, "version": 1, "stages": stages})


def is_run(directory: Path) -> bool:
    """Whether a run has begun in a directory: it has marked it, or, of an older release, its results and its recipe
    name the same domains."""
    return (directory / RECIPE_NAME).is_file() and _stages_in(directory) is not None


def _stages_in(directory: Path) -> list[str] | None:
    """Names of the stages that the run in a directory writes, or `None` if it is none."""
    try:
        if (directory / MARKER_NAME).is_file():
            marker = json.loads((directory / MARKER_NAME).read_text(encoding="utf-8"))
            stages = marker["stages"] if marker["format"] == MARKER_FORMAT else None
        else:
            from das_lm.run.recipe_file import load_recipe

            recipe = load_recipe(directory / RECIPE_NAME, {"trust_remote_code": False}, check_device=False)
            learned = [name for name, stage in Results.load(directory).domains.items() if stage]
            is_ours = sorted(learned) == sorted(domain.name for domain in recipe.domains)
            stages = [stage.directory.name for stage in stages_of(recipe, directory)] if is_ours else None
        return stages if stages and all(STAGE_PATTERN.fullmatch(name) for name in stages) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None


def _entries(directory: Path) -> list[Path]:
    """All that a run has written in a directory; its marker comes last."""
    stages = _stages_in(directory) or []
    names = [*stages, *(f"{stage}.training" for stage in stages), CACHE_NAME, CURVES_NAME, FIGURES_NAME, PAGE_NAME]
    names += [VALUES_NAME, RESULTS_NAME, RECIPE_NAME, MARKER_NAME]
    return [directory / name for name in names if os.path.lexists(directory / name)]


def foreign_files(directory: Path, beside: bool = False) -> list[str]:
    """Files among the results of a run, or also `beside` them, that it did not write."""
    entries = _entries(directory)
    found = [path for entry in entries if entry.is_dir() for path in _foreign_in(entry)]
    found += [path for path in directory.iterdir() if path not in entries] if beside else []
    return [str(path.relative_to(directory)) for path in sorted(found) if not is_partial(path)]


def _in_the_way(output: Path, recipe: Recipe) -> list[str]:
    """What has the name of something that a new run writes, and is not of the one before, so that it stays there."""
    stages = [stage.directory.name for stage in stages_of(recipe, output)]
    paths = [output / name for name in (*stages, *(f"{stage}.training" for stage in stages), BASE_NAME)]
    return [path.name for path in paths if os.path.lexists(path) and path not in _entries(output)]


def _foreign_in(entry: Path) -> Iterator[Path]:
    if entry.is_symlink():
        return
    files = {path.relative_to(entry).as_posix(): path for path in entry.rglob("*") if not path.is_dir()}
    if entry.name.endswith(".training"):
        ours = {name for name in files if re.match(r"checkpoint-\d+/", name)}
    elif entry.name == CACHE_NAME:
        ours = {name for name in files if re.fullmatch(r"[0-9a-f]{32}\.safetensors", name)}
    elif entry.name == CURVES_NAME:
        ours = {name for name in files if files[name].name.startswith("events.out.tfevents.")}
    elif entry.name == FIGURES_NAME:  # each is there twice
        ours = {name for name in files if {f"{name[:-4]}.png", f"{name[:-4]}.svg"} <= {name, *files}}
    else:
        ours = {*manifest_of(entry), MANIFEST, "README.md"}
    yield from (path for name, path in files.items() if name not in ours)


def _is_no_result(path: Path) -> bool:
    """Whether a file says nothing, as what a killed process leaves before a run has begun."""
    return is_partial(path) or path.name in (MARKER_NAME, LOCK_NAME)


# ---- the run that is overwritten -----------------------------------------------------------------------------------
# It stands aside until the new one has saved a domain. The marker moves last, and tells what was done before a kill.


def set_aside(output: Path) -> None:
    """Make room for a new run."""
    if (output / ASIDE_NAME).is_dir():  # the run here has taken the place of another
        (drop_aside if any((output / stage).is_dir() for stage in _stages_in(output)) else put_back)(output)
    if not (output / MARKER_NAME).is_file():
        _mark(output, _stages_in(output))
    move_aside(_entries(output))


def move_aside(entries: list[Path]) -> None:
    """Move files and directories, the marker last, out of the way of new ones."""
    aside = entries[0].parent / ASIDE_NAME
    aside.mkdir()
    for path in entries:
        os.rename(path, aside / path.name)


def put_back(output: Path, entries: Callable[[Path], list[Path]] = _entries, marker: str = MARKER_NAME) -> None:
    """
    Remove what has been written since something was set aside, if anything was, and put that back.

    Args:
        output: where.
        entries: a directory -> what was written in it; the marker last.
        marker: its name.
    """
    aside = output / ASIDE_NAME
    if not aside.is_dir():
        return
    if all(marker.is_file() for marker in _markers(output, marker)):
        for path in entries(output):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(aside.iterdir(), key=lambda path: path.name == marker):
        os.rename(path, output / path.name)
    aside.rmdir()


def _markers(output: Path, name: str) -> tuple[Path, Path]:
    """Of what is new, and of what is set aside; where one is missing, nothing new has begun."""
    return output / name, output / ASIDE_NAME / name


def drop_aside(output: Path) -> None:
    """What is new is worth more now: what was set aside goes."""
    if (output / ASIDE_NAME).is_dir():
        gone = partial_path(output / ASIDE_NAME)
        os.rename(output / ASIDE_NAME, gone)
        shutil.rmtree(gone)


def undo_overwriting(output: Path) -> bool:
    """After a failure: put back the run before, if the new one has nothing that it could go on from."""
    undo = (output / ASIDE_NAME).is_dir() and not any(output.glob(f"*.training/checkpoint-*/{MANIFEST}"))
    if undo:
        put_back(output)
    return undo


# ---- one at a time -----------------------------------------------------------------------------------------------

_locks: set[int] = set()
# A fork, such as one that loads data, has no share in them: it would keep them when its parent is killed.
os.register_at_fork(after_in_child=lambda: [os.close(lock) for lock in _locks])


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """
    While a block runs, no other process writes to an output directory. A process that is killed holds it no longer.

    Raises:
        UserError: another process writes there, or nobody can.
    """
    _check_place(output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    path = output / LOCK_NAME
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            f"output_dir: cannot write to {output}: {error.strerror}; name another directory with --output_dir"
        ) from error
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(lock), os.stat(path))  # or its owner has just ended
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system without locks
            is_ours = True
        if not is_ours:
            holder = os.read(lock, 1000).decode("utf-8", "replace") or "another process"
            raise UserError(
                f"output_dir: {output} is in use by {holder}; wait until it ends, or name another --output_dir"
            )
        try:
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # something was written
                for directory in made:
                    directory.rmdir()
    finally:
        _locks.remove(lock)
        os.close(lock)


def _check_place(output: Path) -> None:
    """Whether a directory can be written to."""
    existing = next((path for path in (output, *output.absolute().parents) if path.exists()), None)
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir: {output} is a file; name a directory")
    if existing is not None and not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise UserError(f"output_dir: cannot write to {existing}; name another directory with --output_dir")


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Key and path of all files that a run reads."""
    given = [("model_name_or_path", recipe.model_name_or_path)]
    for where, training in (
        ("", recipe.training),
        *((f"domain '{one.name}': ", one.training) for one in recipe.domains),
    ):
        given.append((f"{where}importance", training.get("importance", "")))
    for domain in (*recipe.domains, *recipe.measure, *recipe.remember):
        for key in ("data", "held_out"):
            given += [(f"domain '{domain.name}': {key}", path) for path in paths_of(getattr(domain, key))]
    for key, path in given:
        if isinstance(path, str):
            path = os.path.expanduser(path)
            yield from ((key, Path(one)) for one in ([path] if os.path.exists(path) else glob(path, recursive=True)))


# ---- what a run goes on with ---------------------------------------------------------------------------------------


def _check_same(before: Recipe, now: Recipe, output: Path) -> None:
    """Whether two recipes lead to the same numbers. How long a domain that is not finished is learned, and the product
    of what is in `PER_PROCESS`, the trainer compares."""
    trainings = [one.training for recipe in (before, now) for one in (recipe, *recipe.domains)]
    follows = any(training.get(key) in values for training in trainings for key, values in FOLLOWING.items())
    ignored = {*PER_PROCESS, *LENGTH, *HARMLESS, *(() if follows else CADENCE)}
    old, new = (dict(_leaves(yaml.safe_load(recipe.to_yaml()))) for recipe in (before, now))
    others = []
    for at in {**old, **new}:
        argument = at[at.index("training") + 1] if "training" in at else at[0]
        default = getattr(ContinualConfig, at[1], None) if at[0] == "training" and len(at) == 2 else None
        values = [leaves.get(at, default) for leaves in (old, new)]
        if argument not in ignored and values[0] != values[1]:
            began, gives = ("none" if value is None else _shortened(str(value)) for value in values)
            others.append(f"{key_path(at)}: {began}, not {gives}")
    if others:
        raise UserError(
            f"--resume: the run in {output} began with {'; '.join(others)}. Give the same, or another --output_dir"
        )
    measured = Results.load(output).stages if (output / RESULTS_NAME).is_file() else []
    learned = {row["name"] for row in measured}  # a sweep keeps no models
    for index, stage in enumerate(stages_of(now, output)):
        lengths = [length_of(recipe, stage, index) for recipe in (before, now)]
        if (stage.is_finished or stage.name in learned) and lengths[0] != lengths[1]:
            began, gives = (" ".join(f"{name} {value}" for name, value in length.items()) for length in lengths)
            raise UserError(
                f"--resume: '{stage.name}' is learned, with {began}, not {gives}; give the same. For another domain, "
                "write it into the training of that domain"
            )


def length_of(recipe: Recipe, stage: Stage, index: int) -> dict[str, float]:
    """How long the domains of a stage, the `index`-th of the recipe, are learned."""
    given = {**recipe.training, **(recipe.domains[index].training if len(stage.domains) == 1 else {})}
    steps = given.get("max_steps", LENGTH["max_steps"])
    return {"max_steps": steps} if steps > 0 else {name: given.get(name, value) for name, value in LENGTH.items()}


def _leaves(data: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Path of keys -> value; a list of values is one."""
    if isinstance(data, dict) or (isinstance(data, list) and any(isinstance(one, dict) for one in data)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves(value, (*at, key))
    else:
        yield at, data


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}…"


def batch_before(run: dict[str, Any], name: str) -> dict[str, int]:
    """[`ContinualTrainer.batch`] of a domain, as `forgetting.json` tells how the run was begun."""
    domain = next((one for one in run["recipe"]["domains"] if one["name"] == name), {})
    training = {**run["recipe"].get("training", {}), **domain.get("training", {})}
    return {
        "processes": run.get("processes", 1),
        **{key: training.get(key, default) for key, default in PER_PROCESS.items()},
    }
