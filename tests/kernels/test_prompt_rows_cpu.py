"""All rows of a chunk of a prompt on the CPU equal the float64 reference, whatever the layer and the chunk are like."""

from typing import Any

import numpy as np
import pytest
import torch

from glassbox.core.statistics import NUM_STATISTICS
from glassbox.kernels import prompt_rows_cpu as kernel
from glassbox.kernels.probe_answers import PromptAnswers, kv_heads
from glassbox.kernels.prompt_rows_cpu import PromptChunk, PromptWishes, prompt_rows_cpu
from glassbox.kernels.reference.prompt_rows import received_squares_ref
from glassbox.kernels.reference.row_probe import row_probe_ref, span_mass_ref
from tests.kernels.test_row_stats_cpu import Batch, PlainReader, implementation

__all__ = ["implementation"]  # a fixture of this module, too

ROUNDING = 2.0**-23
SPANS = ((0, 3), (20, 60))
ALL: dict[str, Any] = {"squares": True, "grams": True, "kept": True}


def one_chunk(length: int, query: int, **options: Any) -> Batch:
    """The last `query` tokens of a prompt, all of them rows."""
    heads = {"num_heads": 6, "num_kv_heads": 2}
    return Batch([(length, query, length)], [(0, i) for i in range(query)], **heads | options)


def measure(batch: Batch, heads: tuple[int, ...] | None = None, **asked: Any) -> PromptAnswers[torch.Tensor]:
    pages, table = batch.cache()
    count = -(-batch.lengths[0][0] // batch.block_size)
    chunk = PromptChunk(
        batch.q, batch.positions[0], PlainReader(pages, batch.transposed), torch.from_numpy(table[0, :count]).long(),
        batch.block_size, batch.params,
    )  # fmt: skip
    spans = torch.tensor(SPANS, dtype=torch.int32)
    chosen = tuple(range(batch.num_heads)) if heads is None else heads
    wishes = PromptWishes(chosen, spans, sink_tokens=batch.sink_tokens, local_window=batch.local_window, **asked)
    return prompt_rows_cpu(chunk, wishes, native=Batch.native)


def attention(batch: Batch) -> list[np.ndarray]:
    """float64 [H, position + 1] of each row."""
    return [
        row_probe_ref(
            batch.q[i], batch.keys[0], position, scale=batch.scale, sliding_window=batch.window,
            chunk_size=batch.chunk, soft_cap=batch.soft_cap, alibi_slopes=batch.slopes, sinks=batch.learned,
        ).numpy()
        for i, position in enumerate(batch.positions)
    ]  # fmt: skip


def check(batch: Batch) -> PromptAnswers[torch.Tensor]:
    found = measure(batch, squares=True)
    assert found.received_squares is not None
    assert (len(batch.rows), batch.num_heads, NUM_STATISTICS + 1) == found.stats.shape
    batch.check_statistics(found.stats)
    expected = attention(batch)
    # A score's error is an error of its exponential; masses are at most 1.
    tolerance = 16 * ROUNDING * max(2.0, batch.magnitude())
    previous = [p[:, -2] if p.shape[1] > 1 else np.full(len(p), np.nan) for p in expected]
    np.testing.assert_allclose(found.previous_mass, previous, rtol=0, atol=tolerance)
    masses = [[[span_mass_ref(of_head, *span) for span in SPANS] for of_head in torch.from_numpy(p)] for p in expected]
    np.testing.assert_allclose(found.span_mass, masses, rtol=0, atol=10 * tolerance)
    received = np.zeros((batch.num_heads, batch.lengths[0][0]))
    for p in expected:
        received[:, : p.shape[1]] += p
    np.testing.assert_allclose(found.received, received, rtol=4 * ROUNDING, atol=len(expected) * tolerance)
    squares = received_squares_ref([torch.from_numpy(p) for p in expected], [0] * len(expected))
    np.testing.assert_allclose(found.received_squares, squares, rtol=4 * ROUNDING, atol=2 * len(expected) * tolerance)
    return found


class TestAgainstReference:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"transposed": True},
            {"dtype": torch.bfloat16},
            {"window": 9},
            {"window": 1},
            {"chunk": 16},
            {"soft_cap": 5.0},
            {"alibi": True},
            {"sinks": True},
            {"sinks": True, "window": 30, "soft_cap": 3.0, "alibi": True},
            {"gain": 30.0},
            {"num_heads": 4, "num_kv_heads": 4, "head_size": 80},
            {"num_heads": 5, "num_kv_heads": 1, "block_size": 32},
        ],
    )
    @pytest.mark.parametrize(("length", "query"), [(1, 1), (97, 97), (200, 45)])
    def test_any_layer(self, length: int, query: int, options: dict[str, Any]) -> None:
        """A whole prompt, one token, and a chunk that follows others."""
        check(one_chunk(length, query, **options))

    @pytest.mark.parametrize("scores", [1, 3000])
    def test_tiles(self, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """However small they are, nothing changes but by rounding."""
        monkeypatch.setattr(kernel, "_TILE_SCORES", scores)
        check(one_chunk(97, 97))
        check(one_chunk(200, 45, window=20))

    def test_chosen_heads(self) -> None:
        """They are those of all heads, and of the KV heads the ones that they share."""
        batch = one_chunk(60, 20)
        whole, some = measure(batch, **ALL), measure(batch, (1, 4, 5), **ALL)
        for name in ("stats", "previous_mass", "span_mass"):
            np.testing.assert_array_equal(getattr(whole, name)[:, [1, 4, 5]], getattr(some, name), err_msg=name)
        for name in ("received", "received_squares", "query_gram"):
            np.testing.assert_array_equal(getattr(whole, name)[[1, 4, 5]], getattr(some, name), err_msg=name)
        one = measure(batch, (5,), **ALL)
        assert ([0, 1], [1]) == (kv_heads((1, 4, 5), some.group), kv_heads((5,), one.group))
        assert one.key_gram is not None
        assert one.keys is not None
        np.testing.assert_array_equal(whole.key_gram[1:], one.key_gram)
        np.testing.assert_array_equal(whole.keys[:, 1:], one.keys)
        assert (20, 0, NUM_STATISTICS + 1) == measure(batch, (), **ALL).stats.shape
        with pytest.raises(ValueError, match="heads must be below 6, got 6; ask for those that the layer has"):
            measure(batch, (6,))


class TestNotFinite:
    @pytest.mark.parametrize("soft_cap", [None, 5.0])
    def test_a_row(self, soft_cap: float | None) -> None:
        """It has no numbers, nor have the positions that it sees, in its head alone."""
        batch = one_chunk(40, 20, soft_cap=soft_cap, window=10)
        batch.q[7, 2] = torch.inf  # at position 27
        found = measure(batch, squares=True)
        assert found.received_squares is not None
        batch.check_statistics(found.stats)
        assert found.stats[7, 2, NUM_STATISTICS] == 1
        assert [(7, 2)] == found.previous_mass.isnan().nonzero().apply_(int).tolist() or found.previous_mass[
            7, 2
        ].isnan()
        assert list(range(18, 28)) == found.received[2].isnan().nonzero().flatten().tolist()
        assert not found.received[[0, 1, 3, 4, 5]].isnan().any()
        assert [[2, at] for at in range(18, 27)] == found.received_squares.isnan().nonzero().tolist(), "of later rows"


class TestQueriesAndKeys:
    @pytest.mark.parametrize("window", [None, 10])
    def test_sums_of_products(self, window: int | None) -> None:
        """The Gram matrices give the singular values of the rows' and keys' Q K^T; earlier keys are in, if asked."""
        batch = one_chunk(70, 40, window=window)
        found = measure(batch, keys_from=10, **ALL)
        q, k = batch.q.double(), batch.keys[0][10:].double()
        np.testing.assert_allclose(found.query_gram, torch.einsum("nhd,nhe->hde", q, q), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.key_gram, torch.einsum("nhd,nhe->hde", k, k), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(found.queries, batch.q)
        np.testing.assert_array_equal(found.keys, batch.keys[0][10:])
        for head in range(batch.num_heads):
            largest = torch.linalg.svdvals(q[:, head] @ k[:, head // found.group].T)[:4]
            product = found.query_gram[head] @ found.key_gram[head // found.group]
            values = torch.linalg.eigvals(product).real.sort(descending=True).values[:4].sqrt()
            np.testing.assert_allclose(values, largest, rtol=1e-9)

    def test_not_asked(self) -> None:
        """Then there is none."""
        found = measure(one_chunk(20, 20))
        assert (None,) * 5 == (found.query_gram, found.key_gram, found.queries, found.keys, found.score_params)
        assert found.received_squares is None

    def test_what_scores_depend_on(self) -> None:
        """0 is no cap and no window, NaN no sink; a scale of NaN says that there is more to it."""
        plain = measure(one_chunk(20, 20), **ALL).score_params
        np.testing.assert_array_equal([[0.125, 0, 0, np.nan]] * 6, plain)
        batch = one_chunk(20, 20, window=7, soft_cap=5.0, sinks=True)
        all_of_it = measure(batch, (1, 5), **ALL).score_params
        assert batch.learned is not None
        np.testing.assert_array_equal([[0.125, 5, 7, batch.learned[head]] for head in (1, 5)], all_of_it)
        for options in ({"alibi": True}, {"chunk": 16}):
            assert measure(one_chunk(20, 20, **options), **ALL).score_params[:, 0].isnan().all()
