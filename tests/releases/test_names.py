"""Every supported release has what glassbox declares to use of vLLM, and nothing else is used.

Read from the releases' Python files, which are fetched once (tools/vllm_releases.py), so that the GPU's classes and
releases that don't run here are looked at, too.
"""

import pytest

from tools.compat_watch import Finding, declared, missing, to_look_for, undeclared
from tools.vllm_releases import Release, folder_of, releases, torch_of
from tools.vllm_tree import Tree
from tools.vllm_uses import used_names

pytestmark = pytest.mark.check("internals", "source")

EVERY = pytest.mark.parametrize("release", releases(), ids=lambda release: release.name)


@EVERY
def test_has_them(release: Release) -> None:
    """Or an alternative, or is older than the first release that does."""
    tree = Tree(folder_of(release, whole=False))
    assert tree.version.startswith(release.version)
    found: list[Finding] = missing(tree, to_look_for(used_names(), declared()), declared())
    assert [] == [finding for finding in found if finding.fails]


@EVERY
def test_list_says_which_torch_it_needs(release: Release) -> None:
    """As the wheel does; releases with the reference's can be run beside it."""
    assert torch_of(release) in {release.torch, None}


def test_all_are_declared() -> None:
    """A name that is used without a declaration has nobody who knows what its loss means."""
    assert declared(), "glassbox/adapter/internals.py declares nothing"
    assert [] == undeclared(used_names(), declared())
