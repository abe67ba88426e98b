"""Where Triton kernels run in these tests: on the GPU if there is one, else in Triton's interpreter.

Import it before anything that imports triton, which reads the variable only then.
"""

import os
import sys
from typing import Final

import pytest
import torch

ON_GPU: Final = torch.cuda.is_available()
DEVICE: Final = "cuda" if ON_GPU else "cpu"

if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton came without its interpreter; run tests/kernels by itself", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
