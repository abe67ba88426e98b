"""What a scheduler output says of requests: who is new, who is gone, who has tokens in the step.

It is read on demand: most steps bring nothing new, and this is asked in every one of them.
"""

from collections.abc import Iterator, Mapping, Set
from typing import Any

from glassbox.adapter.protocols import NewRequest, SamplingParams, SchedulerOutput


class Arrival:
    """A request that the runner is told of.

    Args:
        new: vLLM's.
    """

    __slots__ = ("_new",)

    def __init__(self, new: NewRequest) -> None:
        self._new = new

    @property
    def req_id(self) -> str:
        """vLLM's internal id."""
        return self._new.req_id

    @property
    def sampling_params(self) -> SamplingParams | None:
        """vLLM's own, for `runner.copy_tokens`; None for a pooling request."""
        return self._new.sampling_params

    @property
    def extra_args(self) -> Mapping[str, Any] | None:
        """Of its sampling parameters, None if it has none."""
        params = self._new.sampling_params
        return None if params is None else params.extra_args

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt.

        Raises:
            AttributeError: it can't be told.
        """
        new = self._new
        # Before 0.29 it has none.
        known = getattr(new, "prompt_len", None)
        if known is None:
            held = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
            known = len(held)  # of embeddings [tokens, D], too
        return int(known)

    @property
    def resumed(self) -> bool:
        """It was preempted: the V2 runner is told of those anew."""
        prefill = self._new.prefill_token_ids
        return prefill is not None and len(prefill) > self.prompt_len


class ScheduledStep:
    """One scheduler output.

    Args:
        output: vLLM's.
    """

    __slots__ = ("_output",)

    def __init__(self, output: SchedulerOutput) -> None:
        self._output = output

    @property
    def num_tokens(self) -> int:
        """Tokens of the step; 0 if it only tells who is gone."""
        return self._output.total_num_scheduled_tokens

    @property
    def scheduled(self) -> Mapping[str, int]:
        """Tokens of each request in this step, by internal id."""
        return self._output.num_scheduled_tokens

    @property
    def finished(self) -> Set[str]:
        """Internal ids of the requests that are gone; one may come again in the same output."""
        return self._output.finished_req_ids

    def arrivals(self) -> Iterator[Arrival]:
        """The requests that the runner is told of with this output."""
        return map(Arrival, self._output.scheduled_new_reqs)
