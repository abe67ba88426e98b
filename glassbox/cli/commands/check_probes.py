"""What `glassbox check` says of probes: whether they fit the model, and what they make the server measure."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassbox.config.load import GlassboxConfig
    from glassbox.core.trace_options import TraceOptions
    from glassbox.signals.probe import Probe


def read_probes(config: "GlassboxConfig") -> "tuple[Probe, ...]":
    """The probes that a configuration names, which were tried already."""
    from glassbox.signals.probe_files import load_probe

    return tuple(load_probe(named) for named in config.probes)


def check_fit(probes: "Sequence[Probe]", model: str, layers: Collection[int], heads: int) -> None:
    """See that a model has what the probes read.

    Args:
        model: for the message.
        layers: global indices of those that are observed.
        heads: query heads, of all ranks.

    Raises:
        ViewError: one of them reads a layer or head that it lacks.
    """
    from glassbox.signals.probe import ProbeError
    from glassbox.view.measured import ViewError

    try:
        for probe in probes:
            probe.check_fits(model, layers, range(heads))
    except ProbeError as error:
        raise ViewError(str(error)) from None


def probe_lines(
    config: "GlassboxConfig", probes: "Sequence[Probe]", places: Mapping[int, int] | None = None
) -> Iterator[str]:
    """What each probe needs, and what is therefore kept of requests that the trace rate chooses.

    Args:
        places: query heads of each measured layer of the model, by its index; None if it isn't known.
    """
    from glassbox.signals.needs import sampled_options

    if not probes and not config.sampled_signals:
        return
    for probe in probes:
        needs, trained = probe.needs, probe.trained
        yield (
            f"Probe {probe.name} ({probe.label!r} from {probe.threshold:g} on): {len(probe.features)} features, "
            f"trained on {trained.samples} samples of {trained.model_name}"
        )
        yield f"  layers {_listed(needs.layers)}, heads {_listed(needs.heads)}, signals {_listed(needs.signals)}"
        if needs.spans:
            yield (
                f"  spans {_listed(needs.spans)}: only of requests whose client names them in glassbox_spans; those "
                "that the trace rate chooses have none"
            )
    rate = config.requests.trace_rate
    if rate <= 0:
        if probes:
            yield "Scored are requests whose client asks for a trace; requests.trace_rate is 0, so no others."
        if config.requests.signals:
            yield (
                f"Signals {_listed(config.requests.signals)} (requests.signals) are computed of no request: they are "
                "for those that requests.trace_rate chooses, which is 0; raise it, or let clients name signals."
            )
        return
    options = sampled_options(probes, config.sampled_signals)
    every = "every row of the prompt" if options.prompt != "sampled" else "sampled rows of the prompt"
    yield (
        f"Of {rate:.3g} of all requests (requests.trace_rate) are kept: layers {_listed(options.layers, 'all')}, heads "
        f"{_listed(options.heads, 'all')}, signals {_listed(options.signals)}, {every}."
    )
    yield from _refused(options, places)


def _refused(options: "TraceOptions", places: Mapping[int, int] | None) -> Iterator[str]:
    """Signals that these requests never have a value of, and the bound that they are over."""
    from glassbox.core.signal_table import MAX_KEPT_PLACES, is_on_demand

    dear = [name for name in options.signals if is_on_demand(name)]
    if places is None:
        known = options.layers is not None and options.heads is not None
        kept = len(options.layers or ()) * len(options.heads or ()) if known else 0
    else:
        kept = sum(
            sum(options.heads is None or head in options.heads for head in range(heads))
            for layer, heads in places.items()
            if options.layers is None or layer in options.layers
        )
    if dear and kept > MAX_KEPT_PLACES:
        yield (
            f"  {_listed(dear)} have no value of these: signals on demand are for at most {MAX_KEPT_PLACES} layers x "
            f"heads, and {kept} are kept; use probes that read fewer, or let clients ask with glassbox_layers and "
            "glassbox_heads"
        )


def _listed(values: Sequence[object] | None, none: str = "none") -> str:
    return ", ".join(map(str, values)) if values else none
