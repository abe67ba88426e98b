"""A baseline of what was read from outside: a scrape instead of the run directory."""

import numpy as np

from glassbox.signals.baseline import ARRAYS, Baseline, BaselineError
from glassbox.view.measured import Measured


def from_measured(measured: Measured) -> Baseline:
    """What a scrape at detail head shows, engines added up: statistics that aren't exported have no rows.

    Raises:
        BaselineError: it has no rows, or a coarser detail.
    """
    source = measured.source
    if not measured.rows.any():
        raise BaselineError(f"{source} has no measured rows; send some requests, and see that sample_rate is above 0")
    if measured.detail != "head":
        raise BaselineError(
            f"{source} has detail {measured.detail}; set export.prometheus.detail: head (and max_series high enough) "
            "in the server's YAML, wait two seconds and try again, or name its run directory instead of the URL"
        )
    layers = tuple(layer for layer in measured.layers if layer is not None)
    heads = [head for head in measured.heads if head is not None]
    num_heads = 1 + max(heads)
    arrays = {name: getattr(measured, name) for name in ARRAYS}
    if len(heads) < num_heads:  # a head without a row has no series
        whole = {name: np.zeros((array.shape[0], num_heads, *array.shape[2:])) for name, array in arrays.items()}
        for name, array in arrays.items():
            whole[name][:, heads] = array
        arrays = whole
    found = int((measured.engines.layers_observed or 0) + (measured.engines.layers_bypassed or 0))
    return Baseline(
        model_name=measured.model_name,
        # Fewer than the highest index: others have no attention, so these are not all.
        num_layers=found if found > layers[-1] else None,
        num_heads=num_heads,
        layers=layers,
        build=dict(measured.engines.build),
        time_s=measured.time_s,
        duration_s=measured.window_s,
        source=source,
        sink_tokens=None,
        local_window=None,
        counts=arrays["counts"].astype(np.int64),
        sums=arrays["sums"],
        rows=arrays["rows"].astype(np.int64),
    )
