"""The words of a report that need a definition, which a page shows on hover and in a list at its end."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

TERMS = {
    "gain": "How much better a domain became in the stage that learned it, on average over the learned domains.",
    "drift": "How much worse the end is than the base model on what was never learned. Positive is bad.",
    "forgetting rate": "How much worse a domain is at the end than right after its own stage, on average over the "
    "domains learned before the last stage.",
    "forgetting": "How much worse a domain is at the end than at its best since it was learned, on average over the "
    "domains learned before the last stage. Below 0, later stages helped it.",
    "backward transfer": "What later stages did to a domain after its own: above 0, they helped it.",
    "forward transfer": "What earlier stages did to a domain before its own: above 0, they helped it.",
    "nats": "The unit of losses with the natural logarithm: the mean of −ln p of what is predicted. 0.69 nats are one "
    "bit; e to the power of the loss per token is the perplexity.",
    "bits per byte": "The loss per byte of text, in bits: it does not depend on the tokenizer.",
    "top-1 accuracy": "The share of predicted tokens for which the model's most probable token is the right one.",
    "95 % interval": "Resampling the held-out documents (or over seeds, where several are compared), 95 of 100 such "
    "intervals hold the true value.",
    "plain training": "The same model, text and steps without any method (--method naive).",
    "importance": "How much a head or neuron matters to what is known, from 0 to 1: that share of its gradient is "
    "held back in the next stage.",
    "kept": "Gain less drift less forgetting: what is left at the end of what was learned, after what was lost.",
    "gradient norm": "The length of the gradient before it is clipped.",
    "learning rate": "How far a step goes; it rises at first and then falls.",
    "macro F1": "The F1 score of every class, averaged over the classes.",
    "λ": "How strongly the model is held to what it was, against what it is to learn.",
}
_MEANINGS = {term.lower(): meaning for term, meaning in TERMS.items()}
_PATTERN = re.compile(
    rf"(?<![\w&#-])(?:{'|'.join(sorted(map(re.escape, TERMS), key=len, reverse=True))})(?![\w-]|\.\w)", re.IGNORECASE
)


def defined(text: str) -> Markup:
    """Text for a page, whose terms say on hover what they mean, each where it stands first."""
    seen = set()

    def abbreviation(match: re.Match[str]) -> str:
        term = match[0].lower()
        if term in seen:
            return match[0]
        seen.add(term)
        return f'<abbr title="{escape(_MEANINGS[term])}">{match[0]}</abbr>'

    return Markup(_PATTERN.sub(abbreviation, str(escape(text))))
