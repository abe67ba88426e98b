"""The alerts: conditions in PromQL, and the words in which they are told.

Those of the output checks are in `output_alerts.py`, those of silence in `liveness_alerts.py`. What an alert means and
what to do stands in `docs/runbooks/<alert>.md`.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from glassbox.cli.dashboards.output_alerts import FIRST_NONFINITE
from glassbox.cli.dashboards.rule_model import (
    ENGINE_LABELS,
    LAYER_LABELS,
    MODEL_LABELS,
    PHASE_LABELS,
    WHERE,
    Alert,
    RuleSettings,
)

_WHERE_PHASE: Final = WHERE + " ({{ $labels.phase }})"
_LAYERS: Final = "Layers concerned: {{ $value }}."


def _layers(*conditions: str) -> str:
    """Number of layers that meet all conditions, per engine and phase."""
    joined = f"\n  and on ({', '.join((*MODEL_LABELS, 'layer'))})\n  ".join(conditions)
    return f"count by ({', '.join(PHASE_LABELS)}) (\n  {joined}\n)"


def _compared(window: str, operator: str, factor: float, history: str, labels: tuple[str, ...]) -> str:
    """A window against a multiple of its history; every engine against the one history of its model."""
    return f"{window} {operator} on ({', '.join(labels)}) group_left () ({factor} * {history})"


def _layer_compared(window: str, operator: str, factor: float, history: str) -> str:
    return _compared(window, operator, factor, history, (*MODEL_LABELS, "layer"))


def attention_alerts(s: RuleSettings, now: Mapping[str, str], then: Mapping[str, str]) -> Iterator[Alert]:
    """Of what the model looks at. `now` and `then` are the recorded names of windows and of their history."""
    nonfinite = f"increase(glassbox_attention_nonfinite_rows_total[{s.window}])"
    yield Alert(
        "NonFiniteRows",
        "critical",
        f"sum by ({', '.join(PHASE_LABELS)}) ({nonfinite}) > 0",
        summary=f"NaN or infinite attention scores in {_WHERE_PHASE}",
        found=f"Rows: {{{{ $value | humanize }}}}.{FIRST_NONFINITE}",
        when=f"Measured rows of the last {s.window} have a NaN or infinite attention score.",
    )
    yield Alert(
        "EntropyCollapse",
        "critical",
        _layers(
            _layer_compared(now["entropy"], "<", s.entropy_factor, then["entropy"]),
            f"{then['entropy']} > {s.entropy_floor}",
        ),
        summary=f"Attention entropy collapsed in {_WHERE_PHASE}",
        found=_LAYERS,
        when=f"The mean entropy of a layer is below {s.entropy_factor:g} times its mean of the last {s.history}.",
    )
    yield Alert(
        "SinkLost",
        "critical",
        _layers(
            _layer_compared(now["sink"], "<", s.sink_factor, then["sink"]),
            f"{then['sink']} > {s.sink_floor}",
        ),
        summary=f"The attention sink is lost in {_WHERE_PHASE}",
        found=_LAYERS,
        when="The first tokens get less of a layer's attention than "
        f"{s.sink_factor:g} times their mean of the last {s.history}.",
    )
    yield Alert(
        "LookbackLow",
        "warning",
        _compared(now["lookback"], "<", s.lookback_factor, then["lookback"], MODEL_LABELS),
        summary=f"The model looks less at its prompt in {WHERE}",
        found="Lookback ratio: {{ $value | humanize }}.",
        when=f"The mean lookback ratio is below {s.lookback_factor:g} times its mean of the last {s.history}.",
    )
    # At detail head there is a series per head, at layer one of the worst.
    index = f'glassbox_attention_drift_psi{{statistic=~"{"|".join(s.drift_statistics)}"}}'
    yield Alert(
        "Drift",
        "warning",
        _layers(f"max by ({', '.join(LAYER_LABELS)}) ({index}) > {s.drift_psi}"),
        summary=f"Attention is not as in the baseline in {_WHERE_PHASE}",
        found=_LAYERS,
        when=f"The population stability index of a head against the baseline is above {s.drift_psi:g}, for one of "
        f"{', '.join(s.drift_statistics)}. Needs baseline.path in glassbox.yaml.",
    )


def logit_alerts(s: RuleSettings, now: Mapping[str, str], then: Mapping[str, str]) -> Iterator[Alert]:
    """Of the model's scores: growth, an absolute limit, saturation."""
    yield Alert(
        "LogitGrowth",
        "warning",
        _layers(_layer_compared(f"({now['max']} > {s.logit_floor:g})", ">", s.logit_factor, then["max"])),
        summary=f"Attention logits grow in {_WHERE_PHASE}",
        found=_LAYERS,
        when=f"The largest logit of a layer is above {s.logit_floor:g} and above {s.logit_factor:g} times the largest "
        f"of the last {s.history}.",
    )
    yield Alert(
        "LogitLimit",
        "critical",
        _layers(f"{now['limit']} > {s.logit_limit_share}"),
        summary=f"Attention logits above {s.logit_limit:g} in {_WHERE_PHASE}",
        found=_LAYERS,
        when=f"More than {s.logit_limit_share:.0%} of a layer's rows have a logit above {s.logit_limit:g}.",
    )
    yield Alert(
        "Saturation",
        "warning",
        _layers(
            f"{now['saturated']} - on ({', '.join((*MODEL_LABELS, 'layer'))}) group_left () {then['saturated']}"
            f" > {s.saturation_rise}"
        ),
        summary=f"Attention is more often one-hot in {_WHERE_PHASE}",
        found=_LAYERS,
        when=f"The share of a layer's rows that give more than {s.saturation_bound:g} of their attention to one key "
        f"is more than {s.saturation_rise:g} above its mean of the last {s.history}.",
    )


def own_alerts(s: RuleSettings) -> Iterator[Alert]:
    """Of glassbox itself."""
    engine = ", ".join(ENGINE_LABELS)
    yield Alert(
        "ConfigReloadFailed",
        "warning",
        f"min by ({engine}) (glassbox_config_last_reload_successful) == 0",
        summary=f"glassbox runs with an old configuration in {WHERE}",
        found="",
        when="The configuration file was edited but is not valid; the last good one stays in force.",
    )
    rows, earlier = (
        f"sum by ({engine}) (glassbox_attention_rows_total{offset})" for offset in ("", f" offset {s.sampling_window}")
    )
    steps = f"sum by ({engine}) (increase(glassbox_steps_total[{s.sampling_window}]))"
    sample_rate = f"min by ({engine}) (min_over_time(glassbox_sample_rate[{s.sampling_window}]))"
    yield Alert(
        "NotSampling",
        "warning",
        f"(\n  {steps}\n    *\n  {sample_rate}\n  > {s.min_expected_samples}\n)\n"
        # Two moments, not all of the window's samples of every layer. A restart leaves another number, too.
        f"unless\n  {rows} != {earlier}\n"
        f"unless\n  ({rows} > 0 unless {earlier})\n"
        f"unless\n  max by ({engine}) (glassbox_layers_observed) == 0",
        summary=f"glassbox measures nothing in {WHERE}",
        found="",
        when=f"The engine runs, layers are observed and the sample rate is above 0, but no row was measured in "
        f"{s.sampling_window}. The alerts about attention can't see this engine.",
    )
    yield Alert(
        "NothingObserved",
        "warning",
        f"max by ({engine}) (glassbox_layers_observed) == 0\nand\nmax by ({engine}) (glassbox_sample_rate) > 0\nand\n"
        # Encoders keep no keys: of such a model nothing could be observed, for ever.
        f'sum by ({engine}) (glassbox_layers_bypassed{{reason!="encoder"}}) > 0',
        summary=f"glassbox observes no layer of {WHERE}",
        found="",
        when="The sample rate is above 0, but no attention layer of the model is observed; `glassbox_layers_bypassed` "
        "says why. The alerts about attention can't see this engine. Of a model with encoder layers alone, or without "
        "attention, there is nothing to observe, and it is silent.",
    )
    yield Alert(
        "OverheadAboveBudget",
        "warning",
        f"max by ({engine}) (rate(glassbox_overhead_seconds_total[{s.window}])) > {s.overhead_budget}",
        summary=f"glassbox costs more than {s.overhead_budget:.0%} of the time in {WHERE}",
        found="Share: {{ $value | humanizePercentage }}.",
        when=f"Measuring takes more than {s.overhead_budget:.0%} of the time.",
    )
    stages = f"sum by ({engine}, stage)"
    yield Alert(
        "Errors",
        "warning",
        # The first error brings the series: increase() alone would not see it.
        f"{stages} (increase(glassbox_errors_total[{s.window}])) > 0\nor\n"
        f"{stages} (glassbox_errors_total unless glassbox_errors_total offset {s.window}) > 0",
        summary=f"glassbox fails at {{{{ $labels.stage }}}} in {WHERE}",
        found="Errors: {{ $value | humanize }}.",
        when=f"glassbox had errors in the last {s.window}, in measuring or in exporting. Serving goes on; what "
        "glassbox shows may be incomplete.",
    )
