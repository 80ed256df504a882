"""
Many runs from one recipe: methods, values of their knobs, seeds.

OUTPUT_DIR/
    CONFIGURATION/seed-SEED/   one run each, as das-lm pretrain writes it; without its checkpoints unless they are kept
    comparison.json, table.md  what they say side by side, and the report beside them
"""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from das_lm.errors import UserError
from das_lm.measure.results import FILE_NAME, Results
from das_lm.report.compare import Comparison, compare
from das_lm.report.runs import is_finished
from das_lm.run.recipe_file import find_recipe, load_recipe
from das_lm.terminal import Console

if TYPE_CHECKING:
    from das_lm.run.recipe import Recipe


def parse_entry(entry: str) -> list[tuple[list[str], dict[str, str]]]:
    """
    Read what a `--sweep` asks for: `"METHOD,METHOD+METHOD: key=value,value key=value"`.

    Returns:
        every combination of a method and of one value per key: (methods, training arguments).

    Raises:
        UserError: it is not written so.
    """
    names, _, settings = entry.partition(":")
    if secret := re.search(r"\w*token\b", settings):  # not a word of the entry, which holds it
        raise UserError(f"--sweep: {secret[0]}: a sweep is no place for a secret; log in with `hf auth login`")
    methods = [[one.strip() for one in name.split("+")] for name in names.split(",")]
    values: dict[str, list[str]] = {}
    for setting in settings.split():
        key, given, listed = setting.partition("=")
        values[key] = listed.split(",")
        if not given or not all([key, *values[key]]):
            raise UserError(
                f"--sweep \"{entry}\": '{setting}' is no setting; write METHOD: key=value,value key=value, without "
                'spaces around = and commas, as in --sweep "naive: learning_rate=1e-4,3e-4"'
            )
        if key == "seed":
            raise UserError(f'--sweep "{entry}": the seed is given by --seeds')
    if not all(itertools.chain(*methods)):
        raise UserError(f'--sweep "{entry}": there is no method before the colon; write METHOD: key=value,value')
    return [
        (method, dict(zip(values, combination, strict=True)))
        for method in methods
        for combination in itertools.product(*values.values())
    ]


def plan(
    recipe: str | Path,
    entries: Sequence[str],
    seeds: Sequence[int],
    output_dir: str | Path,
    overrides: dict[str, Any] | None = None,
) -> dict[Path, Recipe]:
    """
    All runs of a sweep, checked before the first begins: all configurations with the first seed, then with the second.

    Args:
        recipe: name or path.
        entries: what to sweep over, see [`parse_entry`]; what several ask for is run once.
        seeds: of every configuration.
        output_dir: below which the runs go.
        overrides: of the recipe, see [`load_recipe`].

    Returns:
        the directory of each run -> its recipe.

    Raises:
        UserError: anything that is wrong with any of them.
    """
    from das_lm.model.loading import check_model
    from das_lm.run.directory import RECIPE_NAME, check_output

    output, overrides = Path(output_dir), overrides or {}
    find_recipe(recipe)
    if not entries:
        raise UserError('--sweep is missing; write for example --sweep "naive: learning_rate=1e-4,3e-4"')
    if "seed" in overrides.get("training", {}):
        raise UserError("--seed: a sweep has several; give them by --seeds")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: give each seed once, and one at least")
    if (output / RECIPE_NAME).exists():
        raise UserError(f"output_dir: {output} is the directory of a run; name another one with --output_dir")
    runs: dict[Path, Recipe] = {}
    for seed, entry in itertools.product(seeds, entries):
        for methods, settings in parse_entry(entry):
            training = {**overrides.get("training", {}), **settings, "seed": seed}
            try:
                loaded = load_recipe(recipe, {**overrides, "method": methods, "training": training})
            except UserError as error:
                of_entry = any(f"--{key}:" in str(error) for key in ("method", *settings))
                raise UserError(f'--sweep "{entry}": {error}' if of_entry else str(error)) from error
            name = "-".join(["+".join(methods), *(f"{key}={loaded.training[key]}" for key in settings)])
            directory = output / re.sub(r"[^\w.+=-]", "_", name) / f"seed-{seed}"
            loaded.output_dir = str(directory)
            if runs.setdefault(directory, loaded) != loaded:
                raise UserError(f'--sweep "{entry}": {directory} is the name of two runs; use other paths')
    chooses = [
        one.training.get("interpolation_alpha") == "auto" for one in runs.values() if "interpolate" in one.method
    ]
    if any(chooses) and chooses.count(True) < len(runs):
        raise UserError(
            "interpolation_alpha: 'auto' chooses on one half of the held-out text and is measured on the other, so it "
            "cannot be compared with runs that do not; give numbers"
        )
    check_model(next(iter(runs.values())))
    for directory, loaded in runs.items():
        check_output(directory, loaded, resume=(directory / RECIPE_NAME).is_file(), overwrite=False)
    return runs


def sweep(
    recipe: str | Path,
    entries: Sequence[str],
    seeds: Sequence[int],
    output_dir: str | Path,
    overrides: dict[str, Any] | None = None,
    keep_models: bool = False,
) -> Comparison:
    """
    Run all that is not finished, and compare. A run that fails, as of a learning rate that is too large, is named in
    the end and does not stop the others. The same call goes on where an earlier one was interrupted.

    Args:
        recipe, entries, seeds, output_dir, overrides: see [`plan`].
        keep_models: leave the checkpoints of finished runs where they are.

    Returns:
        the comparison of all runs in the output directory; it is also written there, with a report.

    Raises:
        UserError: a configuration is wrong (nothing has been written), or no run could be finished.
    """
    runs = plan(recipe, entries, seeds, output_dir, overrides)
    from accelerate import PartialState

    from das_lm.report.page import write_report
    from das_lm.run.directory import RECIPE_NAME, stages_of
    from das_lm.run.processes import on_main
    from das_lm.run.walk import continual_pretrain

    todo = {directory: one for directory, one in runs.items() if not _is_finished(directory)}
    state = PartialState()
    console = Console(quiet=not state.is_main_process, highlight=False)
    if len(todo) < len(runs):
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished already")
    output, failed = Path(output_dir), {}
    started = time.perf_counter()
    for number, (directory, one) in enumerate(todo.items()):
        left = (time.perf_counter() - started) / max(number, 1) * (len(todo) - number) / 60
        about = f", about {left:.0f} min left" if number else ""
        name = escape(str(directory.relative_to(output)))
        if on_main(state, _is_finished, directory):  # meanwhile, by the same command beside this one
            continue
        console.rule(f"[bold]run {number + 1} of {len(todo)}: {name}[/bold]{about}", align="left")
        try:
            continual_pretrain(one, resume=(directory / RECIPE_NAME).is_file(), report=False)
        except UserError as error:
            failed[directory] = str(error)
            console.print(f"[red]failed:[/red] {escape(str(error))}", soft_wrap=True)
        state.wait_for_everyone()
        if state.is_main_process and directory not in failed and not keep_models:
            for stage in stages_of(one, directory):
                shutil.rmtree(stage.directory)
    if len(failed) == len(runs):
        raise UserError(f"no run could be finished; the first: {next(iter(failed.values()))}")
    comparison = compare([output])
    comparison.notes += [f"Failed: {directory}: {error}" for directory, error in failed.items()]
    if state.is_main_process:
        comparison.save(output)
        comparison.print(console)
        report = write_report([output], output=output)
        console.print(f"Runs and comparison: {output}    Report: {report}", soft_wrap=True, markup=False)
    return comparison


def _is_finished(directory: Path) -> bool:
    return (directory / FILE_NAME).is_file() and is_finished(Results.load(directory))
