"""What a rule is, and the one place with every number of the rules."""

from dataclasses import dataclass, field
from typing import Final, Literal

Severity = Literal["critical", "warning"]
ENGINE_LABELS: Final = ("job", "instance", "model_name", "engine")
PHASE_LABELS: Final = (*ENGINE_LABELS, "phase")
LAYER_LABELS: Final = (*PHASE_LABELS, "layer")
# Of what a server shows of itself, which is no engine's.
SERVER_LABELS: Final = ("job", "instance")
# Of a history: not the instance, because a rollout brings new ones, and that is when a comparison matters most.
MODEL_LABELS: Final = ("job", "model_name", "phase")
RUNBOOKS: Final = "docs/runbooks"
# Where it is, in an alert's words.
WHERE: Final = "{{ $labels.model_name }}, engine {{ $labels.engine }} at {{ $labels.instance }}"


@dataclass(frozen=True)
class RuleSettings:
    """Every number of the rules; times as Prometheus writes them.

    Attributes:
        window: of which a mean is taken.
        window_interval: how often it is evaluated.
        history: what a window is compared against.
        history_offset: the most recent part that is left out of it, so that a fault doesn't dilute its own yardstick.
        history_interval: how often the history is evaluated.
        min_history: windows of a model that the history must have, else nothing is compared (60: an hour).
        min_rows: that a window of one layer and phase must have (all heads together), else it says nothing.
        entropy_factor, entropy_floor: collapse is below factor x history, if the history is above the floor (a layer
            that always looks at one key can't collapse).
        sink_factor, sink_floor: lost is below factor x history, if the history is above the floor.
        logit_factor, logit_floor: growth is above factor x the history's largest, and above the floor.
        logit_limit: bound of a bucket of max_logit (QK-clip watches 100).
        logit_limit_share: share of a layer's rows that may be above it.
        saturation_bound: bound of a bucket of top1_ratio; a row above it is saturated.
        saturation_rise: by how much the share of saturated rows may rise over the history.
        lookback_factor: low is below factor x history.
        drift_psi: population stability index of a layer's worst head above which it has drifted from the baseline. By
            convention 0.25 is a major change (Siddiqi 2006); the worst of many heads needs more room, because the mix
            of requests changes from hour to hour.
        drift_statistics: those that count: the others follow the lengths of prompts and answers.
        kv_error: relative error (root mean square) of the keys or values in a layer's KV cache that is too large.
            Rounding to the 3 mantissa bits of FP8 e4m3 makes about 2.6 %, to the 2 of e5m2 about 5 %; three times the
            latter is what a wrong scale makes, not rounding.
        kv_saturated: share of a layer's cached elements at the end of their type's range that is too large: a scale
            that fits cuts off next to nothing.
        overhead_budget: share of time that measuring may take, as `sampling.overhead_budget`.
        sampling_window: in which a busy server must have measured something.
        min_expected_samples: sampled steps that were to be expected in it, else its silence says nothing.
        stale_intervals, stale_s: a snapshot or a sink's last success is old after so many intervals of the exports and
            so many seconds more: an idle worker writes every 15 seconds, a busy machine may be late.
        missed: for so long scrapes may be missed without an alert about silence beginning to wait anew.
        hold: the `for` of each alert, by its name without the prefix.
    """

    window: str = "10m"
    window_interval: str = "1m"
    history: str = "1d"
    history_offset: str = "1h"
    history_interval: str = "2m"  # well below the 5 minutes after which Prometheus takes a series for gone
    min_history: int = 60
    min_rows: int = 1000
    entropy_factor: float = 0.5
    entropy_floor: float = 0.05
    sink_factor: float = 0.3
    sink_floor: float = 0.1
    logit_factor: float = 1.5
    logit_floor: float = 30.0
    logit_limit: float = 100.0
    logit_limit_share: float = 0.01
    saturation_bound: float = 0.99
    saturation_rise: float = 0.25
    lookback_factor: float = 0.5
    drift_psi: float = 0.5
    drift_statistics: tuple[str, ...] = ("entropy_ratio", "max_logit", "top1_ratio", "sink_ratio")
    kv_error: float = 0.15
    kv_saturated: float = 0.01
    overhead_budget: float = 0.01
    sampling_window: str = "30m"
    min_expected_samples: int = 20
    stale_intervals: int = 3
    stale_s: float = 60.0
    missed: str = "5m"
    hold: dict[str, str] = field(
        default_factory=lambda: {
            "OutputWrong": "1m",
            "NonFiniteRows": "1m",
            "KvCacheQuantization": "15m",
            "EntropyCollapse": "10m",
            "SinkLost": "10m",
            "LogitGrowth": "15m",
            "LogitLimit": "5m",
            "Saturation": "15m",
            "LookbackLow": "30m",
            "Drift": "10m",
            "ConfigReloadFailed": "1m",
            "NotSampling": "5m",
            "NothingObserved": "5m",
            "NotCertified": "15m",
            "OverheadAboveBudget": "15m",
            "Errors": "5m",
            "SnapshotStale": "2m",
            "ExporterDown": "2m",
            "SinkFailing": "5m",
        }
    )


@dataclass(frozen=True)
class Recording:
    """A recording rule. `labels` are those of its series, besides those that Prometheus adds from outside."""

    record: str
    expr: str
    comment: str
    labels: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name of what it makes."""
        return self.record


@dataclass(frozen=True)
class Alert:
    """An alerting rule.

    Attributes:
        name: without the prefix `Glassbox`.
        summary, found: with Prometheus' templates; one line for the pager, and the value that was found.
        when: condition in words.
    """

    name: str
    severity: Severity
    expr: str
    summary: str
    found: str
    when: str

    @property
    def title(self) -> str:
        """Name of the alert in Prometheus."""
        return f"Glassbox{self.name}"

    @property
    def runbook(self) -> str:
        """Path of its page in the repository."""
        return f"{RUNBOOKS}/{self.title}.md"


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after another; without interval as often as Prometheus' default."""

    name: str
    interval: str | None
    rules: tuple[Recording | Alert, ...]
