"""The processes of a run: how they begin, and what the main one does for all."""

from __future__ import annotations

import atexit
import gc
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from das_lm.errors import UserError
from das_lm.run.directory import locked
from das_lm.terminal import Console, is_watched
from das_lm.training.cpu import use_all_cores

#: Of all progress bars, in place of tqdm's, which is shared with data loader workers: one that is killed may hold it.
BARS = threading.RLock()


def begin() -> tuple[PartialState, Console]:
    """This process among those of a run, and a console on which the main one alone prints."""
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.device.type == "cpu" and state.num_processes == 1:
        use_all_cores()
    elif state.device.type == "cpu":
        atexit.register(leave_group)
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights
    for bar in (tqdm, datasets.utils.tqdm):
        bar.set_lock(BARS)
    if not is_watched():
        datasets.disable_progress_bars()  # of tokenizing, as all others where nobody watches
    return state, Console(quiet=not state.is_main_process, highlight=False)


def peak_memory() -> int:
    """The most bytes that this process has held at once so far: on its accelerator, or without one of its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def leave_group() -> None:
    """Leave the group of processes, if there is one: gloo's threads may abort a process that ends in it, or with a
    wrapped model that still holds it."""
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


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
