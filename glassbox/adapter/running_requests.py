"""The requests that an engine's client works at, for another thread of its process: which there are, and their end.

Owns what is touched of `AsyncLLM` for that. Its abort gives whoever waits for the request a last output, whose finish
reason is `abort`, and tells the engine to drop it; nothing else changes for any other request.
"""

import asyncio
import weakref
from typing import Any, Final

# An event loop that is busy for longer has other troubles.
PATIENCE_S: Final = 5.0


class RunningRequests:
    """The requests of an AsyncLLM.

    Args:
        engine: the AsyncLLM; it is not kept alive.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)

    def has(self, internal_id: str) -> bool:
        """Whether it works at a request; from any thread."""
        engine = self._engine()
        return engine is not None and internal_id in engine.output_processor.request_states

    def abort(self, internal_id: str) -> bool:
        """End a request; False if it had ended meanwhile. Called from a thread that isn't the event loop's.

        Raises:
            Exception: of vLLM's, or TimeoutError.
        """
        engine = self._engine()
        # Made in the event loop, with the first request at the latest.
        handler = None if engine is None else engine.output_handler
        if handler is None:
            return False
        ending = asyncio.run_coroutine_threadsafe(_abort(engine, internal_id), handler.get_loop())
        return ending.result(PATIENCE_S)


async def _abort(engine: Any, internal_id: str) -> bool:
    if internal_id not in engine.output_processor.request_states:
        return False
    await engine.abort(internal_id, internal=True)
    return True
