"""The installed vLLM has every name that glassbox says it uses: its imports, tables and protocols are no guesses."""

import pytest

from tools.compat_watch import Tree, installed, missing, used_names

pytestmark = pytest.mark.integration


def test_installed_vllm_has_them() -> None:
    """Read from its sources, so that the GPU's classes are looked for on any machine."""
    folder = installed()
    assert folder is not None
    assert [] == missing(Tree(folder), used_names())
