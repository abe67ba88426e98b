"""What is made of the largest singular values of any operator; owns these three formulas.

Source: the tool that this one is named after (dmaniloff/glassbox), glassbox/results.py.
"""

from typing import Final

import numpy as np

from glassbox.signals.values import Doubles, Floats, numbered

RANK: Final = 4


def spectrum_values(singular_values: Doubles) -> dict[str, Floats]:
    """sv1, sv_ratio = s1 / s2, sv_entropy = -sum p ln p with p = s_i / sum s, and the values one by one.

    Args:
        singular_values: [..., at most RANK], falling; NaN where there are fewer.
    """
    first, second = singular_values[..., 0], singular_values[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(second > 0, first / second, np.nan)
        share = singular_values / np.nansum(singular_values, axis=-1, keepdims=True)
        entropy = -np.nansum(np.where(share > 0, share * np.log(share), 0.0), axis=-1)
    entropy = np.where(first > 0, entropy, np.nan)
    values = {"sv1": first, "sv_ratio": ratio, "sv_entropy": entropy}
    return {
        **{name: value.astype(np.float32) for name, value in values.items()},
        **numbered("singular_value", singular_values),
    }
