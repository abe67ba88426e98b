"""Which rows of a step are measured in which of its layers.

Owns the lists alone: numpy only, no device. The sample measures its rows in the layers whose turn it is, a trace its
own request's rows in the layers that it keeps, a check its rows in all. So layers have lists of their own, and those of
which the same is wanted share one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from glassbox.core.rows import ROW_PHASE, ROW_SLOT, ROW_UNCOUNTED
from glassbox.measure.contract import LayeredRows


@dataclass(frozen=True, eq=False)
class RowList:
    """Rows that are measured in some layers.

    Attributes:
        rows: int32 [R, NUM_ROW_COLUMNS], ascending in ROW_QUERY, at least one. Those that the sample does not count in
            these layers are ROW_UNCOUNTED, and those that go nowhere else have no slot.
        places: int64 [R], where they stand among all rows of the step, ascending.
        local_layers: which layers.
    """

    rows: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]
    local_layers: frozenset[int]

    @cached_property
    def counted(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that the sample counts in these layers."""
        return np.flatnonzero((self.rows[:, ROW_PHASE] & ROW_UNCOUNTED) == 0)

    def find(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Numbers of the rows at these places of the step's rows; None if one is not in the list."""
        numbers = np.minimum(np.searchsorted(self.places, places), len(self.places) - 1)
        return numbers if np.array_equal(self.places[numbers], places) else None


def observed_only(wanted: Sequence[LayeredRows], observed: frozenset[int]) -> list[LayeredRows]:
    """What is wanted, in those of its layers of which numbers may be kept."""
    return [one._replace(local_layers=one.local_layers & observed) for one in wanted]


def row_lists(
    rows: npt.NDArray[np.int32],
    sampled: frozenset[int],
    others: Sequence[LayeredRows] = (),
    room: int | None = None,
) -> list[RowList]:
    """The lists of a step's layers.

    Args:
        rows: int32 [R, NUM_ROW_COLUMNS] of the step, ascending in ROW_QUERY.
        sampled: local layers in which the rows that aren't ROW_UNCOUNTED are measured, and counted.
        others: what else is measured, and not counted in other layers than those.
        room: of all lists together, at least 3 R; beyond it what others want is no longer told apart, and each of their
            rows is measured in each of their layers.
    """
    found = _lists(rows, sampled, others)
    if room is not None and sum(len(one.places) for one in found) > room:
        layers = frozenset[int]().union(*(one.local_layers for one in others))
        found = _lists(rows, sampled, [LayeredRows(layers, np.concatenate([one.places for one in others]))])
    return found


def _lists(rows: npt.NDArray[np.int32], sampled: frozenset[int], others: Sequence[LayeredRows]) -> list[RowList]:
    counted = (rows[:, ROW_PHASE] & ROW_UNCOUNTED) == 0
    if not others:  # as in most measured steps
        return [_list(rows, counted, np.zeros_like(counted), sampled)] if sampled and counted.any() else []
    kinds: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for local in sorted(sampled.union(*(one.local_layers for one in others))):
        wanting = tuple(n for n, one in enumerate(others) if local in one.local_layers)
        kinds.setdefault((local in sampled, wanting), []).append(local)
    # Of rows that differ in nothing but who wants them there is one list.
    alike: dict[tuple[bool, bytes], tuple[npt.NDArray[np.bool_], list[int]]] = {}
    for (in_sample, wanting), layers in kinds.items():
        wanted = np.zeros(len(rows), dtype=bool)
        for n in wanting:
            wanted[others[n].places] = True
        alike.setdefault((in_sample, wanted.tobytes()), (wanted, []))[1].extend(layers)
    lists = [
        _list(rows, counted if in_sample else np.zeros_like(counted), wanted, frozenset(layers))
        for (in_sample, _), (wanted, layers) in alike.items()
    ]
    return [one for one in lists if len(one.places)]


def _list(
    rows: npt.NDArray[np.int32],
    counted: npt.NDArray[np.bool_],
    wanted: npt.NDArray[np.bool_],
    local_layers: frozenset[int],
) -> RowList:
    places = np.flatnonzero(counted | wanted)
    listed = rows[places]
    listed[~counted[places], ROW_PHASE] |= ROW_UNCOUNTED
    listed[~wanted[places], ROW_SLOT] = -1
    return RowList(listed, places, local_layers)
