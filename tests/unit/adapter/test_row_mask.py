"""Which rows of a step see other keys than those up to their own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.adapter.row_mask import RowMask, read_mask
from glassbox.adapter.runner import Batch

# A prompt of 4 tokens, one of 6 of which 4 are new, and a request that decodes.
BATCH = Batch(
    num_scheduled=np.array([4, 4, 1]),
    num_computed=np.array([0, 2, 9]),
    prompt_len=np.array([4, 6, 5]),
    query_start=np.array([0, 4, 8, 9]),
    req_ids=("a", "b", "c"),
)
REQUESTS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
POSITIONS = np.array([0, 1, 2, 3, 2, 3, 4, 5, 9])


def read(causal: Any = True, ranges: Any = None) -> RowMask | None:
    metadata: Any = SimpleNamespace(causal=causal, mm_req_doc_ranges=ranges)
    return read_mask(BATCH, metadata)


def others(causal: Any = True, ranges: Any = None) -> list[int]:
    """Numbers of the rows that see other keys."""
    mask = read(causal, ranges)
    assert mask is not None
    found: list[int] = np.flatnonzero(mask.sees_others(REQUESTS, POSITIONS)).tolist()
    return found


@pytest.mark.parametrize("ranges", [None, {}])
def test_causal(ranges: Any) -> None:
    """Nothing to look at."""
    assert read(True, ranges) is None


def test_not_causal() -> None:
    """The last token of each request sees what a causal one does; so does one that decodes."""
    assert [0, 1, 2, 4, 5, 6] == others(causal=False)


def test_of_each_request() -> None:
    """The tensor is padded."""
    assert [4, 5, 6] == others(causal=torch.tensor([True, False, True, False]))


def test_unknown_on_the_host() -> None:
    """A tensor on a device would have to be waited for: no row but the last is taken for causal."""
    assert [0, 1, 2, 4, 5, 6] == others(causal=torch.ones(3, dtype=torch.bool, device="meta"))


def test_image_tokens() -> None:
    """All tokens of a range, also its last: across a sliding window it sees the range's first ones."""
    assert [1, 2, 4, 5] == others(ranges={0: [(1, 2)], 1: [(0, 3)]})
    assert [] == others(ranges={7: [(0, 9)]})  # of padding
