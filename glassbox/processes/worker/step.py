"""One engine step of a worker, from its start to its stop: what is on while it lasts, and that it is off afterwards.

Owns the life cycle alone: `start`, then what the step does, then `stop`, and `fail` wherever something goes wrong in
between. However it ends, nobody listens any more, the measurer has no rows, and the cost is known. Which rows are
measured is decided in `observer.py`.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from glassbox.adapter.protocols import PreparedBatch, Runner
from glassbox.adapter.runner import Batch
from glassbox.adapter.scheduler import ScheduledStep
from glassbox.core.errors import ErrorCounter
from glassbox.measure.contract import Measurer, OutputCheck, StepLayers, StepTraces


class Step:
    """One real step of the engine.

    Args:
        measurer: of the worker.
        listen: told whether layers are to call `after_attention`.
        errors: counts what goes wrong.
        clock: seconds, monotonic.
        runner: vLLM's.
        scheduled: what it was told to compute.

    Attributes:
        runner, scheduled: as given.
        prepared: what the V2 runner's `prepare_inputs` has returned in this step.
        sampled: the step sampler chose it, so all its rows are candidates.
        checked: some of its rows' outputs are to be reproduced.
        has_traced: it has rows of traced requests.
        skips_traced: which the budget leaves out.
        traced: some of them are measured.
        measured: rows are to be measured: it is sampled, checked, or has rows of traced requests; False once it has
            failed.
        rows_chosen: the batch was seen, and rows were chosen of it.
        layers: local ones that are measured of the sample.
        batch, rows: as it was read, and the row list that was chosen; None as long as nothing is measured.
        started_s: when it began, by the clock.
        ran: names of the layers that have run in it.
        overhead_s: seconds that glassbox has spent in it so far.
        counted_share: of its rows, that belong to the sample.
        whole_prompts: all rows of prompts are measured in it.
    """

    def __init__(
        self,
        measurer: Measurer[Any],
        listen: Callable[[bool], None],
        errors: ErrorCounter,
        clock: Callable[[], float],
        runner: Runner,
        scheduled: ScheduledStep,
    ) -> None:
        self._measurer, self._listen, self._errors, self._clock = measurer, listen, errors, clock
        self.runner: Final = runner
        self.scheduled: Final = scheduled
        self.prepared: PreparedBatch | None = None
        self.started_s: Final = clock()
        self.sampled = self.checked = self.measured = self.rows_chosen = False
        self.has_traced = self.skips_traced = self.traced = self.whole_prompts = False
        self.ran: set[str] = set()
        self.layers: frozenset[int] = frozenset()
        self.batch: Batch | None = None
        self.rows: np.ndarray | None = None
        self.overhead_s, self.counted_share = 0.0, 1.0
        self._listening = self._begun = False

    def start(self, *, sampled: bool, traced: bool, checked: bool) -> None:
        """Listen to the layers if rows are to be measured.

        Args:
            sampled: whether the step sampler chose it.
            traced: whether it has rows of traced requests.
            checked: whether the canary wants some of its rows.
        """
        self.sampled, self.checked, self.measured = sampled, checked, sampled or traced or checked
        if self.measured:
            # Noted first: whoever fails half way may be listening.
            self._listening = True
            self._listen(True)

    def begin(self, rows: np.ndarray, layers: StepLayers, traced: StepTraces | None, check: OutputCheck | None) -> None:
        """Hand the row list to the measurer; see `Measurer.begin`."""
        self._begun = True
        self._measurer.begin(rows, layers, traced, check)

    def fail(self, stage: str, error: Exception) -> None:
        """Count the error and measure nothing more of this step."""
        self._errors.count(stage, error)
        self.measured = False
        self._close()

    def stop(self) -> None:
        """The step's `execute_model` returns or raises. Called once, whatever happened before."""
        started = self._clock()
        try:
            if self._begun:
                self._measurer.finish()
                self._begun = False
        except Exception as error:
            self.fail("end_step", error)
        finally:
            self.measured = False
            self._close()
            self.overhead_s += self._clock() - started

    def _close(self) -> None:
        """Off is off: each of the two even if the other one fails."""
        try:
            if self._begun:
                self._begun = False
                self._measurer.discard()
        except Exception as error:
            self._errors.count("discard", error)
        try:
            if self._listening:
                self._listening = False
                self._listen(False)
        except Exception as error:
            self._errors.count("listen", error)
