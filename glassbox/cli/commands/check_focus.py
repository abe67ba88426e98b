"""What `glassbox check` says of the heads of the signal `focus`: which they are, whether the model has them, and of
which requests the signal (Attention Tracker's) has a value."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassbox.config.load import GlassboxConfig
    from glassbox.signals.focus_heads import FocusHeads

# Query heads by the index of the layer, of those that are measured.
Places = Mapping[int, int]


def read_heads(config: "GlassboxConfig") -> "FocusHeads | None":
    """The heads that a configuration names, whose file was tried already; None if it names none."""
    from glassbox.signals.focus_heads import read_focus_heads

    path = config.requests.expanded_focus_heads
    return None if path is None else read_focus_heads(path)


def check_has(found: "FocusHeads | None", model: str, places: Places) -> None:
    """See that a model has some of the heads.

    Args:
        model: for the message.
        places: of the model.

    Raises:
        ViewError: it has none of them, so `focus` never has a value.
    """
    from glassbox.view.measured import ViewError

    if found is not None and not _measured(found, places):
        raise ViewError(
            f"requests.focus_heads must name heads that {model} has and sampling.layers measures; it has none of the "
            f"{len(found.heads)} of {found.model}; run glassbox heads with this model, or use `null`"
        )


def focus_lines(config: "GlassboxConfig", found: "FocusHeads | None", places: Places | None) -> Iterator[str]:
    """Which heads they are and what `focus` needs beside them; nothing without a file of heads.

    Args:
        places: of the model; None if it isn't known.
    """
    requests = config.requests
    if found is not None:
        layers = ", ".join(map(str, sorted({one.layer for one in found.heads})))
        yield (
            f"The signal focus (Attention Tracker) is taken over {len(found.heads)} heads of layers {layers}, found "
            f"with {found.model}: over {found.normal} normal and {found.attacked} attacked prompts their focus falls "
            f"by more than {found.deviations:g} standard deviations"
        )
        if places is not None and (lacking := len(found.heads) - len(_measured(found, places))):
            yield f"  {lacking} of them are left out: this model has no such heads, or sampling.layers leaves them out"
    elif "focus" in config.sampled_signals:
        yield "The signal focus is taken over all traced heads; requests.focus_heads names those that matter."
    if found is None and "focus" not in config.sampled_signals:
        return
    if "focus" in config.sampled_signals:
        yield "  it has no value of requests that the trace rate chooses: these name no span as their instruction"
    if not requests.opt_in:
        yield "  no client may ask for it: requests.opt_in is false"
    if not config.sampling.prefill_rows_per_request:
        yield (
            "  it needs the row of the last prompt token: sampling.prefill_rows_per_request is 0, so only requests "
            "with glassbox_prompt: all have it"
        )
    yield "  a client asks with glassbox_signals: [focus], and glassbox_spans, of which the first is the instruction"


def _measured(found: "FocusHeads", places: Places) -> Collection[tuple[int, int]]:
    return [(layer, head) for layer, head in found.places if head < places.get(layer, 0)]
