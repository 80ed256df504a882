"""Continual-learning methods: one file each, one small base class. They know torch and the units, nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from das_lm.errors import UserError
from das_lm.methods.agem import AGEM
from das_lm.methods.anchor import Anchor
from das_lm.methods.arguments import knob
from das_lm.methods.base import Method
from das_lm.methods.das import DAS
from das_lm.methods.ema import EMA
from das_lm.methods.ewc import EWC
from das_lm.methods.gate import Gate
from das_lm.methods.gem import GEM
from das_lm.methods.interpolate import Interpolate
from das_lm.methods.joint import Joint
from das_lm.methods.l2 import L2
from das_lm.methods.lwf import LwF
from das_lm.methods.mas import MAS
from das_lm.methods.naive import Naive
from das_lm.methods.ncl import NCL
from das_lm.methods.pull_back import PullBack
from das_lm.methods.replay import Replay
from das_lm.methods.rwalk import RWalk
from das_lm.methods.scp import SCP
from das_lm.methods.self_replay import SelfReplay
from das_lm.methods.si import SI
from das_lm.methods.spg import SPG

logger = logging.getLogger(__name__)

BUILT_IN = (
    *(AGEM, Anchor, DAS, EMA, EWC, Gate, GEM, Interpolate, Joint, L2, LwF),
    *(MAS, Naive, NCL, PullBack, Replay, RWalk, SCP, SelfReplay, SI, SPG),
)
ENTRY_POINTS = "das_lm.methods"


class Methods(Mapping[str, type[Method]]):
    """
    Name in recipes and on the command line -> method: the built-in ones, and those that installed packages bring as
    entry points of the group `das_lm.methods`, which are imported when they are asked for.

    Raises:
        UserError: the one that is asked for cannot be imported, or is no method. A list of all leaves it out.
    """

    def __init__(self, built_in: Iterable[type[Method]]):
        self._kinds = {kind.name: kind for kind in built_in}
        self._broken: dict[str, str] = {}

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return {one.name: one for one in entry_points(group=ENTRY_POINTS) if one.name not in self._kinds}

    def _load(self, name: str) -> None:
        point = self._points[name]
        where = f"method '{name}', the entry point {point.value} of the package {point.dist and point.dist.name}"
        try:
            kind = point.load()
        except Exception as error:  # whatever another package does
            self._broken[name] = f"{where}, cannot be imported: {type(error).__name__}: {error}"
        else:
            if not (isinstance(kind, type) and issubclass(kind, Method)):
                self._broken[name] = f"{where}, is no subclass of das_lm.methods.Method"
            elif kind.name != name:
                self._broken[name] = f"{where}, has the name '{kind.name}'; write the same name in both places"
            else:
                self._kinds[name] = kind

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._kinds and name not in self._broken and name in self._points:
            self._load(name)
        if name in self._broken:
            raise UserError(self._broken[name])
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        for name in self._points:
            if name not in self._kinds and name not in self._broken:
                self._load(name)
                if name in self._broken:
                    logger.warning(self._broken[name])
        return iter(sorted(self._kinds))

    def __len__(self) -> int:
        return sum(1 for _ in self)


METHODS = Methods(BUILT_IN)


def files_with_training_text(methods: Iterable[Method] = ()) -> list[str]:
    """Patterns of the files, in any folder, in which the methods of the package, and these, keep training text."""
    known = [*(kind() for kind in METHODS.values()), *methods]
    names = {one.file_name for one in known if one.holds_training_text}
    return [pattern for name in sorted(names) for pattern in (name, f"*/{name}")]


def without_effect(methods: Iterable[Method]) -> str | None:
    """What to tell a person of methods, attached before a domain, that do nothing in it: they hold on to earlier
    domains, and there is none."""
    idle = [
        one
        for one in methods
        if one.needs_domain_ends
        and not (one.protects_base or one.state_dict())
        and not (_has_past(one) and (one.consolidates_base or one.draws_remembered))
    ]
    if not idle:
        return None
    protecting = [name for name, kind in METHODS.items() if kind.protects_base]
    return (
        f"{', '.join(one.name for one in idle)}: no effect, for nothing was learned before that it could hold on to; "
        f"give it something with remember. Methods that protect the base model without: {', '.join(protecting)}"
    )


def _has_past(method: Method) -> bool:
    remembered = method.trainer.remembered
    return remembered is not None and remembered.for_all


def unread_options(given: Iterable[str], methods: Iterable[str]) -> list[str]:
    """Those of the given options that are arguments of methods, but of none of these."""
    read = {option for name in methods for option in METHODS[name].options()}
    known = {option for kind in METHODS.values() for option in kind.options()}
    return [option for option in dict.fromkeys(given) if option in known - read]


__all__ = [
    "AGEM",
    "DAS",
    "EMA",
    "EWC",
    "GEM",
    "L2",
    "MAS",
    "METHODS",
    "NCL",
    "SCP",
    "SI",
    "SPG",
    "Anchor",
    "Gate",
    "Interpolate",
    "Joint",
    "LwF",
    "Method",
    "Naive",
    "PullBack",
    "RWalk",
    "Replay",
    "SelfReplay",
    "files_with_training_text",
    "knob",
    "unread_options",
    "without_effect",
]
