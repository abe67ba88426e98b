"""Files of records and summaries: for this user alone, whatever the umask, and whatever was there before."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from glassbox.export import private_files
from glassbox.export.records import ParquetRecords
from glassbox.export.rotation import RotatingFile
from glassbox.export.trace_document import document
from tests.trace_samples import make_trace


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): mode(path) for path in sorted(folder.rglob("*"))}


def append_line(path: Path) -> None:
    RotatingFile(path, 1000).append(["a line"])


def write_part(path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra `tables`")
    sink = ParquetRecords(path.parent, 1)
    sink.write([document(make_trace())])
    sink.flush(force=True)


@pytest.fixture(autouse=True)
def wide_umask() -> Iterator[None]:
    """One that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


class TestNew:
    @pytest.mark.parametrize("write", [append_line, write_part])
    def test_nobody_else_reads_them(self, tmp_path: Path, write: Callable[[Path], None]) -> None:
        """Nor the folders that were made for them."""
        write(tmp_path / "a" / "b" / "records.jsonl")
        found = modes(tmp_path)
        assert [0o700, 0o700, 0o600] == list(found.values()), found

    def test_a_folder_that_was_there(self, tmp_path: Path) -> None:
        """It is its owner's business."""
        (tmp_path / "logs").mkdir(mode=0o755)
        append_line(tmp_path / "logs" / "records.jsonl")
        assert 0o755 == mode(tmp_path / "logs")

    def test_rotated(self, tmp_path: Path) -> None:
        """What a file becomes is as private as the file."""
        file = RotatingFile(tmp_path / "records.jsonl", 10)
        for _ in range(6):
            file.append(["x" * 9])
        assert {"records.jsonl", *(f"records.jsonl.{n}" for n in (1, 2, 3))} == modes(tmp_path).keys()
        assert {0o600} == set(modes(tmp_path).values())


class TestOld:
    def test_they_are_narrowed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """What an older glassbox left, the rotated ones too; it is said, and what is in them stays."""
        for name in ("records.jsonl", "records.jsonl.1", "records.jsonl.3", "other"):
            (tmp_path / name).write_text("old\n")
            (tmp_path / name).chmod(0o644)
        append_line(tmp_path / "records.jsonl")
        private = modes(tmp_path)
        assert 0o644 == private.pop("other")
        assert {0o600} == set(private.values())
        assert "old\na line\n" == (tmp_path / "records.jsonl").read_text()
        assert f"{tmp_path / 'records.jsonl'} had mode 0644 and has 0600 now" in caplog.text

    def test_parts_of_a_table(self, tmp_path: Path) -> None:
        """Of Parquet as well."""
        old = tmp_path / "traces-1-1-000001.parquet"
        old.write_bytes(b"")
        old.chmod(0o664)
        write_part(tmp_path / "x")
        assert {0o600} == set(modes(tmp_path).values())

    def test_widened_meanwhile(self, tmp_path: Path) -> None:
        """With each line it is looked at anew."""
        path = tmp_path / "records.jsonl"
        file = RotatingFile(path, 1000)
        file.append(["one"])
        path.chmod(0o666)
        file.append(["two"])
        assert 0o600 == mode(path)


class TestOfOthers:
    def test_another_users_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its owner would read what is written: nothing is."""
        path = tmp_path / "records.jsonl"
        path.write_text("")
        owner = path.stat().st_uid
        monkeypatch.setattr(private_files.os, "geteuid", lambda: owner + 1)
        with pytest.raises(PermissionError, match=f"must belong to user {owner + 1}, but belongs to user {owner}"):
            append_line(path)
        assert "" == path.read_text()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root makes links of another user")
    def test_another_users_link(self, tmp_path: Path) -> None:
        """It could lead to any file of this user's."""
        (tmp_path / "mine").write_text("mine\n")
        link = tmp_path / "records.jsonl"
        link.symlink_to("mine")
        os.chown(link, 12345, 12345, follow_symlinks=False)
        with pytest.raises(PermissionError, match="must not be another user's link"):
            append_line(link)
        assert "mine\n" == (tmp_path / "mine").read_text()

    def test_this_users_link(self, tmp_path: Path) -> None:
        """It is followed."""
        (tmp_path / "records.jsonl").symlink_to("data.jsonl")
        append_line(tmp_path / "records.jsonl")
        assert "a line\n" == (tmp_path / "data.jsonl").read_text()

    def test_what_is_no_file(self) -> None:
        """A device takes lines as before, and keeps its mode."""
        before = mode(Path("/dev/null"))
        append_line(Path("/dev/null"))
        assert before == mode(Path("/dev/null"))
