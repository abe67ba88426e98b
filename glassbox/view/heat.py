"""Values as colours: which value is where on the scale, and what colour that is.

Shares have the scale 0 to 1, so that two pictures can be compared; counts of keys and tokens are logarithmic over
the values at hand, all others linear over them.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import Statistic

# Dark to light with even steps of lightness, readable for the colour-blind; after the idea of matplotlib's "magma",
# with a bluer middle so that black and white text stand out on all of it.
_STOPS: Final = np.array(
    [
        (18, 20, 48),
        (44, 33, 105),
        (92, 40, 132),
        (150, 52, 123),
        (206, 74, 96),
        (242, 122, 70),
        (252, 184, 84),
        (252, 240, 160),
    ],
    dtype=np.float64,
)


def limits(statistic: Statistic, values: npt.ArrayLike) -> tuple[float, float]:
    """Both ends of the scale, the lower below the upper."""
    if (statistic.lower, statistic.upper) == (0.0, 1.0):
        return 0.0, 1.0
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if logarithmic(statistic):
        known = known[known > 0]
    if not known.size:
        return 0.5, 1.0
    low, high = float(known.min()), float(known.max())
    return (low, high) if low < high else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)


def logarithmic(statistic: Statistic) -> bool:
    """True for numbers of keys and tokens, which span decades."""
    return statistic.unit != "1"


def shares(statistic: Statistic, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """[...], position of each value on the scale, 0 to 1; NaN where there is none."""
    numbers = np.asarray(values, np.float64)
    low, high = limits(statistic, numbers)
    if logarithmic(statistic):
        low, high = np.log(low), np.log(high)
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.log(numbers)
    return np.clip((numbers - low) / (high - low), 0.0, 1.0)


def colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255 each, of a position on the scale."""
    place = share * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    red, green, blue = _STOPS[low] + (_STOPS[low + 1] - _STOPS[low]) * (place - low)
    return round(red), round(green), round(blue)


def hexadecimal(share: float) -> str:
    """The same as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour(share))


def text_colour(share: float) -> str:
    """Black or white, whichever can be read on that colour (relative luminance as in WCAG 2)."""
    red, green, blue = ((part / 255) ** 2.2 for part in colour(share))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"
