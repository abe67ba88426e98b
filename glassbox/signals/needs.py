"""What is kept of a request that the trace rate has chosen: all that its probes and signals use, and no more.

Owns the union of what probes need. A client that asks for a trace says itself what is kept; its request is scored as
far as that goes.
"""

from collections.abc import Iterable, Sequence

from glassbox.core.signal_table import signal_row
from glassbox.core.trace_options import TraceOptions
from glassbox.signals.probe import Probe


def sampled_options(probes: Sequence[Probe], signals: Sequence[str]) -> TraceOptions:
    """The options of a chosen request.

    Without probes, or with signals that the YAML file asks for, all measured layers and heads are kept. Spans are not
    among it: only a client knows which tokens they are.

    Args:
        probes: in force.
        signals: that the YAML file asks for.
    """
    wanted = tuple(dict.fromkeys([*signals, *(name for probe in probes for name in probe.needs.signals)]))
    every_row = any(probe.needs.prompt for probe in probes) or any(signal_row(name).prompt for name in wanted)
    # A number of the whole request is taken over all layers and heads.
    narrow = bool(probes) and not signals and not any(_of_request(probe) for probe in probes)
    return TraceOptions(
        layers=_union(probe.needs.layers for probe in probes) if narrow else None,
        heads=_union(probe.needs.heads for probe in probes) if narrow else None,
        prompt="all" if every_row else "sampled",
        signals=wanted,
    )


def _of_request(probe: Probe) -> bool:
    return any(feature.parsed.layer is None for feature in probe.features)


def _union(indices: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({index for some in indices for index in some}))
