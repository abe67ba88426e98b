"""The kernel for CPUs is compiled beside vLLM's start, and whatever goes wrong there disturbs nobody."""

from pathlib import Path

import pytest

from glassbox.measure.ahead import compile_ahead


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_compiler_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked, on a thread; nothing is raised, nothing is left."""
    script, told = tmp_path / "c++", tmp_path / "told"
    script.write_text(f'#!/bin/sh\necho "$*" >> "{told}"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compile_ahead().join(60)
    assert "row_stats.cpp" in told.read_text()
    assert [] == list((tmp_path / "cache" / "glassbox" / "native").iterdir())
