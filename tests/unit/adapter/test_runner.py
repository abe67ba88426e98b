"""What is read of vLLM's runners that needs no vLLM to test."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import torch

from glassbox.adapter.runner import Batch, BatchMismatchError, TokenCopy, check_batch, read_batch, until_end

PROMPT = [11, 12, 13]
EOS, STOP = 2, 7


def copied(generated: list[int], behind: list[int] | None = None, **params: Any) -> TokenCopy:
    """A runner's row: the request's tokens, and behind them what is left of another request."""
    ids = np.array([*PROMPT, *generated, *(behind or [99, 98])], dtype=np.int32)
    given = {"eos_token_id": EOS, "stop_token_ids": [STOP], "max_tokens": None, **params}
    return TokenCopy(None, ids, np.int64(len(PROMPT) + len(generated)), len(PROMPT), SimpleNamespace(**given))


class TestTokenCopy:
    def test_prompt_and_answer(self) -> None:
        """As long as the runner says, and no longer."""
        tokens = copied([5, 6, EOS]).tokens()
        assert (tokens.prompt, tokens.generated) == (PROMPT, [5, 6, EOS])

    def test_a_pooling_request(self) -> None:
        """It has no sampling parameters and generates nothing."""
        tokens = until_end(TokenCopy(None, np.array(PROMPT), np.int64(3), 3, None).tokens())
        assert (tokens.prompt, tokens.generated) == (PROMPT, [])


class TestUntilEnd:
    @pytest.mark.parametrize("end", [EOS, STOP])
    def test_a_token_after_the_end(self, end: int) -> None:
        """Asynchronous scheduling may have computed one more step: the client never got its token."""
        assert until_end(copied([5, end, 8]).tokens()).generated == [5, end]

    def test_drafts_behind_the_last_token(self) -> None:
        """A step may keep more drafts than the answer has room for."""
        assert until_end(copied([5, 6, 8, 9], max_tokens=2).tokens()).generated == [5, 6]
        assert until_end(copied([5], max_tokens=2).tokens()).generated == [5]

    def test_ends_that_are_none(self) -> None:
        """With ignore_eos vLLM gives no end token."""
        tokens = copied([EOS, 5, 6], eos_token_id=None, stop_token_ids=[]).tokens()
        assert until_end(tokens).generated == [EOS, 5, 6]


# Three requests: a whole prompt, a chunk and a decode.
SCHEDULED: Final = {"a": 6, "b": 4, "c": 1}
COMPUTED: Final = np.array([0, 8, 20], dtype=np.int32)
PROMPTS: Final = np.array([6, 40, 12], dtype=np.int32)
STARTS: Final = np.array([0, 6, 10, 11], dtype=np.int32)


def metadata(seq_lens: list[int] | None = None, device: str = "cpu") -> Any:
    """What a builder is given; like vLLM's buffers it goes on behind the batch."""
    lengths = [6, 12, 21] if seq_lens is None else seq_lens
    return SimpleNamespace(
        seq_lens=torch.tensor([*lengths, 99], dtype=torch.int32, device=device),
        query_start_loc_cpu=torch.tensor([*STARTS, 11, 11], dtype=torch.int32),
    )


def v1_runner() -> Any:
    batch = SimpleNamespace(
        num_reqs=3,
        num_computed_tokens_cpu=np.append(COMPUTED, 77),
        num_prompt_tokens=np.append(PROMPTS, 88),
        req_ids=["a", "b", "c", "old"],
    )
    return SimpleNamespace(input_batch=batch)


def v2_runner() -> tuple[Any, Any]:
    """The runner, whose requests stand in other places than in the batch, and what it has prepared."""
    places = np.array([4, 0, 2], dtype=np.int32)
    computed, prompts = np.full(5, 77, dtype=np.int32), np.full(5, 88, dtype=np.int32)
    computed[places], prompts[places] = COMPUTED, PROMPTS
    states = SimpleNamespace(num_computed_tokens_np=computed, prompt_len=SimpleNamespace(np=prompts))
    prepared = SimpleNamespace(
        num_reqs=3,
        idx_mapping_np=np.append(places, 1),
        req_ids=["a", "b", "c"],
        query_start_loc_np=np.append(STARTS, [11, 11]),
    )
    return SimpleNamespace(req_states=states), prepared


def healthy() -> Batch:
    return read_batch(v1_runner(), None, metadata())


class TestReadBatch:
    @pytest.mark.parametrize("release", ["v1", "v2"])
    def test_both_runners(self, release: str) -> None:
        """Requests in the order of the batch, without padding and without what is left of others."""
        runner, prepared = v2_runner() if release == "v2" else (v1_runner(), None)
        batch = read_batch(runner, prepared, metadata())
        assert ("a", "b", "c") == batch.req_ids
        assert list(SCHEDULED.values()) == batch.num_scheduled.tolist()
        assert (COMPUTED.tolist(), PROMPTS.tolist()) == (batch.num_computed.tolist(), batch.prompt_len.tolist())
        assert STARTS.tolist() == batch.query_start.tolist()
        check_batch(batch, SCHEDULED, metadata(), exact=True)

    def test_v2_pads_its_requests(self) -> None:
        """The mapping of a captured batch is longer than the requests."""
        runner, prepared = v2_runner()
        prepared.num_reqs, prepared.req_ids = 2, ["a", "b"]
        assert ([6, 4], [0, 8]) == tuple(
            x.tolist()
            for x in (
                read_batch(runner, prepared, metadata()).num_scheduled,
                read_batch(runner, prepared, metadata()).num_computed,
            )
        )

    def test_v2_without_a_prepared_batch(self) -> None:
        """Its rows are nobody's: it says what is missing."""
        runner, _ = v2_runner()
        with pytest.raises(AttributeError, match="nor req_states and a prepare_inputs that was called; its rows can't"):
            read_batch(runner, None, metadata())

    def test_another_runner(self) -> None:
        """It has neither."""
        with pytest.raises(AttributeError, match="SimpleNamespace has no input_batch"):
            read_batch(SimpleNamespace(), v2_runner()[1], metadata())


class TestCheckBatch:
    @pytest.mark.parametrize(
        ("req_ids", "found"),
        [
            (("a", "b"), "got 2, of which 0 were not"),
            (("a", "b", "old"), "got 3, of which 1 were not"),
            (("a", "b", "b"), "got 3, of which 0 were not"),
            (("a", "b", "c", "old"), "got 4, of which 1 were not"),
        ],
    )
    def test_other_requests(self, req_ids: tuple[str, ...], found: str) -> None:
        """One too few, one of another step, one twice, one too many."""
        with pytest.raises(BatchMismatchError, match=f"must be the 3 that were scheduled, {found}; this step is not"):
            check_batch(replace(healthy(), req_ids=req_ids), SCHEDULED, metadata(), exact=True)

    def test_other_order_of_names(self) -> None:
        """Rows of one request would be told as another's."""
        with pytest.raises(BatchMismatchError, match="the tokens of each request must be those that were scheduled"):
            check_batch(replace(healthy(), req_ids=("b", "a", "c")), SCHEDULED, metadata(), exact=True)

    def test_other_order_of_lengths(self) -> None:
        """Decode steps schedule one token of each, so the order shows in the lengths of the sequences alone."""
        scheduled = dict.fromkeys(SCHEDULED, 1)
        batch = Batch(np.ones(3, dtype=np.int32), COMPUTED, PROMPTS, np.arange(4, dtype=np.int32), ("a", "b", "c"))
        check_batch(batch, scheduled, metadata([1, 9, 21]), exact=True)
        with pytest.raises(BatchMismatchError, match=r"sequence lengths .* rows are in another order"):
            check_batch(batch, scheduled, metadata([9, 1, 21]), exact=True)

    def test_first_row(self) -> None:
        """Rows that don't begin at 0 are another's."""
        with pytest.raises(BatchMismatchError, match="the rows of a batch must begin at 0, got 2"):
            check_batch(replace(healthy(), query_start=STARTS + 2), SCHEDULED, metadata(), exact=True)

    def test_lengths_that_the_host_does_not_have(self) -> None:
        """They are not waited for."""
        check_batch(healthy(), SCHEDULED, metadata(device="meta"), exact=True)

    def test_drafts_that_are_left_out(self) -> None:
        """Adaptive verification computes fewer tokens than were scheduled, and at least one; never more."""
        scheduled = {"a": 6, "b": 7, "c": 3}
        check_batch(healthy(), scheduled, metadata([6, 15, 23]), exact=False)
        with pytest.raises(BatchMismatchError, match="the tokens of each request"):
            check_batch(healthy(), scheduled, metadata([6, 15, 23]), exact=True)
        for wrong in ({"a": 6, "b": 3, "c": 1}, {"a": 5, "b": 4, "c": 1}):
            with pytest.raises(BatchMismatchError, match="the tokens of each request"):
                check_batch(healthy(), wrong, metadata(), exact=False)
        none = replace(healthy(), num_scheduled=np.array([6, 4, 0]))
        with pytest.raises(BatchMismatchError, match="the tokens of each request"):
            check_batch(none, SCHEDULED, metadata(), exact=False)
