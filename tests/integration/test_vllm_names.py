"""The installed vLLM has every name that glassbox says it uses: its imports, tables and protocols are no guesses."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.compat_watch import Tree, missing, used_names

pytestmark = pytest.mark.integration


def test_installed_vllm_has_them() -> None:
    """Read from its sources, so that the GPU's classes are looked for on any machine."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert [] == missing(Tree(Path(spec.origin).parents[1]), used_names())
