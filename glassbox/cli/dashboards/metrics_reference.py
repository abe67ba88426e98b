"""`docs/metrics.md`: every metric, recording rule and alert, from the tables that define them."""

from collections.abc import Sequence
from typing import Final

from glassbox.cli.dashboards.rule_model import Group, RuleSettings
from glassbox.cli.dashboards.rules import alerts, recordings
from glassbox.core.counters import BYPASS_REASONS, DROP_REASONS, ENGINE_NUMBERS, MergeRule
from glassbox.core.statistics import STATISTICS, Statistic
from glassbox.export.families import METRICS
from glassbox.export.family import Family

_INTRODUCTION = """\
# Metrics

The names are those of Prometheus; in OpenTelemetry dots stand for the first underscores and units are in the unit field
(`glassbox.attention.entropy_ratio`). All but those of the exporter and its sinks, which are a server's, have the labels
`model_name` and `engine`, the same as vLLM's own metrics, so that joins work. Those with `phase` (`prefill` or
`decode`) also have `layer` at `export.prometheus.detail: layer`, and `layer` and `head` at `detail: head`, if nothing
else is said; both are global indices. A **row** is one query token of one request in one layer and one head.
"""

_ROWS = """\
A row of the phase `prefill` is of a token of the prompt that the client sent, as the chat template wrote it; of each
prompt `sampling.prefill_rows_per_request` are candidates. One of the phase `decode` is of a token that was generated:
its attention is that with which the next token was chosen, so the last token of an answer has none. An answer of n
tokens has n - 1 decode rows, and a sampled step has one of each request that it goes on with. Each is counted when it
is computed first:

- What comes from the prefix cache, or from another server, nobody computes, and no row of it is counted.
- **A preempted request** computes its prompt and its answer again when it is resumed; that is not counted again.
- **Speculative decoding**: a step computes a request's newest token and the drafts after it. The newest one is counted;
  of the drafts it is known only after the step whether they are kept, so their rows are dropped (reason `draft`), kept
  or not. There is one decode row per step and request, then, and it is of a token that the model chose itself: the
  easy ones, that the drafter guessed, are missing. Compare such histograms and baselines with those of servers that
  draft alike. Traces hold all tokens that were kept, and none that was rejected; the drafter's own layers are nowhere.
- **Beam search** makes a request of each step of each beam, with what was generated so far in its prompt. The client's
  prompt counts once, and each beam's newest token is a decode row, whether or not the beam survives: 1 + (n - 1) w
  requests for n tokens and w beams, and (n - 1) w decode rows.
- With `n` > 1 each answer is a request of its own, whose prompt counts as far as the prefix cache hasn't got it.
- **Pooling** (embeddings, classification, scores, rewards): all tokens are of the prompt, there are no decode rows.
- A request with `"glassbox": "off"` counts nowhere; vLLM doesn't hand that on to a beam search.

**Layers in turn.** With `sampling.layers_per_step: N` a measured step measures N of the L layers that
`sampling.layers` chooses (of each pipeline stage, its own), and L / N times as many steps are measured: `sample_rate`
is the share of steps in which each layer is measured, whatever N is. So a layer has as many rows as without, and at
any time no layer was measured in more than one step more than another; within a scrape or two, layers have rows of
different steps, and one may have none. `glassbox_sampled_steps_total` counts L / N times as many. Where that would be
more than all steps, every step is measured: `glassbox_sample_rate` shows what is left to each layer, N / L, and the
log and `glassbox check` say it. Traced rows are measured in all layers that their trace keeps, in every step, and
count only where it is the layer's turn. A check of outputs is of all layers at once.

What `reason` of `glassbox_dropped_rows_total` says:
"""

_DRIFT = """\
`glassbox_attention_drift_psi` and `glassbox_attention_drift_mean_shift` compare the rows of the last
`baseline.window_s` seconds (up to a quarter more) with the file of `baseline.path`, which `glassbox baseline save`
makes of a healthy run. They have the label `statistic` besides those above; a layer shows its worst head, and at
`detail: model` the model does. There is no series for a head with fewer than `baseline.min_rows` rows on either side,
nor for an engine that was idle for a whole window.

- The population stability index is the sum over the histogram's buckets of (a - e) ln(a / e), e and a the shares of the
  rows in the baseline and now, half a row having been added to each bucket. It is the symmetric Kullback-Leibler
  divergence (Jeffreys 1946); by convention (Siddiqi, *Credit Risk Scorecards*, 2006) below 0.1 is no change, above
  0.25 a major one. Without any change it is (B - 1)(1 / n + 1 / m) on average for n and m independent rows in B buckets
  (Yurdakul 2018), and more for rows of few requests, which resemble each other.
- The shift is (mean now - mean of the baseline) / sqrt((variance now + variance of the baseline) / 2), each row being
  the middle of its bucket (Austin 2009, *Statistics in Medicine* 28:3083); 0.2 is small, 0.8 large (Cohen). It ends at
  +-10.
"""

_CHECKS = """\
For each layer, before it is observed and about every 30 seconds while serving, glassbox takes a few rows of a step
and compares the attention output that was served with softmax(scores) V, computed in float32 from the KV cache, the
scale, the mask and the block table as glassbox reads them. `glassbox_attention_output_error_ratio` counts the rows by
the error of their worst head over the largest error that rounding in the kernel's types explains; up to 1 the row was
reproduced. It has the label `layer` at `detail: layer` and `detail: head`, and no head.

- A layer is certified once its output was reproduced, on every rank. A layer that was not reproduced on a rank is not
  observed there any more until the worker is restarted: `glassbox_attention_output_wrong` says which one, its worst
  head, the rank and the host. At `detail: model` each rank names its worst layer only.
- Of latent attention (MLA: DeepSeek V2 and V3, Kimi, GLM-4.7) generated rows are checked, which attend over the latent
  cache, before their output is projected to the values of each head. Rows of prompts attend over keys and values that
  are made for one step, so a fault of the prefill kernel alone is not found.
- `glassbox_attention_output_error_worst_ratio` and the metrics of the KV cache are of a layer's last check and exist
  from its first one on; at `detail: model` of the worst layer, which has its labels there, too. The label `head`
  moves from check to check: ask for `max by (layer)`.
- `glassbox_kv_cache_quantization_error_ratio` is sqrt(sum of (stored x scale - computed)^2 / sum of computed^2) over
  the elements of the checked rows' own keys or values (label `tensor`: `key` or `value`). Rounding alone makes 2.6 %
  in FP8 e4m3 and 5 % in e5m2; in a cache that isn't quantised it is 0 or unknown.
- `glassbox_nonfinite_first_layer` has the index of a layer as its value. One NaN reaches all ranks with the next
  layer, so the lowest value is where it came from.
- `glassbox_attention_output_wrong` and `glassbox_nonfinite_first_layer` exist only while something is wrong, and
  don't count for `export.prometheus.max_series`. All values of `reason` and `result` below exist from the start, with
  0: sum `glassbox_layers_bypassed` over them for the number of layers that are not observed.

What `reason` of `glassbox_layers_bypassed` says of a layer:
"""


_LIVENESS = """\
`glassbox_snapshot_age_seconds`, `glassbox_export_interval_seconds`, `glassbox_actions_total` and all that begin with
`glassbox_exporter_` or `glassbox_sink_` are made by the process that answers the scrape, when it does: vLLM's API
server (each of several), or the exporter on its own port. So a full disk and an exporter that was killed, stopped or
hangs can't hide themselves.
They don't count for `export.prometheus.max_series`. Those of the exporter exist where the configuration needs one, and
on the exporter's own port always; if that port is all that is scraped, `up == 0` is what tells that it is gone.

A sink succeeds when it did all that was asked, if that was nothing, too. One that has failed or hangs doesn't until it
works again; of `otel_traces` it is known only whether spans were lost since the last export.
"""
_SCORES = """\
Those that begin with `glassbox_probe_`, `glassbox_signal_` and `glassbox_scoring_` count traced requests that have
ended, as the exporter scores them ([scores.md](scores.md)). A probe in force has its series from the start; a signal
has them once somebody has asked for it. A node scores the requests whose traces lie on it.
"""
_NODES = """\
Each node of an engine exports what its own ranks measured; `glassbox_worker_info` says which. Rows, histograms and
counters of rows add up over the nodes, because a head of a layer is on one rank. What all ranks see alike does not;
[distributed.md](distributed.md) has the whole of it.
"""
# How the metrics of an engine's nodes become one, by how those of its workers do.
_OVER_NODES: Final = {
    MergeRule.SUM: "sum",
    MergeRule.LARGEST_PLACE: "max",
    MergeRule.LARGEST_LIVE: "max",
    MergeRule.SUM_OF_STAGES: "sum over pipeline stages, max over tensor-parallel ranks",
    MergeRule.ALL_LIVE: "min",
    MergeRule.NEWEST: "any",
}


def _over_nodes() -> list[tuple[str, ...]]:
    by_how: dict[str, list[str]] = {}
    for entry in ENGINE_NUMBERS:
        by_how.setdefault(_OVER_NODES[entry.merge], []).append(f"`glassbox_{entry.metric}`")
    return [(how, ", ".join(names)) for how, names in by_how.items()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *(tuple(map(_cell, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _range(row: Statistic) -> str:
    low = "-∞" if row.lower is None else f"{row.lower:g}"
    return f"{low} .. {'∞' if row.upper is None else f'{row.upper:g}'}"


def _statistic(row: Statistic) -> tuple[str, ...]:
    phases = "decode" if row.decode_only else "prefill, decode"
    metric = f"`{row.metric}`" if row.exported else "none: in traced requests only"
    bounds = ", ".join(f"{bound:g}" for bound in row.buckets) if row.exported else ""
    return metric, row.meaning, f"`{row.formula}`", _range(row), phases, bounds


def _family(family: Family) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in family.label_names)
    return f"`{family.name}`", family.kind, family.unit, labels, family.help


def render(groups: tuple[Group, ...]) -> str:
    """The page, without its header."""
    recorded = [(f"`{rule.record}`", rule.comment) for rule in recordings(groups)]
    hold = RuleSettings().hold
    alarms = [
        (f"[{rule.title}](runbooks/{rule.title}.md)", rule.severity, hold[rule.name], rule.when)
        for rule in alerts(groups)
    ]
    statistics = {row.metric for row in STATISTICS}
    signed = ", ".join(f"`{row.metric}`" for row in STATISTICS if row.exported and row.signed)
    return "\n".join(
        [
            _INTRODUCTION,
            "## Statistics of the attention\n",
            "Histograms over the measured rows. The symbols of the formulas are explained in "
            f"`glassbox/core/statistics.py`. {signed} has `_bucket` but neither `_sum` nor `_count`: its values may be "
            "negative, and OpenMetrics forbids both then; the bucket `+Inf` is the number of rows.\n",
            _table(
                ("Metric", "Meaning", "Formula", "Range", "Phases", "Buckets (`le`)"),
                [_statistic(row) for row in STATISTICS],
            ),
            "## Other metrics\n",
            _table(
                ("Metric", "Kind", "Unit", "Labels", "Meaning"),
                [_family(family) for family in METRICS if family.name not in statistics],
            ),
            "## Which rows are counted\n",
            _ROWS,
            _table(("`reason`", "Why"), [(f"`{reason}`", why) for reason, why in DROP_REASONS.items()]),
            "## Output checks\n",
            _CHECKS,
            _table(("`reason`", "Why"), [(f"`{reason}`", why) for reason, why in BYPASS_REASONS.items()]),
            "## Drift from a baseline\n",
            _DRIFT,
            "## Probes and signals\n",
            _SCORES,
            "## Age, exporter and sinks\n",
            _LIVENESS,
            "## An engine over several nodes\n",
            _NODES,
            _table(("Over nodes", "Metrics of the engine"), _over_nodes()),
            "## Recording rules\n",
            "Of `deploy/prometheus/rules.yaml`. The part before the first colon tells what a series stands for: an "
            "engine, a layer of it, or a model on all its servers, each per phase.\n",
            _table(("Series", "Meaning"), recorded),
            "## Alerts\n",
            _table(("Alert", "Severity", "For", "Fires when"), alarms),
        ]
    )
