"""Numbers, names and units in words, for terminals, pictures and reports alike."""

import math

from glassbox.core.statistics import Phase, Statistic
from glassbox.view.measured import Measured


def format_value(value: float) -> str:
    """Three decimals below 1, fewer above, none from 100; `~0` for what would look like 0; `-` for no value."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    magnitude = abs(value)
    if 0 < magnitude < 0.0005:
        return "~0"
    if magnitude < 10:
        return f"{value:.3f}" if magnitude < 1 else f"{value:.2f}"
    return f"{value:.1f}" if magnitude < 100 else f"{value:,.0f}"


def format_share(value: float) -> str:
    """Three decimals, so that areas and shares line up; `n/a` for no value."""
    return f"{value:.3f}" if math.isfinite(value) else "n/a"


def format_interval(low: float, high: float) -> str:
    """Of areas or shares."""
    return f"{low:.3f} to {high:.3f}" if math.isfinite(low) and math.isfinite(high) else "n/a"


def format_count(value: float) -> str:
    """Six figures at most: 42, 9,930, 110k, 3.21M."""
    for limit, divisor, suffix in ((1e5, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if abs(value) < limit:
            scaled = value / divisor
            return f"{scaled:.2f}{suffix}" if suffix == "M" and scaled < 10 else f"{scaled:,.0f}{suffix}"
    return f"{value / 1e9:,.2f}G"


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or seconds == whole else f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def title(statistic: Statistic) -> str:
    """`Effective keys`, `Sink ratio`, `Distance` (in tokens, which is its unit)."""
    return statistic.name.removesuffix("_tokens").replace("_", " ").replace("top1", "top-1").capitalize()


def unit(statistic: Statistic) -> str:
    """Of an axis or a colour bar: keys, tokens, share (0 to 1), or what else it is."""
    if statistic.unit != "1":
        return statistic.unit.strip("{}") + "s"
    if (statistic.lower, statistic.upper) == (0.0, 1.0):
        return "share, 0 to 1"
    return "score before softmax" if statistic.name == "max_logit" else "natural log of a share"


def phase_words(phase: Phase | None) -> str:
    """`decode rows`; both phases are `all rows`."""
    return f"{phase or 'all'} rows"


def place_words(layer: int | None, head: int | None) -> str:
    """`layer 3 head 7`, `layer 3`, `all layers`."""
    if layer is None:
        return "all layers"
    return f"layer {layer}" if head is None else f"layer {layer} head {head}"


def shape_words(measured: Measured) -> str:
    """`30 layers x 9 heads`, `30 layers`, `no layers told apart`."""
    if measured.detail == "model":
        return "no layers told apart"
    layers = f"{len(measured.layers)} layer{'s' * (len(measured.layers) != 1)}"
    return f"{layers} x {len(measured.heads)} heads" if measured.detail == "head" else layers
