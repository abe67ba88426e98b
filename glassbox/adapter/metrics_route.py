"""Where vLLM's API server adds its /metrics: told, so that something can be put in front of it.

Owns the patch. Why: prometheus_client renders its registry with the interpreter's lock held, and glassbox's part is
bytes that lie ready. How: right after vLLM has added its route, while the application may still be changed. Until: vLLM
takes bytes from elsewhere into its /metrics. Without this internal the collector in prometheus_client's registry shows
the same.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from glassbox.adapter.internals import Feature, lacks, line
from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.release import vllm_version
from glassbox.core.logs import get_logger, log_once

logger = get_logger(__name__)

_MODULE: Final = "vllm.entrypoints.serve.instrumentator.metrics"
_FUNCTION: Final = "attach_router"


def install(added: Callable[[Any], None]) -> Callable[[], None]:
    """Call `added` with the application of this process's API server, if it becomes one; returns the undo."""
    patches = LatePatches()
    patches.add(_MODULE, functools.partial(_patch, added))
    return patches.remove


def _patch(added: Callable[[Any], None], module: ModuleType) -> Callable[[], None]:
    if lacks(Feature.METRICS_PAGE):
        log_once(logger, logging.WARNING, _MODULE, "%s", line(Feature.METRICS_PAGE, vllm_version()))
        return lambda: None
    original: Callable[..., Any] = getattr(module, _FUNCTION)

    @functools.wraps(original)
    def attach_router(app: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(app, *args, **kwargs)
        try:
            added(app)
        except Exception as error:  # the collector goes on showing the same
            logger.warning("glassbox can't hand out its page of metrics: %s: %s", type(error).__name__, error)
        return result

    setattr(module, _FUNCTION, attach_router)
    return functools.partial(setattr, module, _FUNCTION, original)
