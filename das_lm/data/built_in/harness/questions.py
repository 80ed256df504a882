"""The built-in cloze questions as multiple choice, for the YAML files beside this one."""

from functools import partial
from typing import Any

from datasets import Dataset

from das_lm.data import built_in


def _questions(domain: str, **_: Any) -> dict[str, Dataset]:
    """Rows of `before` (the text before the blank), `fillings` (what follows, with every choice) and `answer`."""
    rows = []
    for question in built_in.cloze(domain):
        before, after = question["text"].split("____")
        opening = before.rstrip()
        gap = before[len(opening) :]
        fillings = [gap + choice + after for choice in question["choices"]]
        rows.append({"before": opening, "fillings": fillings, "answer": question["choices"].index(question["answer"])})
    return {"test": Dataset.from_list(rows)}


general, bio, cs = (partial(_questions, domain) for domain in built_in.DOMAINS)
