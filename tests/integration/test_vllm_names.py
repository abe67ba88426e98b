"""The installed vLLM has every name that glassbox says it uses: its imports, tables and protocols are no guesses.

tests/releases/test_names.py looks at all supported releases; this is of whatever is installed.
"""

import pytest

from tools.compat_watch import declared, missing, to_look_for
from tools.vllm_releases import installed
from tools.vllm_tree import Tree
from tools.vllm_uses import used_names

pytestmark = pytest.mark.integration


def test_installed_vllm_has_them() -> None:
    """Read from its sources, so that the GPU's classes are looked for on any machine."""
    folder = installed()
    assert folder is not None
    assert [] == missing(Tree(folder), to_look_for(used_names(), declared()), declared())
