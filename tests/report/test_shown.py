"""The results of a run in a notebook."""

import numpy as np
import pytest
from matplotlib.figure import Figure

import das_lm


def test_a_run_as_frame_table_and_figure(finished):
    results = das_lm.Results.load(str(finished))
    frame = results.to_pandas("accuracy")
    assert list(frame.index) == ["base", "bio", "cs"] and list(frame.columns) == ["old", "bio", "cs"]
    assert np.array_equal(frame, results.matrix("accuracy"))
    html = results._repr_html_()
    assert html.count("<tr>") == 4 and html.count('class="strong"') == 2 and f"{results.matrix()[0, 0]:.3f}" in html
    assert isinstance(results.plot(), Figure)
    with pytest.raises(das_lm.UserError, match="there is no 'matrix'; there are held-out-loss, matrix-loss"):
        results.plot("matrix")
    with pytest.raises(das_lm.UserError, match="there is no 'los'"):
        results.to_pandas("los")


def test_no_name_is_markup():
    scores = {"<i>": {"loss": 1.0, "tokens": 1, "documents": 1}}
    results = das_lm.Results({"<i>": None}, [{"name": "<b>", "scores": scores}])
    assert "<i>" not in results._repr_html_() and "<b>" not in results._repr_html_()
