"""Forgetting as a module of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from das_lm.measure.results import summarize

_DESCRIPTION = """
What a model gained and lost as it learned one domain after another, from its scores on every domain after every stage.
Of all figures but `average`, transfers and gains are good when positive, forgetting and drift are bad when positive,
for losses and accuracies alike.
"""

_CITATION = """
@inproceedings{ke2023continual,
  title = {Continual Pre-training of Language Models},
  author = {Zixuan Ke and Yijia Shao and Haowei Lin and Tatsuya Konishi and Gyuhak Kim and Bing Liu},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    scores: one row per stage, the base model first: its score on every domain.
    learned: for every domain the stage (1, 2, ...) in which it was learned, or None for one that never was.
    lower_is_better: True for losses (the default), False for accuracies.

Returns:
    average, gain, backward_transfer, forward_transfer, forgetting, forgetting_rate, drift; None where there is no
    domain to take one over.

Examples:
    >>> forgetting = evaluate.load("das_lm/measure/metrics/forgetting")
    >>> rows = [[2.0, 5.0, 6.0], [2.3, 3.0, 5.5], [2.5, 3.6, 4.0]]  # general, bio, cs: losses of base, bio, cs
    >>> forgetting.compute(scores=rows, learned=[None, 1, 2])["forgetting"]
    0.6
"""


class Forgetting(evaluate.Metric):
    """See `das_lm.measure.results.summarize`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"scores": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, scores, learned, lower_is_better=True):
        return summarize(np.array(scores, dtype=float), learned, lower_is_better)
