"""Which rows of a step see other keys than those up to their own, as vLLM's metadata says.

Owns the reading of the mask. Most rows are causal: they see the keys up to their own, or those of a window before it.
Prefix language models let the tokens of a prompt, or those of an image, see each other; what is computed of such a row
as of a causal one would be wrong without an error. So the mask is read in every measured step, never assumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glassbox.adapter.protocols import CommonMetadata
from glassbox.adapter.runner import Batch


@dataclass(frozen=True)
class RowMask:
    """Of a step whose rows are not all causal; B requests.

    Attributes:
        open: bool [B], requests whose rows see all keys that are there.
        ranges: by request, (first, last) positions of tokens that see each other, across any window.
        last: int64 [B], position of each request's last token in the step, behind which nothing is there.
    """

    open: npt.NDArray[np.bool_]
    ranges: Mapping[int, Sequence[tuple[int, int]]]
    last: npt.NDArray[np.int64]

    def sees_others(
        self, requests: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.bool_]:
        """Whether rows see other keys than a causal row does.

        Args:
            requests: [R] batch rows; positions: [R] in their sequences.

        Returns:
            bool [R].
        """
        others: npt.NDArray[np.bool_] = self.open[requests] & (positions < self.last[requests])
        for request, ranges in self.ranges.items():
            for first, last in ranges:
                others |= (requests == request) & (positions >= first) & (positions <= last)
        return others


class MaskError(ValueError):
    """Layers of one step see their keys through different masks."""


def read_mask(batch: Batch, common_attn_metadata: CommonMetadata) -> RowMask | None:
    """The mask of a step; None if all of its rows are causal.

    Args:
        batch: of the step.
        common_attn_metadata: what the builder of some layers was given.
    """
    causal = common_attn_metadata.causal
    ranges = common_attn_metadata.mm_req_doc_ranges or {}
    if causal is True and not ranges:
        return None
    num_reqs = len(batch.req_ids)
    if isinstance(causal, Tensor):
        # On a device it can't be looked at without waiting: then any row may look ahead.
        known = causal[:num_reqs].numpy() if causal.device.type == "cpu" else np.zeros(num_reqs, dtype=bool)
        is_open = ~known.astype(bool)
    else:
        is_open = np.full(num_reqs, not causal)
    last = np.asarray(batch.num_computed + batch.num_scheduled, dtype=np.int64) - 1
    return RowMask(is_open, {request: of for request, of in ranges.items() if request < num_reqs}, last)
