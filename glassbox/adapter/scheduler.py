"""What a scheduler output says of requests: who is new, who is gone, who has which tokens in the step.

It is read on demand: most steps bring nothing new, and this is asked in every one of them.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from glassbox.adapter.internals import Feature, lacks
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
    def adapter(self) -> str | None:
        """Name of its LoRA adapter; None without one, and where it can't be told."""
        lora = None if lacks(Feature.ADAPTERS) else self._new.lora_request
        return None if lora is None else lora.lora_name

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
    def known_len(self) -> int:
        """Tokens of the prompt, and those that were generated before: the V2 runner is told of preempted ones anew."""
        prefill, prompt_len = self._new.prefill_token_ids, self.prompt_len
        return prompt_len if prefill is None else max(prompt_len, len(prefill))

    @property
    def resumed(self) -> bool:
        """It was preempted after its first token."""
        return self.known_len > self.prompt_len

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache already."""
        return self._new.num_computed_tokens


class Continued(NamedTuple):
    """A request that the runner knows and that has tokens in the step.

    Attributes:
        req_id: vLLM's internal id.
        num_computed: tokens whose keys and values are in the cache.
        num_generated: tokens that it has generated.
        resumed: it was preempted, and is computed again from `num_computed` on.
    """

    req_id: str
    num_computed: int
    num_generated: int
    resumed: bool


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

    @property
    def drafts(self) -> Mapping[str, Sequence[int]]:
        """Draft tokens, the last ones of their requests in this step, by internal id."""
        return self._output.scheduled_spec_decode_tokens

    def continued(self) -> Iterator[Continued]:
        """The requests that the runner knew before this output."""
        cached = self._output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        for req_id, computed, generated in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            yield Continued(req_id, computed, generated, req_id in resumed)

    @property
    def has_resumed(self) -> bool:
        """Whether some of `continued` were preempted."""
        return bool(self._output.scheduled_cached_reqs.resumed_req_ids)

    def arrivals(self) -> Iterator[Arrival]:
        """The requests that the runner is told of with this output."""
        return map(Arrival, self._output.scheduled_new_reqs)
