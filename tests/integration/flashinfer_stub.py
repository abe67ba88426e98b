"""Plugin for pytest (`-p tests.integration.flashinfer_stub`): an empty FlashInfer, so that vLLM's module for it loads.

Only for a process of its own: vLLM then believes that FlashInfer is installed.
"""

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

for _name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils", "flashinfer.comm"):
    sys.modules[_name] = MagicMock(name=_name, __spec__=ModuleSpec(_name, None), __path__=[], __version__="0.0")
