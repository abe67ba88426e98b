"""A server over time: from one look to the next, what came in between.

Pure: it is told what a look brought and when, and says what there is to show.
"""

import math

from glassbox.view.measured import Measured


class Watch:
    """Keeps the newest numbers and the last change.

    A server writes its numbers at intervals of its own, so most looks bring nothing new; then the last change stays.

    Attributes:
        now: the totals of the last look that succeeded; None before the first.
        rows: of which rows there is something to show: what came in the last change that had rows, at first all.
        pulse: the last change, with or without rows: steps, overhead, errors.
        changed_s: time of that change; answered_s: of the last look that succeeded.
        problem: why the last look failed, None if it didn't.
        problem_since_s: since when looks have failed.
        restarts: how often the server began anew.
    """

    def __init__(self) -> None:
        self.now: Measured | None = None
        self.rows: Measured | None = None
        self.pulse: Measured | None = None
        self.changed_s = self.answered_s = math.nan
        self.problem: str | None = None
        self.problem_since_s = math.nan
        self.restarts = 0

    def take(self, new: Measured) -> None:
        """A look that succeeded."""
        self.problem = None
        self.answered_s = new.time_s
        if self.now is None:
            self.now = self.rows = self.pulse = new
            self.changed_s = new.time_s
            return
        if new.engines.steps == self.now.engines.steps and new.rows.sum() == self.now.rows.sum():
            return
        change = new.since(self.now)
        if change.window_s is None:
            self.restarts += 1
        if change.rows.any() or change.window_s is None or self.rows is None or self.rows.detail != change.detail:
            self.rows = change
        self.now, self.pulse, self.changed_s = new, change, new.time_s

    def fail(self, problem: str, time_s: float) -> None:
        """A look that failed."""
        if self.problem is None:
            self.problem_since_s = time_s
        self.problem = problem
