"""Plugin for pytest (`-p tests.integration.gpu_kernels_stub`): empty kernel packages, so that vLLM's GPU modules load.

Only for a process of its own: vLLM then believes that FlashInfer and FlashAttention are installed, and memory of a GPU
is none at all.
"""

import sys
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import torch

for _name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils", "flashinfer.comm"):
    sys.modules[_name] = MagicMock(name=_name, __spec__=ModuleSpec(_name, None), __path__=[], __version__="0.0")

_empty = torch.empty


def _nothing_on_gpus(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
    return _empty(*size, device="meta" if device == "cuda" else device, **options)


# CUTLASS_MLA's module makes its workspace when it is imported.
torch.empty = _nothing_on_gpus  # type: ignore[assignment]

from vllm.v1.attention.backends import fa_utils  # noqa: E402 (with what it looks for in place)

for _name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
    if not hasattr(fa_utils, _name):
        setattr(fa_utils, _name, MagicMock(name=_name))
