"""Text that a model writes itself, as a file: what `remember: [{self: FILE}]` reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from das_lm.data.domains import Domain
from das_lm.errors import UserError, as_user_error
from das_lm.files import partial_path, write_tensors
from das_lm.measure.cache import model_fingerprint
from das_lm.methods.writing import Writer, facts_of, save_written
from das_lm.model.loading import load_model, load_tokenizer, model_path
from das_lm.run.processes import begin, claimed
from das_lm.run.recipe import Recipe
from das_lm.run.trainers import measuring_trainer

QUIET = {"report_to": "none"}


def write_self_text(
    model: str,
    rows: int,
    output: str | Path,
    training: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """
    Let a model write text at temperature 1 (see [`Writer`]), and save it as a file that stands for its past.

    What was written before an interruption is kept beside the file, and gone on with: the text is then the same.

    Args:
        model: `"built-in"`, `"built-in-causal"`, a directory, or a model of the Hugging Face hub.
        rows: how many rows of `max_length` tokens.
        output: the file, `.safetensors`.
        training: fields of [`ContinualConfig`]: `max_length`, `seed`, `self_replay_sweeps`, `bf16`, …
        trust_remote_code: run the code that comes with a model of the hub.

    Raises:
        UserError: bad input, or the file is there already.
    """
    output = Path(output).expanduser()
    if output.suffix != ".safetensors":
        raise UserError(f"output: {output} is written as safetensors; name it {output.with_suffix('.safetensors')}")
    if output.exists():
        raise UserError(f"output: {output} is there already; name another file, or remove it")
    if rows < 1:
        raise UserError(f"rows: {rows} must be at least 1")
    recipe = Recipe(
        model,
        [Domain("bio")],  # none is learned
        str(output.parent),
        method="naive",
        training={**(training or {}), **QUIET},
        trust_remote_code=trust_remote_code,
    )
    path = model_path(recipe)
    state, console = begin()
    with TemporaryDirectory() as scratch:
        trainer = measuring_trainer(load_model(path, recipe), recipe, load_tokenizer(path, recipe), scratch)
        trainer.domain = "self-text"
        facts = facts_of(trainer, model_fingerprint(trainer.model))
        with claimed(output.parent):
            started = time.perf_counter()
            written = _write(trainer, rows, partial_path(output), facts, state.is_main_process)
            if state.is_main_process:
                save_written(output, written, trainer.processing_class, facts | {"model": model, "rows": str(rows)})
                partial_path(output).unlink(missing_ok=True)
        state.wait_for_everyone()
    length, seconds = trainer.args.max_length, time.perf_counter() - started
    rate = f"{rows * length / seconds:,.0f} tokens per second"
    console.print(f"{rows:,} rows of {length} tokens ({rate}): {output}", soft_wrap=True, markup=False)
    return output


def _write(trainer: Any, rows: int, partial: Path, facts: dict[str, str], writes: bool) -> list[dict[str, Any]]:
    """All rows; after every batch, those so far are in the file `partial`."""
    written: list[dict[str, Any]] = []
    if partial.is_file():
        with as_user_error(f"{partial} cannot be read; remove it"):
            kept = load_file(partial)
        if kept.keys() == {"input_ids", facts["fingerprint"]}:
            written = [{"input_ids": row} for row in kept["input_ids"].long()[:rows]]
            written = written[: len(written) - len(written) % Writer.batch_size]
    for batch in Writer(trainer).batches(rows, begin=len(written)):
        written += batch
        if writes:
            ids = torch.stack([row["input_ids"] for row in written]).int()
            write_tensors(partial, {"input_ids": ids, facts["fingerprint"]: torch.ones(1)}, {})
    return written
