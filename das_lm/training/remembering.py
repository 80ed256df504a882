"""What users say that stands for the model's past, as methods work with it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import DatasetDict

from das_lm.errors import UserError, as_user_error
from das_lm.methods import Method
from das_lm.methods.memory import check_blocks
from das_lm.methods.remembered import Remembered, Source
from das_lm.methods.writing import load_written
from das_lm.training.inputs import Rows, Text

if TYPE_CHECKING:
    from das_lm.training.config import ContinualConfig

logger = logging.getLogger(__name__)


def remembered_by(
    remember: Any, methods: Sequence[Method], inputs: Rows | Text, args: ContinualConfig
) -> Remembered | None:
    """
    Args:
        remember: as for [`ContinualTrainer`].
        methods: those that may need it, or have it from an earlier trainer.
        inputs: what makes rows of text.

    Raises:
        UserError: it is none of what it may be, or a module is to write text.
    """
    for_all = True
    if remember is None:
        earlier = [one.trainer.remembered for one in methods if getattr(one, "trainer", None)]
        if found := [one for one in earlier if one is not None]:
            return found[0]
        if isinstance(inputs, Rows) or not any(one.needs_remembered for one in methods):
            return None  # for a module, the method itself refuses
        names = ", ".join(one.name for one in methods if one.needs_remembered)
        logger.info("%s: nothing is given to remember: the model writes it (remember='self')", names)
        remember, for_all = "self", False
    if isinstance(remember, Remembered):
        return remember
    if not isinstance(remember, Mapping) or isinstance(remember, DatasetDict):
        remember = {"self" if isinstance(remember, str | int) else "remembered": remember}
    sources = {}
    for name, given in remember.items():
        data, weight, budget = (
            (*given, None)[:3] if isinstance(given, tuple) and len(given) > 1 else (given, 1.0, None)
        )
        for what, value in (("weight", weight), ("budget", 1 if budget is None else budget)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise UserError(f"remember: '{name}': its {what} is {value!r}; write a number of at least 0")
        sources[name] = _source(name, data, inputs, args)
        sources[name].weight, sources[name].budget = float(weight), budget
    if not sum(source.weight for source in sources.values()):
        raise UserError("remember: no source has a weight above 0; leave remember out, or name text")
    return Remembered(sources, for_all)


def _source(name: str, data: Any, inputs: Rows | Text, args: ContinualConfig) -> Source:
    if data == "self" if isinstance(data, str) else isinstance(data, int):
        count = args.memory_size if data == "self" else data
        if isinstance(data, bool) or count < 1:
            raise UserError(f"remember: '{name}': {data!r} is no number of rows to write; write 512, for example")
        if isinstance(inputs, Rows):
            raise UserError(f"remember: '{name}': a module cannot write text; give rows of data")
        return Source(None, write=count, is_written=True)
    if isinstance(data, Path) and isinstance(inputs, Text):
        rows, _ = load_written(data, inputs.tokenizer)
        with as_user_error(f"remember: '{name}': {data}"):
            check_blocks(rows, inputs.known, inputs.limit)
        return Source(rows, is_written=True)
    if isinstance(data, str | Path):
        raise UserError(
            f"remember: '{name}': '{data}' is neither 'self', a number of rows to write, nor data; those of files are "
            f"Domain('{name}', data='{data}').load().train"
        )
    rows = inputs.training(data, f"remember['{name}']")
    if rows is None or not len(rows) or len(rows.domains) != 1:
        raise UserError(f"remember: '{name}': there is nothing in it; leave it out, or give text")
    return Source(next(iter(rows.domains.values())))
