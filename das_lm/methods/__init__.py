"""Continual-learning methods: one file each, one small base class. They know torch and the units, nothing else."""

from collections.abc import Iterable

from das_lm.methods.agem import AGEM
from das_lm.methods.base import Method
from das_lm.methods.das import DAS
from das_lm.methods.ema import EMA
from das_lm.methods.ewc import EWC
from das_lm.methods.gem import GEM
from das_lm.methods.interpolate import Interpolate
from das_lm.methods.joint import Joint
from das_lm.methods.l2 import L2
from das_lm.methods.lwf import LwF
from das_lm.methods.mas import MAS
from das_lm.methods.naive import Naive
from das_lm.methods.ncl import NCL
from das_lm.methods.replay import Replay
from das_lm.methods.rwalk import RWalk
from das_lm.methods.scp import SCP
from das_lm.methods.self_replay import SelfReplay
from das_lm.methods.si import SI
from das_lm.methods.spg import SPG

#: Name in recipes and on the command line -> method.
METHODS: dict[str, type[Method]] = {
    "agem": AGEM,
    "das": DAS,
    "ema": EMA,
    "ewc": EWC,
    "gem": GEM,
    "interpolate": Interpolate,
    "joint": Joint,
    "l2": L2,
    "lwf": LwF,
    "mas": MAS,
    "naive": Naive,
    "ncl": NCL,
    "replay": Replay,
    "rwalk": RWalk,
    "scp": SCP,
    "self_replay": SelfReplay,
    "si": SI,
    "spg": SPG,
}


def files_with_training_text(methods: Iterable[Method] = ()) -> list[str]:
    """Patterns of the files, in any folder, in which the methods of the package, and these, keep training text."""
    known = [*(kind() for kind in METHODS.values()), *methods]
    names = {one.file_name for one in known if one.holds_training_text}
    return [pattern for name in sorted(names) for pattern in (name, f"*/{name}")]


def without_effect(methods: Iterable[Method]) -> str | None:
    """What to tell a person of methods, attached before a domain, that do nothing in it: they hold on to earlier
    domains, and there is none."""
    names = {kind: name for name, kind in METHODS.items()}
    idle = [one for one in methods if one.needs_domain_ends and not one.protects_base and not one.state_dict()]
    if not idle:
        return None
    protecting = [name for name, kind in METHODS.items() if kind.protects_base]
    return (
        f"{', '.join(names.get(type(one), type(one).__name__) for one in idle)}: no effect, for nothing was learned "
        f"before that it could hold on to. Methods that protect the base model: {', '.join(protecting)}"
    )


def unread_options(given: Iterable[str], methods: Iterable[str]) -> list[str]:
    """Those of the given options that are options of methods, but of none of these."""
    read = {option for name in methods for option in METHODS[name].options}
    known = {option for kind in METHODS.values() for option in kind.options}
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
    "Interpolate",
    "Joint",
    "LwF",
    "Method",
    "Naive",
    "RWalk",
    "Replay",
    "SelfReplay",
    "files_with_training_text",
    "unread_options",
    "without_effect",
]
