"""What the tests of compiled kernels share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _compile_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an earlier run has compiled proves nothing, and what these have is compiled once; options are what Triton
    means to make its own choice."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
