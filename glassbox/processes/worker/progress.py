"""How far each request had got before: which of a step's tokens are computed again, and which were generated.

Owns what a batch alone doesn't tell. A preempted request's tokens are computed anew when it is resumed, and vLLM's beam
search makes a request of each beam's every token, whose prompt holds what was generated so far. Their rows must not be
counted twice, nor the answer's as the prompt's. It costs a step a few look-ups, and more only for requests that were
preempted, beams, and prompts that come in chunks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from glassbox.adapter.runner import Batch
from glassbox.adapter.scheduler import Arrival, ScheduledStep
from glassbox.core.trace_options import BEAM_PROMPT_KEY


@dataclass
class _Chunked:
    """A prompt that is not whole yet.

    Attributes:
        length: its tokens.
        at: tokens computed, after the latest step; furthest: the most that ever were.
    """

    length: int
    at: int
    furthest: int


@dataclass(frozen=True)
class _Before:
    """The tokens of a request that were computed before it was told of again.

    Attributes:
        prompt_len: of its prompt; None is all of it, whose length the batch tells.
        num_generated: after those.
    """

    prompt_len: int | None
    num_generated: int


class RequestProgress:
    """The requests of one worker, as far as they had got before; all methods belong to the step thread."""

    def __init__(self) -> None:
        # All by vLLM's internal id, until the request is gone.
        self._chunked: dict[str, _Chunked] = {}
        self._before: dict[str, _Before] = {}
        # Tokens of the client's own prompt.
        self._beams: dict[str, int] = {}

    def begin_step(self, step: ScheduledStep) -> None:
        """Hear of a step; one without tokens tells who is gone, too."""
        if self._chunked or self._before or self._beams:
            self._forget(step.finished)
        if step.has_resumed:
            for request in step.continued():
                if request.resumed:
                    self._resume(request.req_id, request.num_computed, request.num_generated)
        chunked = {new.req_id: self._arrive(new, step.scheduled.get(new.req_id, 0)) for new in step.arrivals()}
        if self._chunked:
            self._advance(step.scheduled)
        self._chunked.update((req_id, one) for req_id, one in chunked.items() if one is not None)

    def of_client(self, batch: Batch) -> Batch:
        """The batch, with the prompts that clients have sent: a beam's is shorter than its request's."""
        if not self._beams:
            return batch
        own = [self._beams.get(req_id, n) for req_id, n in zip(batch.req_ids, batch.prompt_len.tolist(), strict=True)]
        return replace(batch, prompt_len=np.array(own, dtype=batch.prompt_len.dtype))

    def new_from(self, batch: Batch) -> npt.NDArray[np.int64]:
        """[B] position before which a request's tokens were computed before; `batch` as `of_client` returns it."""
        new_from = batch.num_computed.astype(np.int64)
        if self._before:
            for row, req_id in enumerate(batch.req_ids):
                before = self._before.get(req_id)
                if before is not None:
                    prompt_len = batch.prompt_len[row] if before.prompt_len is None else before.prompt_len
                    new_from[row] = max(new_from[row], prompt_len + before.num_generated)
        return new_from

    def _forget(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            self._chunked.pop(req_id, None)
            self._before.pop(req_id, None)
            self._beams.pop(req_id, None)

    def _resume(self, req_id: str, num_computed: int, num_generated: int) -> None:
        """The V1 runner's: it knows the request."""
        if req_id in self._beams:
            return  # of its one new token nothing was computed
        chunked = self._chunked.get(req_id)
        if chunked is not None:
            self._before[req_id] = _Before(chunked.furthest, 0)
            chunked.at = num_computed
        else:
            # The last generated token had yet to be computed.
            self._before[req_id] = _Before(None, max(num_generated - 1, 0))

    def _arrive(self, new: Arrival, num_scheduled: int) -> _Chunked | None:
        """A new request, or a preempted one of the V2 runner's, or one whose client goes on with its prompt.

        Returns:
            Its prompt, if this step doesn't finish it.
        """
        req_id = new.req_id
        chunked = self._chunked.pop(req_id, None)
        self._before.pop(req_id, None)
        own_prompt = int((new.extra_args or {}).get(BEAM_PROMPT_KEY, new.prompt_len))
        goes_on = own_prompt < new.prompt_len
        if goes_on:
            self._beams[req_id] = own_prompt
        if goes_on or new.resumed:
            self._before[req_id] = _Before(new.known_len - 1, 0)
        elif chunked is not None:
            self._before[req_id] = _Before(chunked.furthest, 0)
        at = new.num_computed + num_scheduled
        furthest = at if chunked is None else max(at, chunked.furthest)
        return _Chunked(new.prompt_len, at, furthest) if at < new.prompt_len else None

    def _advance(self, scheduled: Mapping[str, int]) -> None:
        for req_id, chunked in list(self._chunked.items()):
            chunked.at += scheduled.get(req_id, 0)
            chunked.furthest = max(chunked.furthest, chunked.at)
            if chunked.at >= chunked.length:
                del self._chunked[req_id]
