"""A trace as a client has it: what the server says of a request, and the request's numbers as tables and as a picture.

Owns `Trace`. The tables are those of `glassbox.capture`, made by the same code of the same arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassbox.export.trace_tables import TraceTables, trace_tables
from glassbox.store.trace_record import RequestTrace

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Trace:
    """A traced request.

    The tables have the columns of `glassbox.Capture`'s, of one request: `request` is 0, and `sample` the choice that
    was asked for. They need pyarrow, the picture matplotlib (both extra `tables`).

    Attributes:
        document: what the server answers for it (docs/requests.md), without a choice of layers, heads and tokens.
        record: its arrays, as float32: those of the chosen layers and heads.
        choice: which of the response's.
    """

    document: Mapping[str, Any]
    record: RequestTrace
    choice: int = 0

    @property
    def request_id(self) -> str:
        """As the API's response has it, with the number of a completion's prompt or of a response's turn."""
        return self.record.request_id

    @property
    def status(self) -> str:
        """finished, aborted, or lost: its worker ended first."""
        return self.record.status

    @property
    def signals(self) -> Mapping[str, Any]:
        """Of the whole request, by name; None is "no value"."""
        signals: Mapping[str, Any] = self.document["signals"]
        return signals

    @property
    def scores(self) -> Mapping[str, Any]:
        """What the server's probes (`probes`) and the signals that were asked for (`signals`) say; `final` is false
        while more may come, since the exporter scores a request after its end."""
        scores: Mapping[str, Any] = self.document.get("scores") or {}
        return scores

    @property
    def text(self) -> Sequence[str] | None:
        """Text of each token of prompt and answer from the first shown one on; None where the server shows none."""
        text = self.document.get("text")
        return None if text is None else list(text["tokens"])

    @property
    def tokens(self) -> "pa.Table":
        """A line for each measured token, numbers as means over layers and heads; see `TraceTables`."""
        return self.tables.tokens

    @property
    def rows(self) -> "pa.Table":
        """A line for each measured token, layer and head."""
        return self.tables.rows

    @property
    def top_k(self) -> "pa.Table":
        """A line for each of a row's most attended positions; empty unless `glassbox_top_k` asked for them."""
        return self.tables.top_k

    @property
    def spans(self) -> "pa.Table":
        """A line for each row and span; empty unless `glassbox_spans` asked for them."""
        return self.tables.spans

    @property
    def attention(self) -> "pa.Table":
        """A line for each row, with its whole attention; empty unless `glassbox_rows` asked for it."""
        return self.tables.attention

    @cached_property
    def tables(self) -> TraceTables:
        """All of them.

        Raises:
            ImportError: pyarrow is missing.
        """
        return trace_tables([[self.record]], "a trace's table", first_sample=self.choice)

    def plot(self, path: str | Path | None = None, statistic: str = "entropy_ratio") -> "Figure":
        """A heat map: which tokens each generated token attends to, if `glassbox_rows` asked for that; else a
        statistic of the generated tokens by layer and head.

        Args:
            path: where it is written as well, as PNG or SVG by its suffix.
            statistic: of the second kind.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there is no such statistic or no row that it could show, or the path has another suffix.
        """
        try:
            from glassbox.view.charts import save
            from glassbox.view.trace_chart import trace_chart
        except ImportError as error:
            raise ImportError("plot needs matplotlib; pip install 'vllm-glassbox[tables]'") from error
        figure = trace_chart(self.record, statistic, self._words())
        if path is not None:
            save(figure, Path(path))
        return figure

    def _words(self) -> Mapping[int, str]:
        """Texts by position, as far as they are known."""
        text = self.document.get("text") or {"first_position": 0, "tokens": ()}
        return dict(enumerate(text["tokens"], start=text["first_position"]))
