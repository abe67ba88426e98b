"""What came of an incident, and its table. Owns the numbers that are shown and their wording; runs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.config.load import BaselineConfig
from glassbox.core.output_checks import KV_TENSORS, LayerChecks, LayerState
from glassbox.core.statistics import INDEX, PHASES
from glassbox.signals.baseline import Baseline
from glassbox.signals.drift_watch import COMPARED, compare, expected_counts
from glassbox.store.merge import MergedEngine
from glassbox.view.text import format_value

# Of the alerts that compare a layer's mean with its history.
_MEAN_OF: Final = {"SinkLost": ("sink_ratio", "sink_floor"), "EntropyCollapse": ("entropy_ratio", "entropy_floor")}
_COLUMNS: Final = [INDEX[statistic.name] for statistic in COMPARED]
_MIN_ROWS: Final = BaselineConfig().min_rows
_ANSWER_CHARACTERS: Final = 90


@dataclass(frozen=True, eq=False)
class Rows:
    """What one engine has measured over some time; arrays as in `MergedEngine`.

    Attributes:
        checks: of the layers' outputs and caches, as they were in the end; None of a baseline.
    """

    layers: tuple[int, ...]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    checks: LayerChecks | None = None

    @classmethod
    def of(cls, engines: Sequence[MergedEngine]) -> "Rows | None":
        """Of a server with one engine; None before its first snapshot."""
        if not engines:
            return None
        [engine] = engines
        return cls(engine.layers, engine.counts, engine.sums, engine.rows, engine.checks)

    def since(self, before: "Rows | None") -> "Rows":
        """What came after `before`."""
        if before is None:
            return self
        since = (self.counts - before.counts, self.sums - before.sums, self.rows - before.rows)
        return Rows(self.layers, *since, self.checks)

    def head_means(self, statistic: str) -> npt.NDArray[np.float64]:
        """[L, H, 2]; NaN without rows."""
        column = INDEX[statistic]
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sums[..., column] / self.counts[..., column, :].sum(axis=-1)

    def layer_means(self, statistic: str) -> npt.NDArray[np.float64]:
        """[L, 2]; NaN without rows."""
        column = INDEX[statistic]
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sums[..., column].sum(axis=1) / self.counts[..., column, :].sum(axis=(1, -1))


@dataclass(frozen=True)
class Outcome:
    """Of the healthy model (`alert` is None) or of a fault.

    Attributes:
        name, what: of the fault.
        alert: that must fire.
        answer: what a user got.
        fired: seconds after the first request, by alert, in the order of firing.
        rows: measured by then, by alert.
        measured: while it was watched.
        healthy: the healthy model's outcome; baseline: its baseline.
        skipped: why this machine can't have the fault.
    """

    name: str
    what: str
    alert: str | None
    answer: str = ""
    fired: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    measured: Rows | None = None
    healthy: "Outcome | None" = None
    baseline: Baseline | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Finding:
    """Where something changed most: what it was before and is now.

    Attributes:
        statistic: whose means these are, or what else.
        phase, head: None if it is of both phases, or of the whole layer.
        note: what else there is to say of it.
    """

    statistic: str
    phase: str | None
    layer: int
    head: int | None
    before: float
    now: float
    note: str = ""

    def __str__(self) -> str:
        place = f"layer {self.layer}" + ("" if self.head is None else f" head {self.head}")
        where = ", ".join(filter(None, (self.statistic, self.phase, place)))
        text = f"{where}: {format_value(self.before)} -> {format_value(self.now)}"
        return f"{text} ({self.note})" if self.note else text


def finding(outcome: Outcome) -> Finding | None:
    """What the outcome's alert looks at, where it changed most; None if nothing was measured.

    Before: the healthy model with the same requests; of itself, its baseline.
    """
    if outcome.measured is None or outcome.baseline is None:
        return None
    saved = outcome.baseline
    healthy = Rows(saved.layers, saved.counts, saved.sums, saved.rows)
    if outcome.healthy is not None and outcome.healthy.measured is not None:
        healthy = outcome.healthy.measured
    if outcome.alert in _OF_CHECKS:
        before, now = healthy.checks, outcome.measured.checks
        return None if before is None or now is None else _OF_CHECKS[outcome.alert](before, now, healthy.layers)
    if outcome.alert in _MEAN_OF:
        return _lowest_mean(healthy, outcome.measured, *_MEAN_OF[outcome.alert])
    return _largest_index(healthy, outcome.measured, saved)


def _lowest_mean(healthy: Rows, now: Rows, statistic: str, floor: str) -> Finding | None:
    before, after = healthy.layer_means(statistic), now.layer_means(statistic)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(before > getattr(RuleSettings(), floor), after / before, np.nan)
    if np.isnan(ratio).all():
        return None
    layer, p = np.unravel_index(np.nanargmin(ratio), ratio.shape)
    where = (statistic, PHASES[p].value, now.layers[layer], None)
    return Finding(*where, float(before[layer, p]), float(after[layer, p]))


def _largest_index(healthy: Rows, now: Rows, baseline: Baseline) -> Finding | None:
    psi = compare(expected_counts(baseline, now.layers), now.counts[:, :, :, _COLUMNS], _MIN_ROWS).psi
    counting = [statistic.name in RuleSettings().drift_statistics for statistic in COMPARED]
    psi = np.where(counting, psi, np.nan)
    if np.isnan(psi).all():
        return None
    layer, head, p, e = np.unravel_index(np.nanargmax(psi), psi.shape)
    name = COMPARED[e].name
    before, after = (float(rows.head_means(name)[layer, head, p]) for rows in (healthy, now))
    note = f"index {psi[layer, head, p, e]:.2f}"
    return Finding(name, PHASES[p].value, now.layers[layer], int(head), before, after, note)


def _wrong_output(before: LayerChecks, now: LayerChecks, layers: Sequence[int]) -> Finding | None:
    """The layer that was not reproduced, the worst if there are several."""
    ratio = np.where(now.state == LayerState.FAILED, now.worst_ratio, np.nan)
    if np.isnan(ratio).all():
        return None
    layer = int(np.nanargmax(ratio))
    ratios = float(before.worst_ratio[layer]), float(ratio[layer])
    return Finding(
        "output error", None, layers[layer], int(now.worst_head[layer]), *ratios, "1 is what rounding explains"
    )


def _lossy_cache(before: LayerChecks, now: LayerChecks, layers: Sequence[int]) -> Finding | None:
    """The layer whose keys or values the cache changes most."""
    if np.isnan(now.kv_error).all():
        return None
    layer, which = (int(n) for n in np.unravel_index(np.nanargmax(now.kv_error), now.kv_error.shape))
    errors = float(before.kv_error[layer, which]), float(now.kv_error[layer, which])
    note = f"{now.kv_saturated[layer, which]:.0%} cut off"
    return Finding(f"cache error of {KV_TENSORS[which]}s", None, layers[layer], None, *errors, note)


# Of the alerts about what checks have found.
_OF_CHECKS: Final = {"OutputWrong": _wrong_output, "KvCacheQuantization": _lossy_cache}


def alerts_text(outcome: Outcome) -> str:
    """The outcome's alert and when it fired; then the others."""
    if outcome.skipped is not None:
        return f"left out: {outcome.skipped}"
    names = sorted(outcome.fired, key=lambda name: (name != outcome.alert, outcome.fired[name]))
    lines = [f"{name}: {outcome.fired[name]:.0f} s, {outcome.rows[name]:,} rows" for name in names]
    if outcome.alert is not None and outcome.alert not in outcome.fired:
        lines.insert(0, f"{outcome.alert} did not fire")
    return "\n".join(lines) or "none"


def _short(text: str) -> str:
    flat = " ".join(text.split()) or "(an empty answer)"
    return flat if len(flat) <= _ANSWER_CHARACTERS else f"{flat[: _ANSWER_CHARACTERS - 1]}…"


def report(outcomes: Sequence[Outcome]) -> RenderableType:
    """The table: fault, what a user sees, what glassbox sees, which alert and how soon."""
    table = Table(title="Incidents", box=box.SIMPLE_HEAD, show_lines=True, title_justify="left", pad_edge=False)
    headings = {"what is wrong": 5, "what a user sees": 4, "what glassbox sees": 5, "alerts (Glassbox...)": 7}
    for name, ratio in headings.items():
        table.add_column(name, ratio=ratio, overflow="fold")
    for outcome in outcomes:
        found = finding(outcome)
        seen = "" if found is None else str(found)
        missed = outcome.skipped is None and (outcome.alert is None) == bool(outcome.fired)
        style = "red" if missed or (outcome.alert or "") not in {"", *outcome.fired} else ""
        table.add_row(
            Text.assemble((outcome.name, "bold"), f"\n{outcome.what}"),
            Text("" if outcome.skipped else _short(outcome.answer)),
            Text(seen),
            Text(alerts_text(outcome), style=style),
        )
    note = Text(
        "seconds and rows (a token in one layer and one head) since the first request; the rules are the shipped ones "
        "with shorter windows, and outputs are checked every few seconds",
        style="dim",
    )
    return Group(table, note)
