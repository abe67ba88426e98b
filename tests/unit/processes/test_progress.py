"""Which tokens of a step are new: against a scheduler that preempts, cuts prompts, takes caches and ends requests."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.adapter.runner import Batch
from glassbox.processes.worker.progress import RequestProgress
from tests.trace_samples import Continued, new_request, scheduled_step


def batch_of(requests: dict[str, tuple[int, int, int]]) -> Batch:
    """Of `(scheduled, computed, prompt length)` requests, by id."""
    scheduled, computed, prompt = (np.array(column, dtype=np.int32) for column in zip(*requests.values(), strict=True))
    return Batch(scheduled, computed, prompt, np.concatenate([[0], np.cumsum(scheduled)]), tuple(requests))


class Server:
    """One request at a time in vLLM's scheduler, which tells of it as of the V1 or the V2 runner's.

    Attributes:
        counted: positions that were new, in the order of the steps.
    """

    def __init__(self, v2: bool, prompt_len: int, extra_args: dict[str, Any] | None = None) -> None:
        self.progress = RequestProgress()
        self.counted: list[int] = []
        self._v2, self._prompt_len, self._extra_args = v2, prompt_len, extra_args
        self._known, self._computed, self._told, self._resumed = prompt_len, 0, False, False

    @property
    def num_generated(self) -> int:
        return self._known - self._prompt_len

    def preempt(self, cached: int) -> None:
        """The request has to go on from the first `cached` tokens of its prompt."""
        self._computed, self._resumed = min(cached, self._prompt_len - 1, self._computed), self._told

    def step(self, budget: int) -> None:
        """Computes at most `budget` tokens, and generates one when nothing else is left."""
        tokens = min(self._known - self._computed, budget)
        new, continued = [], Continued()
        if not self._told or (self._v2 and self._resumed):
            prefill = list(range(self._known)) if self._v2 else None
            new = [new_request("a", self._prompt_len, self._extra_args, prefill, self._computed)]
        else:
            continued = Continued(["a"], [self._computed], [self.num_generated], {"a"} if self._resumed else set())
        self.progress.begin_step(scheduled_step(new, {"a": tokens}, scheduled_cached_reqs=continued))
        batch = self.progress.of_client(batch_of({"a": (tokens, self._computed, self._prompt_len)}))
        new_from = int(self.progress.new_from(batch)[0])
        self.counted += range(max(self._computed, new_from), self._computed + tokens)
        self._told, self._resumed = True, False
        self._computed += tokens
        self._known += self._computed == self._known


class TestPreemption:
    @pytest.mark.parametrize("v2", [False, True])
    @given(
        prompt_len=st.integers(1, 20),
        events=st.lists(st.one_of(st.integers(1, 9), st.integers(-20, 0)), max_size=30),
    )
    @settings(max_examples=300, deadline=None)
    def test_each_token_is_new_once(self, v2: bool, prompt_len: int, events: list[int]) -> None:
        """However often a request starts again, amid its prompt or its answer, and wherever from."""
        server = Server(v2, prompt_len)
        for event in events:
            if event > 0:
                server.step(event)
            else:
                server.preempt(-event)
        assert server.counted == list(range(len(server.counted)))
        assert len(server.counted) >= server.num_generated - 1 + (prompt_len if server.num_generated else 0)

    @pytest.mark.parametrize("v2", [False, True])
    def test_gone_and_new_in_one_step(self, v2: bool) -> None:
        """Another request of the same id starts from its beginning."""
        server = Server(v2, 6)
        server.step(4)
        server.preempt(0)
        server.progress.begin_step(scheduled_step([new_request("a", 6)], {"a": 6}, {"a"}))
        assert server.progress.new_from(batch_of({"a": (6, 0, 6)})).tolist() == [0]

    def test_nothing_is_kept_of_those_that_are_gone(self) -> None:
        """Prompts in chunks, preempted requests and beams."""
        progress = RequestProgress()
        arrivals = [
            new_request("chunk", 9),
            new_request("again", 5, None, [0] * 7),
            new_request("beam", 8, {"glassbox_beam_prompt": 5}),
        ]
        progress.begin_step(scheduled_step(arrivals, {"chunk": 4, "again": 7, "beam": 8}))
        assert progress._chunked.keys() == {"chunk"}
        assert progress._before.keys() == {"again", "beam"}
        assert progress._beams.keys() == {"beam"}
        progress.begin_step(scheduled_step(finished_req_ids={"chunk", "again", "beam"}))
        assert {**progress._chunked, **progress._before, **progress._beams} == {}

    def test_whole_prompts_are_not_followed(self) -> None:
        """Of a prompt that one step computes nothing has to be remembered."""
        progress = RequestProgress()
        progress.begin_step(scheduled_step([new_request("a", 6, None, None, 4)], {"a": 2}))
        assert not progress._chunked


class TestBeams:
    @pytest.mark.parametrize("v2", [False, True])
    def test_one_token_is_new(self, v2: bool) -> None:
        """A beam of 3 tokens after a prompt of 5: the last one is, and the client's prompt ends before the three."""
        server = Server(v2, 8, {"glassbox_beam_prompt": 5})
        server.step(3)
        server.preempt(2)
        server.step(100)
        assert server.counted == [7]
        batch = batch_of({"other": (4, 0, 4), "a": (8, 0, 8)})
        assert server.progress.of_client(batch).prompt_len.tolist() == [4, 5]

    def test_the_first_request_of_a_search(self) -> None:
        """It has nothing but the client's prompt, all of which is new."""
        server = Server(False, 5, {"glassbox_beam_prompt": 5})
        server.step(100)
        assert server.counted == [0, 1, 2, 3, 4]

    def test_without_beams(self) -> None:
        """The batch is what it was."""
        batch = batch_of({"a": (4, 0, 4)})
        assert RequestProgress().of_client(batch) is batch
