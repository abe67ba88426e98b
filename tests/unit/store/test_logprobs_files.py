"""Log-probabilities beside traces: each client's are its own, and a client that leaves many loses its own first."""

from pathlib import Path

import numpy as np
import pytest

from glassbox.store import logprobs_files
from glassbox.store.logprobs_files import LogprobsFiles, read_logprobs

ALICE, BOB = "a" * 24, "b" * 24


def has(folder: Path, internal_id: str, client: str | None) -> bool:
    return bool(np.isfinite(read_logprobs(folder, internal_id, client, 1)).all())


class TestLogprobsFiles:
    def test_of_a_client(self, tmp_path: Path) -> None:
        """Not another's of the same id; missing ones are NaN, and files are this user's alone."""
        files = LogprobsFiles(tmp_path)
        files.write("same", ALICE, [-1.0, -2.0], keep=9)
        np.testing.assert_array_equal([-1.0, -2.0, np.nan], read_logprobs(tmp_path, "same", ALICE, 3))
        assert [-1.0] == read_logprobs(tmp_path, "same", ALICE, 1).tolist()
        for other in (BOB, None):
            assert not has(tmp_path, "same", other)
        (file,) = tmp_path.iterdir()
        assert 0o600 == file.stat().st_mode & 0o777

    @pytest.mark.parametrize("flood", [ALICE, None])
    def test_many_of_one_client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flood: str | None) -> None:
        """Its own oldest go, however much older the others' are."""
        monkeypatch.setattr(logprobs_files, "_PRUNE_EVERY", 5)
        files = LogprobsFiles(tmp_path)
        for number in range(3):
            files.write(f"bob-{number}", BOB, [-1.0], keep=10)
        for number in range(47):
            files.write(f"flood-{number}", flood, [-1.0], keep=10)
        assert 10 == len(list(tmp_path.iterdir()))
        assert all(has(tmp_path, f"bob-{number}", BOB) for number in range(3))
        assert [40, 41, 42, 43, 44, 45, 46] == [n for n in range(47) if has(tmp_path, f"flood-{n}", flood)]
