"""Records every measured row of an in-process vLLM with the request it belongs to."""

from dataclasses import dataclass

import numpy as np

from glassbox.core.rows import ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_QUERY, ROW_UNCOUNTED
from tests.attached import running_observer


@dataclass(frozen=True)
class MeasuredRow:
    """One query token: statistics of all heads in the layers that were measured, [L, H, NUM_STATISTICS + 1].

    NaN where a layer has fewer heads than another.

    Attributes:
        layers: local ones, ascending.
    """

    request_id: str
    position: int
    phase: int
    stats: np.ndarray
    layers: tuple[int, ...]


class RowRecorder:
    """Listens at the two ends of the running observer's step: the chosen rows and what is accumulated.

    Rows that are only checked are in the step's list, and not among those that are accumulated.
    """

    def __init__(self) -> None:
        observer = running_observer()
        self.rows: list[MeasuredRow] = []
        # Layers of each step of which rows were accumulated.
        self.turns: list[tuple[int, ...]] = []
        self._observer = observer
        self._step: list[tuple[str, int, int]] = []
        self._layers: dict[int, np.ndarray] = {}
        measurer = observer.measurer
        begin, finish, add = measurer.begin, measurer.finish, measurer._add

        def recording_begin(rows, layers, traced, check):  # type: ignore[no-untyped-def]
            assert observer._step is not None
            runner = observer._step.runner
            batch = runner.input_batch
            starts = runner.query_start_loc.np
            computed = batch.num_computed_tokens_cpu
            self._step = [
                (
                    batch.req_ids[row[ROW_BATCH]],
                    int(computed[row[ROW_BATCH]] + row[ROW_QUERY] - starts[row[ROW_BATCH]]),
                    int(row[ROW_PHASE] & ROW_DECODE),
                )
                for row in rows
                if not row[ROW_PHASE] & ROW_UNCOUNTED
            ]
            begin(rows, layers, traced, check)

        def recording_add(layers, stats, phases, adapters):  # type: ignore[no-untyped-def]
            for layer, values in zip(layers, stats, strict=True):
                self._layers[layer] = values.copy()
            add(layers, stats, phases, adapters)

        def recording_finish():  # type: ignore[no-untyped-def]
            finish()
            if self._layers:
                layers = tuple(sorted(self._layers))
                self.turns.append(layers)
                heads = max(values.shape[1] for values in self._layers.values())
                padded = [
                    np.pad(values, ((0, 0), (0, heads - values.shape[1]), (0, 0)), constant_values=np.nan)
                    for _, values in sorted(self._layers.items())
                ]
                stacked = np.stack(padded)  # [L, R, H, S + 1]
                for i, (request, position, phase) in enumerate(self._step):
                    self.rows.append(MeasuredRow(request, position, phase, stacked[:, i], layers))
            self._step, self._layers = [], {}

        measurer.begin, measurer.finish, measurer._add = recording_begin, recording_finish, recording_add

    def take(self) -> list[MeasuredRow]:
        """The rows recorded since the last call."""
        rows, self.rows = self.rows, []
        return rows
