"""Write the README's table of methods from what they declare: ``python scripts/method_table.py``."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from os.path import commonprefix
from pathlib import Path

from das_lm.methods import BUILT_IN, Method

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- methods, by scripts/method_table.py -->", "<!-- end of methods -->"
HEADER = "| method | what it does | arguments | first domain | LoRA | FSDP2 |\n| --- | --- | --- | --- | --- | --- |"


def what(kind: type[Method]) -> str:
    """The first line of the method's file, without its name, and with a link to its paper."""
    line = (sys.modules[kind.__module__].__doc__ or "").strip().partition("\n")[0].rstrip(".")
    line = re.sub(r"^[\w -]+: ", "", line)
    line = re.sub(r"openreview (\w+)", r"[openreview](https://openreview.net/forum?id=\1)", line)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", line)


def arguments(kind: type[Method]) -> str:
    """Its arguments; those that begin alike as one."""
    alike = defaultdict(list)
    for name in kind.options():
        alike[name.partition("_")[0]].append(name)
    shown = (names[0] if len(names) == 1 else f"{commonprefix(names).rstrip('_')}_*" for names in alike.values())
    return ", ".join(f"`{name}`" for name in shown)


def table() -> str:
    """The rows, between the markers."""
    rows = []
    for kind in BUILT_IN:
        name = f"[`{kind.name}`](das_lm/methods/{kind.__module__.rpartition('.')[2]}.py)"
        flags = (kind.protects_base, kind.works_with_adapters, kind.works_sharded)
        cells = [name, what(kind), arguments(kind), *("yes" if flag else "" for flag in flags)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([BEGIN, HEADER, *rows, END])


def replaced(text: str) -> str:
    """The README with the table of today."""
    before, _, rest = text.partition(BEGIN)
    return before + table() + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
