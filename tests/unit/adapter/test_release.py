"""release.py: how a vLLM stands to the tested ones."""

import pytest

from glassbox.adapter.release import TESTED_VLLM, Release, Standing


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        (None, Standing.ABSENT),
        ("0.9.2", Standing.OLDER),
        ("0.25.1", Standing.OLDER),
        ("0.26.0", Standing.TESTED),
        ("0.32.0", Standing.TESTED),
        ("0.32.1", Standing.TESTED),
        ("0.33.0+cu130", Standing.TESTED),
        ("0.33.1rc1.dev12+gabcdef", Standing.TESTED),
        ("0.34.0", Standing.NEWER),
        ("1.0.0", Standing.NEWER),
        ("0.1.dev1+g0123456", Standing.NEWER),  # a checkout without tags
        ("dev", Standing.NEWER),
    ],
)
def test_standing(version: str | None, standing: Standing) -> None:
    """By major and minor number; what has none may be anything, so it is on probation."""
    release = Release.of(version)
    assert release.standing is standing
    assert (release.unobserved_reason() is None) == (standing in (Standing.TESTED, Standing.NEWER))
    assert (release.unobserved_reason("tested") is None) == (standing is Standing.TESTED)


def test_in_order() -> None:
    """The list is ascending, without a hole."""
    minors = [int(version.partition(".")[2]) for version in TESTED_VLLM]
    assert minors == list(range(minors[0], minors[-1] + 1))
