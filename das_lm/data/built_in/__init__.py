"""Built-in corpora: three small domains of true facts, written on the fly from the tables in this folder.

The text needs no download and no licence but the project's own. `documents` gives training and held-out text, `cloze`
gives questions about the facts, and `BASE_MODEL` and `CAUSAL_MODEL` are tiny language models, a masked and a causal
one, that know the domain `general`.
"""

from pathlib import Path

DOMAINS: tuple[str, ...] = ("general", "bio", "cs")
SPLITS: tuple[str, ...] = ("train", "held_out")
BASE_MODEL: Path = Path(__file__).parent / "base_model"
CAUSAL_MODEL: Path = Path(__file__).parent / "causal_model"
#: The questions as tasks of lm-eval: `das_lm_general`, `das_lm_bio`, `das_lm_cs`.
HARNESS_TASKS: Path = Path(__file__).parent / "harness"
#: What they are called where a model is named.
MODELS: dict[str, Path] = {"built-in": BASE_MODEL, "built-in-causal": CAUSAL_MODEL}

__all__ = ["BASE_MODEL", "CAUSAL_MODEL", "DOMAINS", "HARNESS_TASKS", "MODELS", "SPLITS", "cloze", "documents"]


def documents(domain: str, split: str) -> list[dict]:
    """The documents of a built-in domain, the same on every machine.

    Args:
        domain: One of `DOMAINS`.
        split: "train" or "held_out". Held-out documents state the facts of the training text in sentences that do not
            occur there: each (fact, sentence pattern) pair belongs to one split.

    Returns:
        Dicts with "id" (like "bio-train-000001") and "text" (3 to 8 sentences).

    Raises:
        ValueError: The domain or split does not exist.
    """
    from .generator import compose

    _check("domain", domain, DOMAINS)
    _check("split", split, SPLITS)
    return [
        {"id": f"{domain}-{split}-{number:06d}", "text": document.text}
        for number, document in enumerate(compose(domain, split), start=1)
    ]


def cloze(domain: str) -> list[dict]:
    """Questions about the facts of a built-in domain, asked with held-out sentences.

    Args:
        domain: One of `DOMAINS`.

    Returns:
        Dicts with "text" (a sentence with one blank "____"), "answer" (what stands in the blank) and "choices" (values
        of the same relation in a random order, the answer among them; exactly one is right).

    Raises:
        ValueError: The domain does not exist.
    """
    from .generator import questions

    _check("domain", domain, DOMAINS)
    return [
        {"text": question.text, "answer": question.fact.value, "choices": list(question.choices)}
        for question in questions(domain)
    ]


def _check(what: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        raise ValueError(f"no built-in {what} {name!r}; valid names: {', '.join(valid)}")
