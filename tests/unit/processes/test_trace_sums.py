"""What a request's rows add up to: each counts once, and only if it stays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from glassbox.kernels.probe_answers import PromptAnswers
from glassbox.processes.worker.traces.sums import SummedRow, SumSizes, TraceSums, singular_values

LAYERS, HEADS, DIM = 2, 4, 6
PLACE = (LAYERS, HEADS)


@dataclass
class Drafts:
    kept_to: int


class Request:
    """Random attention, queries and keys of a sequence, two query heads sharing a KV head."""

    def __init__(self, length: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.attention = np.tril(rng.random((*PLACE, length, length), np.float32))
        self.queries = rng.standard_normal((length, *PLACE, DIM), np.float32)
        self.keys = rng.standard_normal((length, LAYERS, HEADS // 2, DIM), np.float32).repeat(2, 2)

    def row(self, position: int, drafts: Any = None) -> SummedRow:
        seen = self.attention[..., position, : position + 1]
        return SummedRow(position, seen, self.queries[position], self.keys[position], drafts)

    def squares(self, rows: range, end: int) -> np.ndarray:
        """Of the attention to each position from later rows, [L, H, end]."""
        earlier = np.tril(self.attention.astype(np.float64), -1)
        return np.asarray((earlier[:, :, rows, :end] ** 2).sum(2))

    def prompt(self, layer: int, first: int, end: int, keys_from: int) -> PromptAnswers[Any]:
        q, k = self.queries[first:end, layer], self.keys[keys_from:end, layer, ::2]
        nothing = np.zeros(0, np.float32)
        return PromptAnswers(
            nothing, nothing, nothing, self.attention[layer, :, first:end, :end].sum(1), 2,
            np.einsum("nhd,nhe->hde", q, q, dtype=np.float64), np.einsum("nhd,nhe->hde", k, k, dtype=np.float64),
            q, k, np.ones((HEADS, 4), np.float32), self.squares(range(first, end), end)[layer],
        )  # fmt: skip

    def add_prompt(self, sums: TraceSums, first: int, end: int) -> None:
        answers = [(layer, range(HEADS), self.prompt(layer, first, end, sums.keys_to)) for layer in range(LAYERS)]
        sums.add_prompt(end, sums.keys_to, answers)
        sums.keys_to = end

    def check(self, sums: TraceSums, rows: range, end: int, before: int | None = None) -> None:
        found, without_key = sums.arrays(end, before)
        assert 0 == without_key
        received = self.attention[:, :, rows, :end].astype(np.float64).sum(2)
        np.testing.assert_allclose(found["received"], received, rtol=1e-6)
        np.testing.assert_allclose(found["received_squares"], self.squares(rows, end), rtol=1e-6)
        np.testing.assert_array_equal(found["keys"], self.keys[:end])
        for layer, head in np.ndindex(PLACE):
            product = self.queries[rows, layer, head].astype(np.float64) @ self.keys[:end, layer, head].T
            expected = np.linalg.svd(product, compute_uv=False)[:DIM]
            np.testing.assert_allclose(found["singular_values"][layer, head, :DIM], expected, rtol=1e-5)
            assert (found["singular_values"][layer, head, DIM:] == 0).all()


def new_sums(**changes: bool) -> TraceSums:
    every = dict.fromkeys(("received", "grams", "kept", "squares"), True)
    return TraceSums(SumSizes(LAYERS, HEADS, DIM, **(every | changes)))


class TestRows:
    def test_a_prompt_in_chunks_and_its_answer(self) -> None:
        """At any time all rows that are there count, those that wait included."""
        request, sums = Request(60), new_sums()
        request.add_prompt(sums, 0, 7)
        request.add_prompt(sums, 7, 12)
        for position in range(12, 60):
            sums.add_rows([request.row(position)])
            if position in (12, 17, 45, 59):
                request.check(sums, range(position + 1), position + 1)

    def test_a_prefix_from_the_cache(self) -> None:
        """It has keys, and no rows."""
        request, sums = Request(20), new_sums()
        request.add_prompt(sums, 8, 20)
        request.check(sums, range(8, 20), 20)

    def test_drafts(self) -> None:
        """Those that were not kept never count, whether they are looked at early or late."""
        request, other, sums = Request(40), Request(40, seed=1), new_sums()
        request.add_prompt(sums, 0, 10)
        position = 10
        while position < 38:
            drafts = Drafts(position + 1)
            rows = [request.row(position, drafts), request.row(position + 1, drafts), other.row(position + 2, drafts)]
            sums.add_rows(rows)
            request.check(sums, range(position + 1), position + 1)
            drafts.kept_to = position + 2
            request.check(sums, range(position + 2), position + 2)
            position += 2

    def test_computed_again(self) -> None:
        """A row counts once, however late it comes again."""
        request, sums = Request(30), new_sums()
        request.add_prompt(sums, 0, 5)
        for position in (*range(5, 20), *range(8, 30)):
            sums.add_rows([request.row(position)])
        request.check(sums, range(30), 30)

    def test_beyond_the_end(self) -> None:
        """A step that was queued before the end was known computes a token more."""
        request, sums = Request(12), new_sums()
        request.add_prompt(sums, 0, 10)
        sums.add_rows([request.row(10)])
        sums.add_rows([request.row(11)])
        request.check(sums, range(11), 11, before=11)


class TestMissing:
    def test_a_place_without_an_answer(self) -> None:
        """It has no value at what the unanswered rows see, and no products."""
        request, sums = Request(12), new_sums()
        sums.add_prompt(6, 0, [(0, range(HEADS), request.prompt(0, 0, 6, 0)), (1, range(3), self.three(request))])
        sums.keys_to = 6
        for position in range(6, 12):
            sums.add_rows([request.row(position)])
        found, _ = sums.arrays(12, None)
        assert np.isnan(found["received"]).any(-1).tolist() == [[False] * 4, [False, False, False, True]]
        for name in ("received", "received_squares"):
            assert np.isnan(found[name]).sum((0, 1)).tolist() == [1] * 6 + [0] * 6
            assert np.isnan(found[name][1, 3]).tolist() == [True] * 6 + [False] * 6
        assert np.isnan(found["singular_values"]).any(-1).tolist() == [[False] * 4, [False, False, False, True]]

    @staticmethod
    def three(request: Request) -> PromptAnswers[Any]:
        """Of a layer with three heads."""
        whole = request.prompt(1, 0, 6, 0)
        cut = {
            name: getattr(whole, name)[:3] for name in ("received", "query_gram", "score_params", "received_squares")
        }
        queries = request.queries[:6, 1, :3]
        return PromptAnswers(
            whole.stats, whole.previous_mass, whole.span_mass, cut["received"], 2, cut["query_gram"], whole.key_gram,
            queries, whole.keys, cut["score_params"], cut["received_squares"],
        )  # fmt: skip

    def test_steps_that_were_not_measured(self) -> None:
        """The positions without a key are counted."""
        request, sums = Request(20), new_sums()
        request.add_prompt(sums, 0, 10)
        for position in (10, 13, 14, 19):
            sums.add_rows([request.row(position)])
        assert 6 == sums.arrays(20, None)[1]

    def test_keys_are_dropped(self) -> None:
        """What else is kept goes on."""
        request, sums = Request(12), new_sums()
        request.add_prompt(sums, 0, 10)
        sums.drop_keys()
        sums.add_rows([request.row(10)])
        found, _ = sums.arrays(11, None)
        assert {"received", "received_squares", "singular_values"} == found.keys()

    def test_nothing_but_received(self) -> None:
        """No keys are missing where none were asked for."""
        request, sums = Request(12), new_sums(grams=False, kept=False, squares=False)
        request.add_prompt(sums, 0, 10)
        sums.add_rows([SummedRow(11, request.attention[..., 11, :], None, None, None)])
        found, without_key = sums.arrays(12, None)
        assert ({"received"}, 0) == (found.keys(), without_key)
        assert 0 == sums.sizes.fixed_nbytes


class TestSingularValues:
    def test_more_than_are_kept(self) -> None:
        """The largest 16 of 40."""
        rng = np.random.default_rng(0)
        q, k = rng.standard_normal((2, 90, 40))
        found = singular_values(q.T @ q, k.T @ k)
        np.testing.assert_allclose(found, np.linalg.svd(q @ k.T, compute_uv=False)[:16], rtol=1e-6)

    def test_not_finite(self) -> None:
        """One place doesn't take the others with it."""
        gram = np.stack([np.eye(3), np.full((3, 3), np.nan)])
        found = singular_values(gram, np.stack([4 * np.eye(3)] * 2))
        assert found[0, :4].tolist() == pytest.approx([2, 2, 2, 0])
        assert np.isnan(found[1]).all()
