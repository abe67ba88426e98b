"""What a scheduler output says of requests: who is new, who is gone, who has tokens in the step.

It is read on demand: most steps bring nothing new, and this is asked in every one of them.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from glassbox.adapter.protocols import NewRequest, SamplingParams, SchedulerOutput


@dataclass(frozen=True)
class Arrival:
    """A request that the runner is told of.

    Attributes:
        req_id: vLLM's internal id.
        extra_args: of its sampling parameters, None if it has none.
        prompt_len: tokens.
        resumed: it was preempted: the V2 runner is told of those anew.
        sampling_params: vLLM's own, for `runner.copy_tokens`; None for a pooling request.
    """

    req_id: str
    extra_args: Mapping[str, Any] | None
    prompt_len: int
    resumed: bool
    sampling_params: SamplingParams | None


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

    def arrivals(self) -> list[Arrival]:
        """The requests that the runner is told of with this output."""
        return [_arrival(new) for new in self._output.scheduled_new_reqs]


def _arrival(new: NewRequest) -> Arrival:
    params, prefill = new.sampling_params, new.prefill_token_ids
    return Arrival(
        req_id=new.req_id,
        extra_args=None if params is None else params.extra_args,
        prompt_len=new.prompt_len,
        resumed=prefill is not None and len(prefill) > new.prompt_len,
        sampling_params=params,
    )
