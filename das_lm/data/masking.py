"""What makes inputs and labels of token ids, for masked and for causal language modeling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from das_lm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not predicted


class MLMMasking:
    """
    Masking for masked language modeling: of the tokens that are predicted, 80 % become the mask token, 10 % a random
    one (Devlin et al., arXiv 1810.04805). Special tokens are never predicted; at least one token always is.

    Args:
        tokenizer: with a mask token.
        probability: share of tokens that are predicted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float):
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token: masked language modeling needs one")
        self.probability = probability
        self.mask_token_id = tokenizer.mask_token_id
        self.vocabulary = len(tokenizer)
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))

    def __call__(self, input_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, shape [tokens] -> ids with masks and labels (`IGNORED` where nothing is predicted)."""
        generator = np.random.Generator(np.random.Philox(seed))
        draws = generator.random((2, len(input_ids)))
        ordinary = ~np.isin(input_ids, self.special_ids)
        predicted = (draws[0] < self.probability) & ordinary
        if not predicted.any() and ordinary.any():
            predicted[np.argmin(np.where(ordinary, draws[0], 2))] = True
        masked = np.where(predicted & (draws[1] < 0.8), self.mask_token_id, input_ids)
        replaced = predicted & (draws[1] >= 0.9)
        masked[replaced] = generator.integers(self.vocabulary, size=replaced.sum())
        return masked, np.where(predicted, input_ids, IGNORED)

    @property
    def address(self) -> tuple[Any, ...]:
        """What the masks depend on beside seed and text."""
        return self.probability, self.mask_token_id, self.vocabulary

    def predicted(self, labels: np.ndarray) -> np.ndarray:
        """Which tokens of the text are predicted, shape [tokens], bool."""
        return labels != IGNORED


class NextTokens:
    """Labels for causal language modeling: at every position the token that follows, at the last one nothing."""

    address = ("next token",)

    def __call__(self, input_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, shape [tokens] -> the same, and labels; no randomness is in it."""
        return input_ids, np.append(input_ids[1:], IGNORED)

    def predicted(self, labels: np.ndarray) -> np.ndarray:
        """Which tokens of the text are predicted, shape [tokens], bool: all but the first."""
        return np.append(False, labels[:-1] != IGNORED)


def labeling(tokenizer: PreTrainedTokenizerBase, causal: bool, mlm_probability: float) -> MLMMasking | NextTokens:
    """What makes inputs and labels of a text, for a causal or a masked language model."""
    return NextTokens() if causal else MLMMasking(tokenizer, mlm_probability)
