"""GLASSBOX_* in the environment of Ray's workers, which inherit nothing from the process that starts them.

vLLM copies variables by prefix. Its own list is added to, not VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY: that is part of
the key of vLLM's compile cache, so a server with glassbox, or with its kill switch, would compile everything anew.
"""

import sys
from collections.abc import Callable
from typing import Final

PREFIX: Final = "GLASSBOX_"
# vllm.v1.engine.utils imports it, and with that every process that starts actors has it before it loads plugins.
MODULE: Final = "vllm.ray.ray_env"


def carry() -> Callable[[], None]:
    """Let vLLM copy the variables to the workers that this process starts with Ray; returns the undo.

    Of a vLLM that copies all variables, or in a process that starts no workers with Ray, nothing is changed.
    """
    prefixes = getattr(sys.modules.get(MODULE), "DEFAULT_ENV_VAR_PREFIXES", None)
    if not isinstance(prefixes, set) or PREFIX in prefixes:
        return lambda: None
    prefixes.add(PREFIX)
    return lambda: prefixes.discard(PREFIX)
