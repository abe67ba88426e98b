"""The listener is told of the real batch of chunked local attention, never of the virtual one."""

from typing import Any

import pytest

from glassbox.adapter.attention.observed import _observe_builder
from glassbox.adapter.seat import SEAT


class Inner:
    """A backend's builder; it may be told to use another's metadata with a block table of its own."""

    layer_names = ("a",)

    def build(self, common_prefix_len: int, common_attn_metadata: str) -> str:
        return f"metadata of {common_attn_metadata}"

    def update_block_table(self, metadata: str, block_table: str, slot_mapping: str) -> str:
        return f"{metadata} with {block_table}"


Observed: Any = _observe_builder(Inner)


class ChunkedLocalAttentionBuilder(Observed):
    """As vLLM derives it."""

    def build(self, common_prefix_len: int, common_attn_metadata: str) -> str:
        if common_attn_metadata == "bad":
            raise ValueError("no")
        metadata: str = super().build(common_prefix_len, f"virtual {common_attn_metadata}")
        return metadata

    def update_block_table(self, metadata: str, block_table: str, slot_mapping: str) -> str:
        updated: str = super().update_block_table(metadata, f"virtual {block_table}", slot_mapping)
        return updated


class OtherBuilder(Observed):
    """One that changes the mask: what the inner builder is given is what counts."""

    def build(self, common_prefix_len: int, common_attn_metadata: str) -> str:
        metadata: str = super().build(common_prefix_len, f"open {common_attn_metadata}")
        return metadata


class Told:
    """What a listener hears."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_build(self, *args: Any) -> None:
        self.calls.append(args)

    def on_block_table(self, *args: Any) -> None:
        self.calls.append(args)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    listener = Told()
    monkeypatch.setattr(SEAT, "listener", listener)
    return listener


def test_chunks(told: Told) -> None:
    """vLLM's own metadata is what it was; the batch that is told is the one that the outer builder was given."""
    builder = ChunkedLocalAttentionBuilder()
    assert "metadata of virtual batch" == builder.build(0, "batch")
    assert "metadata with virtual table" == builder.update_block_table("metadata", "table", "slots")
    assert [(("a",), "batch"), (("a",), "table")] == told.calls


def test_one_that_fails(told: Told) -> None:
    """The next one is told again."""
    builder = ChunkedLocalAttentionBuilder()
    with pytest.raises(ValueError, match="no"):
        builder.build(0, "bad")
    builder.build(0, "batch")
    assert [(("a",), "batch")] == told.calls


def test_others(told: Told) -> None:
    """Encoder-only and prefix wrappers change the metadata on its way; that is what the layer computes with."""
    assert "metadata of open batch" == OtherBuilder().build(0, "batch")
    assert [(("a",), "open batch")] == told.calls
