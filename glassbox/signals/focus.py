"""`focus`: Attention Tracker's focus score (Hung et al. 2024, arXiv 2411.00348), the attention to an instruction.

It is the attention of the last prompt token to the positions of a span, mean over "important heads", which
`glassbox heads` finds (`focus_heads.py`); it falls where an injected instruction draws attention away.

Values, by place and of the request as the mean over the chosen heads (all of the trace unless a file of heads is
named): `mass` of the request's first span, which should be the instruction, and `mass_NAME` of each span NAME.
Cost: streaming, from span_mass.
"""

from collections.abc import Collection

import numpy as np

from glassbox.signals.values import SignalValues, finite_mean
from glassbox.store.trace_record import RequestTrace


def compute(trace: RequestTrace, heads: Collection[tuple[int, int]] | None = None) -> SignalValues:
    """See the module.

    Args:
        trace: of the request.
        heads: (layer, head), global indices; None is all of the trace, and those that it lacks are left out.
    """
    if not trace.span_names:
        return SignalValues(refused="the request named no span; name its instruction in glassbox_spans")
    (last,) = np.nonzero(trace.positions == trace.prompt_len - 1)
    if not last.size:
        return SignalValues(
            refused="the row of the last prompt token was not measured; set sampling.prefill_rows_per_request above 0"
        )
    mass = trace.span_mass[last[0]]  # [L, H, S]
    chosen = np.array([[heads is None or (layer, head) in heads for head in trace.heads] for layer in trace.layers])
    chosen = chosen.astype(bool).reshape(mass.shape[:2])
    values = {"mass": mass[..., 0], **{f"mass_{name}": mass[..., s] for s, name in enumerate(trace.span_names)}}
    means = {name: finite_mean(value[chosen]) for name, value in values.items()}
    refused = "" if chosen.any() else "none of the chosen heads was traced; trace them, or run glassbox heads again"
    return SignalValues(by_place=values, of_request=means, refused=refused)
