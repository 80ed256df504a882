"""What one process does for all of a run: it claims the output directory, and answers for the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from das_lm.errors import UserError
from das_lm.run.directory import locked


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
