"""Which LoRA adapter each request of a worker has, and in which slot its rows are counted.

Owns the slots: they go to the first adapters that come, for as long as the worker runs, since what is in one can't be
taken out again. A model that is loaded again under the name of another one goes on in its slot.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.adapter.scheduler import ScheduledStep
from glassbox.core.adapter_slots import MAX_NAME, OTHER_ADAPTERS, is_reserved
from glassbox.core.logs import get_logger
from glassbox.core.rows import ROW_ADAPTER_SHIFT

logger = get_logger(__name__)


class AdapterSlots:
    """The adapters of one worker's requests; all methods but `names` belong to the step thread.

    Args:
        limit: adapters that have a slot of their own; 0 tells none apart, and costs nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit: Final = limit
        self._slots: dict[str, int] = {}
        # Of requests with an adapter, by vLLM's internal id, until they are gone.
        self._of_request: dict[str, int] = {}
        # Why adapters have no slot, as the log has it; of each reason the first adapter.
        self._said: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the slots after the base model's, in order; those that no adapter has yet are missing."""
        return tuple(self._slots)

    def begin_step(self, step: ScheduledStep) -> None:
        """Hear of a step; one without tokens tells who is gone, too."""
        if not self.limit:
            return
        if self._of_request:
            for req_id in step.finished:
                self._of_request.pop(req_id, None)
        # The V1 runner is not told of preempted requests anew, the V2 runner is.
        for new in step.arrivals():
            name = new.adapter
            if name is None:
                self._of_request.pop(new.req_id, None)
            else:
                self._of_request[new.req_id] = self._slot(name)

    def bits(self, req_ids: Sequence[str]) -> npt.NDArray[np.int32] | None:
        """[B] what the rows of these requests have in ROW_PHASE besides; None if it is nothing."""
        if not self._of_request:
            return None
        slots = [self._of_request.get(req_id, 0) for req_id in req_ids]
        return np.array(slots, dtype=np.int32) << ROW_ADAPTER_SHIFT if any(slots) else None

    def _slot(self, name: str) -> int:
        # A label must be text that can be written; half a surrogate pair can't.
        name = name[:MAX_NAME].encode(errors="replace").decode()
        if name not in self._slots and not is_reserved(name) and len(self._slots) < self.limit:
            self._slots[name] = len(self._slots) + 1
        slot = self._slots.get(name)
        if slot is not None:
            return slot
        why = (
            "the name is glassbox's own; load it under another one"
            if is_reserved(name)
            else f"adapters.max is {self.limit} and so many came before; raise it and restart"
        )
        if why not in self._said:
            self._said.add(why)
            logger.warning(
                'The statistics of LoRA adapter %r are counted under adapter="%s": %s', name, OTHER_ADAPTERS, why
            )
        return self.limit + 1
