"""The alerts of the output checks: whether what is served is right, what the KV cache loses, what could not be checked.

What an alert names beside its labels, such as a layer, its text looks up when it fires: so there is one alert per
worker, not one per layer. Where nothing is found the text ends earlier.
"""

from collections.abc import Iterator
from typing import Final

from glassbox.cli.dashboards.rule_model import ENGINE_LABELS, WHERE, Alert, RuleSettings

_ENGINE: Final = ", ".join(ENGINE_LABELS)


def look_up(query: str, labels: tuple[str, ...], text: str) -> str:
    """Part of an alert's text: `text` for each sample of a query, in which `{}` stands for the alert's own `labels`."""
    matchers = ", ".join(f"{label}=%q" for label in labels)
    values = " ".join(f"$labels.{label}" for label in labels)
    return f'{{{{ range query (printf "{query.replace("{}", f"{{{matchers}}}")}" {values}) }}}}{text}{{{{ end }}}}'


# One NaN spreads to all ranks with the next layer, so the lowest layer is where it came from.
FIRST_NONFINITE: Final = look_up(
    "sort(bottomk(3, glassbox_nonfinite_first_layer{}))",
    ENGINE_LABELS,
    " First in layer {{ .Value }}, rank {{ .Labels.rank }} on {{ .Labels.host }}.",
)


def output_alerts(s: RuleSettings) -> Iterator[Alert]:
    """Of what the checks of served outputs find."""
    worker = (*ENGINE_LABELS, "rank", "host")
    failed = f'increase(glassbox_canary_rows_total{{result="failed"}}[{s.window}])'
    yield Alert(
        "OutputWrong",
        "critical",
        f"count by ({', '.join(worker)}) (glassbox_attention_output_wrong)\nor\n"
        f"sum by ({_ENGINE}) ({failed}) > 0\n  unless on ({_ENGINE}) glassbox_attention_output_wrong",
        summary=f"Attention is computed wrongly in {WHERE}"
        "{{ with $labels.host }}, rank {{ $labels.rank }} on {{ . }}{{ end }}",
        found="{{ with $labels.host }}Layers of rank {{ $labels.rank }} on {{ . }}: {{ $value }}, the worst:{{ else }}"
        "Rows: {{ $value | humanize }}.{{ end }}"
        + look_up(
            "sort_desc(topk(3, glassbox_attention_output_wrong{}))",
            worker,
            " layer {{ .Labels.layer }}, head {{ .Labels.head }} ({{ .Value | humanize }} times what rounding "
            "explains).",
        ),
        when="The attention output that the server gave is not softmax(scores) V of what it read.",
    )
    tensor = (*ENGINE_LABELS, "tensor")
    error, saturated = "glassbox_kv_cache_quantization_error_ratio", "glassbox_kv_cache_saturated_ratio"
    largest = (
        look_up(
            f"topk(1, {metric}{{}})",
            tensor,
            f" {what}: {{{{ .Value | humanizePercentage }}}}, layer {{{{ .Labels.layer }}}}.",
        )
        for metric, what in ((error, "Largest error"), (saturated, "Largest saturated share"))
    )
    yield Alert(
        "KvCacheQuantization",
        "warning",
        f"count by ({', '.join(tensor)}) (\n  {error} > {s.kv_error}\n  or\n  {saturated} > {s.kv_saturated}\n)",
        summary=f"The KV cache loses too much of the {{{{ $labels.tensor }}}}s in {WHERE}",
        found=f"Layers concerned: {{{{ $value }}}}.{''.join(largest)}",
        when=f"What the cache holds of a layer's keys or values differs by more than {s.kv_error:.0%} from what was "
        f"computed, or more than {s.kv_saturated:.0%} of it is the largest number of its type.",
    )


def certification_alerts(s: RuleSettings) -> Iterator[Alert]:
    """Of layers that glassbox does not show because their output was not reproduced."""
    unproved = 'glassbox_layers_bypassed{reason=~"not_certified|not_reproduced"}'
    yield Alert(
        "NotCertified",
        "warning",
        f"sum by ({_ENGINE}, reason) ({unproved}) > 0\nand on ({_ENGINE})\n"
        f"sum by ({_ENGINE}) (increase(glassbox_steps_total[{s.window}])) > 0",
        summary=f"glassbox could not reproduce layers of {WHERE}, and does not show them",
        found="Layers: {{ $value }} ({{ $labels.reason }}).",
        when="Layers are not observed because their output was not reproduced (not_reproduced), or could not be "
        "checked while the engine runs (not_certified).",
    )
