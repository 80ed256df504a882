"""API pages from the docstrings: ``pip install pdoc && python scripts/api_pages.py --output output/api``.

Every link of every page is followed; a broken one is named, and ends with status 1.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import sys
from pathlib import Path

import pdoc

import das_lm

#: What is not for reading: tasks and metrics that other libraries load, and the programs of the command line.
LEFT_OUT = ("das_lm.__main__", "das_lm.cli", "das_lm.data.built_in.", "das_lm.measure.metrics", "das_lm.recipes")
ANCHOR, LINK = re.compile(r'\sid="([^"]+)"'), re.compile(r'href="([^"]+)"')


def broken_links(directory: Path) -> list[str]:
    """`page: link` for every link within the pages that leads nowhere."""
    pages = {page.resolve(): page.read_text(encoding="utf-8") for page in directory.rglob("*.html")}
    anchors = {page: set(ANCHOR.findall(text)) for page, text in pages.items()}
    found = []
    for page, text in pages.items():
        for link in LINK.findall(text):
            if re.match(r"[a-z]+:", link):
                continue  # elsewhere
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if target not in anchors or (anchor and anchor not in anchors[target]):
                found.append(f"{page.relative_to(directory.resolve())}: {link}")
    return found


def unlink_undocumented(directory: Path) -> None:
    """Attributes that a class inherits from a library that documents them nowhere: text in place of links."""
    for page in directory.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        anchors = set(ANCHOR.findall(text))

        def plain(match: re.Match[str], anchors: set[str] = anchors) -> str:
            owner, _, attribute = match[1].rpartition(".")
            return match[2] if attribute and owner in anchors and match[1] not in anchors else match[0]

        page.write_text(re.sub(r'<a href="#([\w.]+)">([^<]*)</a>', plain, text), encoding="utf-8")


def main() -> int:
    """Write the pages, and check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/api"))
    args = parser.parse_args()
    for name in das_lm.__all__:  # pdoc sees what is there already; the package loads it when it is asked for
        setattr(das_lm, name, getattr(das_lm, name))
    modules = [one.name for one in pkgutil.walk_packages(das_lm.__path__, "das_lm.")]
    pdoc.render.configure(docformat="google", search=False, show_source=False)
    pdoc.pdoc("das_lm", *(one for one in modules if not one.startswith(LEFT_OUT)), output_directory=args.output)
    unlink_undocumented(args.output)
    broken = broken_links(args.output)
    print(*broken, sep="\n", end="\n" * bool(broken))
    print(f"{len(list(args.output.rglob('*.html')))} pages in {args.output}, {len(broken)} broken links")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
