"""The results of a run in a notebook: a data frame, a table, figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import escape

from das_lm.errors import UserError, did_you_mean
from das_lm.measure import results as measured
from das_lm.report.table import Table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class Results(measured.Results):
    """What [`continual_pretrain`] returns, and `Results.load(directory)` reads: the result matrix of a run."""

    def to_pandas(self, measure: str = "loss") -> pandas.DataFrame:
        """
        The matrix of a measure: a row per stage, the base model first, and a column per domain.

        Args:
            measure: one of `measures`.

        Raises:
            UserError: it was not measured.
        """
        import pandas

        if measure not in self.measures:
            raise UserError(f"measure: there is no '{measure}'.{did_you_mean(measure, self.measures)}")
        stages = pandas.Index([stage["name"] for stage in self.stages], name="after")
        return pandas.DataFrame(self.matrix(measure), index=stages, columns=list(self.columns(measure)))

    def plot(self, name: str = "matrix-loss") -> Figure:
        """
        A figure of the report.

        Args:
            name: of its file in `figures`, such as `matrix-loss`, `held-out-loss` or `loss-parts`.

        Raises:
            UserError: the run has none of that name.
        """
        from das_lm.report.drawing import drawing_style
        from das_lm.report.run_page import run_page

        with drawing_style():
            drawings = {drawing.name: drawing.figure for drawing in run_page(self, None).drawings}
        if name not in drawings:
            raise UserError(f"plot: there is no '{name}'; there are {', '.join(drawings)}")
        return drawings[name]

    def _repr_html_(self) -> str:
        from das_lm.report.drawing import drawing_style
        from das_lm.report.figures import result_matrix

        with drawing_style():
            drawing = result_matrix(self, self.measures[0])
        return f"<p>{escape(drawing.title)}</p>{Table('', drawing.tables['']).html()}"
