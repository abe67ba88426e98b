"""The heads over which `focus` is taken: found from a few prompts, and kept in a file.

Owns the rule of Attention Tracker (Hung et al. 2024, arXiv 2411.00348) and the file, JSON. A head is important if its
focus on the instruction falls under attack by more than k standard deviations: mean(normal) - mean(attacked) > k
(std(normal) + std(attacked)), k = 4. Which prompts they are, and asking a model, is `cli/commands/heads.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from glassbox.core.files import ForeignFileError, open_own, write_atomically
from glassbox.core.json_fields import FieldError, JsonFields, parse_json
from glassbox.core.trace_options import MAX_INDEX
from glassbox.signals.values import Doubles

MAX_HEADS: Final = 65_536
# A head that never varies falls by infinitely many, which JSON can't say.
MAX_DEVIATIONS: Final = 1e6
_MAX_BYTES: Final = 16 << 20
_MAX_PROMPTS: Final = 10**9
_KIND: Final[Mapping[str, str | int]] = {"format": "glassbox focus heads", "format_version": 1}
_REMEDY: Final = "make it with glassbox heads"


class FocusHeadsError(ValueError):
    """A file of heads can't be used; the message says file, field, rule, value and remedy."""


@dataclass(frozen=True)
class FocusHead:
    """One head.

    Attributes:
        layer, head: global indices.
        deviations: by how many standard deviations its focus falls, at most MAX_DEVIATIONS.
    """

    layer: int
    head: int
    deviations: float


@dataclass(frozen=True)
class FocusHeads:
    """What `glassbox heads` found.

    Attributes:
        model: that they are of.
        deviations: k, more than which the focus of each falls.
        normal, attacked: prompts of either kind.
        heads: by falling difference.
    """

    model: str
    deviations: float
    normal: int
    attacked: int
    heads: tuple[FocusHead, ...]

    @property
    def places(self) -> frozenset[tuple[int, int]]:
        """(layer, head) of each, as `signal_values` takes them."""
        return frozenset((one.layer, one.head) for one in self.heads)


def falls(normal: Doubles, attacked: Doubles) -> Doubles:
    """By how many standard deviations the focus falls, [L, H]; infinite if it never varies, NaN without a value.

    Args:
        normal, attacked: [prompts, L, H], focus of each head on the instruction.
    """
    fall = normal.mean(axis=0) - attacked.mean(axis=0)
    spread = normal.std(axis=0) + attacked.std(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((fall == 0) & (spread == 0), 0.0, fall / spread)


def important(
    fall: Doubles, layers: tuple[int, ...], heads: tuple[int, ...], deviations: float
) -> tuple[FocusHead, ...]:
    """The heads whose focus falls by more, by falling difference.

    Args:
        fall: of `falls`.
        layers, heads: global index of each along its axes.
        deviations: k.
    """
    above = np.argwhere(fall > deviations)
    found = [FocusHead(layers[a], heads[b], min(float(fall[a, b]), MAX_DEVIATIONS)) for a, b in above]
    return tuple(sorted(found, key=lambda one: -one.deviations))


def write_focus_heads(path: Path, found: FocusHeads) -> None:
    """Write the file; it replaces an older one at once or not at all.

    Raises:
        OSError: it can't be written.
    """
    write_atomically(Path(path), (json.dumps({**_KIND, **asdict(found)}, indent=1) + "\n").encode())


def read_focus_heads(path: Path) -> FocusHeads:
    """Read a file of `write_focus_heads`, which is a server's to follow: rules end requests by the signal `focus`, too.

    Raises:
        FocusHeadsError: it is missing, can't be read, is not as it must be, or could be another user's.
    """
    try:
        with open_own(Path(path), _MAX_BYTES) as file:
            return _of_document(parse_json(file.read(_MAX_BYTES + 1)))
    except OSError as error:
        raise FocusHeadsError(f"focus heads {path} can't be read ({error.strerror}); {_REMEDY}") from None
    except ForeignFileError as error:
        raise FocusHeadsError(f"focus heads {path}: {error}") from None
    except FieldError as error:
        raise FocusHeadsError(f"focus heads {path}: {error}; {_REMEDY}") from None


def _of_document(document: object) -> FocusHeads:
    whole = JsonFields(document, [*_KIND, *FocusHeads.__dataclass_fields__])
    for name, value in _KIND.items():
        whole.choice(name, value)
    parts = whole.parts("heads", list(FocusHead.__dataclass_fields__), MAX_HEADS)
    heads = tuple(
        FocusHead(
            part.whole("layer", MAX_INDEX), part.whole("head", MAX_INDEX), part.number("deviations", 0, MAX_DEVIATIONS)
        )
        for part in parts
    )
    return FocusHeads(
        model=whole.text("model"),
        deviations=whole.number("deviations", 0, MAX_DEVIATIONS),
        normal=whole.whole("normal", _MAX_PROMPTS),
        attacked=whole.whole("attacked", _MAX_PROMPTS),
        heads=heads,
    )
