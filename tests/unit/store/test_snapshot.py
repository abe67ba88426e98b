"""Snapshot files: what is written is what is read; nothing that lies about breaks a reader."""

import errno
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.accumulator_arrays import ARRAY
from glassbox.export.family_source import FamilySource
from glassbox.store.process_name import own_name
from glassbox.store.snapshot import Snapshot, SnapshotReader, read_snapshots, snapshot_name, write_snapshot
from tests.export_samples import limited_file_size, make_checks, make_snapshot

ROOT = Path(__file__).parents[3]


def assert_same(expected: Snapshot, found: Snapshot) -> None:
    for field in fields(Snapshot):
        left, right = getattr(expected, field.name), getattr(found, field.name)
        if field.name in ARRAY:
            np.testing.assert_array_equal(left, right, err_msg=field.name)
            assert left.dtype == right.dtype, field.name
        elif field.name == "checks":
            for name, array in vars(left).items():
                np.testing.assert_array_equal(array, getattr(right, name), err_msg=name)
                assert array.dtype == getattr(right, name).dtype, name
        else:
            assert left == right, field.name
            assert type(left) is type(right), field.name
    for name, value in expected.numbers.items():
        assert type(value) is type(found.numbers[name]), name


class TestRoundTrip:
    def test_everything_comes_back_with_its_type(self, tmp_path: Path) -> None:
        """A snapshot that was written and read is the same in every field."""
        snapshot = make_snapshot(layers=(3, 7, 8), head_offset=4, heads=3, total_heads=12, reload_successful=False)
        write_snapshot(tmp_path, snapshot)
        (found,) = read_snapshots(tmp_path)
        assert_same(snapshot, found)

    @pytest.mark.parametrize("largest", [0, 255, 256, 2**32, 2**62])
    def test_counts_of_any_size_come_back_as_int64(self, tmp_path: Path, largest: int) -> None:
        """Counts are stored in the smallest type that holds them, and read as int64."""
        snapshot = make_snapshot()
        snapshot.counts[0, 0, 0, 0, 0] = largest
        write_snapshot(tmp_path, snapshot)
        (found,) = read_snapshots(tmp_path)
        assert found.counts[0, 0, 0, 0, 0] == largest
        assert found.counts.dtype == np.int64

    def test_a_worker_without_layers_or_rows_is_a_snapshot_too(self, tmp_path: Path) -> None:
        """A model whose attention is bypassed everywhere still reports that."""
        write_snapshot(tmp_path, make_snapshot(layers=(), layers_bypassed={"backend": 4}))
        (found,) = read_snapshots(tmp_path)
        assert found.numbers["layers_bypassed"] == {"backend": 4}

    def test_where_non_finite_rows_begin_comes_back(self, tmp_path: Path) -> None:
        """Layer 0 is not the same as none."""
        write_snapshot(tmp_path, make_snapshot(first_nonfinite_layer=0, host="gpu-1"))
        write_snapshot(tmp_path, make_snapshot(seed=1, first_nonfinite_layer=None))
        assert [0, None] == [snapshot.first_nonfinite_layer for snapshot in read_snapshots(tmp_path)]

    def test_numpy_scalars_are_accepted(self, tmp_path: Path) -> None:
        """Counters that have become numpy scalars are written as numbers."""
        write_snapshot(tmp_path, make_snapshot(steps=np.int64(7), sample_rate=np.float32(0.5)))
        (found,) = read_snapshots(tmp_path)
        assert (found.steps, found.numbers["sample_rate"]) == (7, 0.5)

    def test_the_file_of_a_large_model_is_small(self, tmp_path: Path) -> None:
        """80 layers with 8 local heads stay under a megabyte as long as no count needs more than two bytes."""
        path = write_snapshot(tmp_path, make_snapshot(layers=tuple(range(80)), heads=8))
        assert path.stat().st_size < 1_000_000


class TestNames:
    def test_the_name_says_engine_rank_and_instance(self, tmp_path: Path) -> None:
        """One file per instance, as worker-<engine>-<rank>-<instance>.npz, in a private directory."""
        path = write_snapshot(tmp_path / "run", make_snapshot(engine="1", rank=3, instance="abc"))
        assert path == tmp_path / "run" / "worker-1-3-abc.npz"
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700

    def test_no_label_leaves_the_directory(self) -> None:
        """Characters that mean something in a path are replaced."""
        assert snapshot_name(make_snapshot(engine="../0", instance="a/b")) == "worker-.._0-0-a_b.npz"

    def test_writing_again_replaces_the_file(self, tmp_path: Path) -> None:
        """A directory holds one file per instance and no temporary ones."""
        for steps in (1, 2):
            write_snapshot(tmp_path, make_snapshot(steps=steps))
        (found,) = read_snapshots(tmp_path)
        assert found.steps == 2
        assert len(list(tmp_path.iterdir())) == 1


class TestShapes:
    def test_a_wrong_shape_is_named(self) -> None:
        """The error says which array, the shape it must have, and the one it has."""
        with pytest.raises(ValueError, match=r"rows must have shape \[3, 2, 2\], got \[2, 2, 2\]|counts must have"):
            make_snapshot(layers=(0, 1)).__class__(
                **{f.name: getattr(make_snapshot(), f.name) for f in fields(Snapshot) if f.name != "layers"},
                layers=(0, 1, 2),
            )

    def test_a_layer_may_not_come_twice(self) -> None:
        """Otherwise its rows would be lost."""
        with pytest.raises(ValueError, match=r"layers must be distinct, got \[1, 1\]"):
            replace(make_snapshot(), layers=(1, 1))

    def test_checks_are_of_the_same_layers(self) -> None:
        """One more or less would shift the others."""
        with pytest.raises(ValueError, match="checks must be of 2 layers, got 3"):
            replace(make_snapshot(), checks=make_checks(3))

    def test_heads_must_be_among_the_models(self) -> None:
        """A head offset that leads out of the model is an error."""
        with pytest.raises(ValueError, match=r"heads 3\.\.4 of layer 1 must be among the model's 4 heads"):
            replace(make_snapshot(total_heads=4), head_offsets=(2, 3))


class TestGarbage:
    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 100, b"\x93NUMPY\x01\x00v\x00{"])
    def test_garbage_is_skipped_and_counted_once(self, tmp_path: Path, content: bytes) -> None:
        """A file that is no snapshot neither raises nor hides the others; reading again does not count it again."""
        write_snapshot(tmp_path, make_snapshot())
        (tmp_path / "worker-0-1-bad.npz").write_bytes(content)
        reader = SnapshotReader(tmp_path)
        assert [len(reader.read()), len(reader.read())] == [1, 1]
        assert reader.unreadable == 1

    def test_every_truncation_of_a_file_is_skipped(self, tmp_path: Path) -> None:
        """However much of a snapshot is missing at its end, it is never half read."""
        path = write_snapshot(tmp_path, make_snapshot())
        data = path.read_bytes()
        reader = SnapshotReader(tmp_path)
        lengths = range(0, len(data), max(1, len(data) // 50))
        for length in lengths:
            path.write_bytes(data[:length])
            assert reader.read() == []
        assert reader.unreadable == len(lengths)

    def test_another_format_or_shape_is_skipped(self, tmp_path: Path) -> None:
        """A file of another version of glassbox, whose statistics differ, is not shown."""
        snapshot = make_snapshot()
        path = write_snapshot(tmp_path, snapshot)
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["counts"] = arrays["counts"][:, :, :, :1]
        np.savez(path, **arrays)
        assert read_snapshots(tmp_path) == []

    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("state", np.zeros(1, dtype=np.int8)),
            ("error_counts", np.zeros((2, 2, 3), dtype=np.int64)),
            ("worst_head", np.zeros(2, dtype=np.float32)),
            ("kv_error", np.array([["a", "b"], ["c", "d"]])),
        ],
    )
    def test_checks_of_another_shape_or_kind_are_skipped(self, tmp_path: Path, name: str, array: Any) -> None:
        """They are read as strictly as what was measured."""
        path = write_snapshot(tmp_path, make_snapshot())
        with np.load(path) as archive:
            arrays = dict(archive)
        assert f"checks_{name}" in arrays
        np.savez(path, **{**arrays, f"checks_{name}": array})
        assert read_snapshots(tmp_path) == []

    def test_a_file_without_checks_is_skipped(self, tmp_path: Path) -> None:
        """A layer of which nothing is said is not taken for a pending one."""
        path = write_snapshot(tmp_path, make_snapshot())
        with np.load(path) as archive:
            arrays = {name: array for name, array in archive.items() if not name.startswith("checks_")}
        np.savez(path, **arrays)
        assert read_snapshots(tmp_path) == []

    def test_pickles_are_never_loaded(self, tmp_path: Path) -> None:
        """An object array cannot run code in the reader."""
        snapshot = make_snapshot()
        path = write_snapshot(tmp_path, snapshot)
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["counts"] = np.array([object], dtype=object)
        np.savez(path, **arrays)
        assert read_snapshots(tmp_path) == []

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        """Temporary files and files of others are not even opened."""
        for name in (".worker-0-0-x.npz.tmp", "exporter.json", "worker-0-0-x.txt"):
            (tmp_path / name).write_bytes(b"garbage")
        reader = SnapshotReader(tmp_path)
        assert reader.read() == []
        assert reader.unreadable == 0


class TestDirectory:
    def test_a_missing_directory_has_no_snapshots(self, tmp_path: Path) -> None:
        """Before the first worker and after the last one there is nothing to read."""
        assert read_snapshots(tmp_path / "none") == []

    def test_a_directory_that_vanishes_and_comes_back(self, tmp_path: Path) -> None:
        """The reader forgets what was removed and finds what is new."""
        run_dir = tmp_path / "run"
        reader = SnapshotReader(run_dir)
        write_snapshot(run_dir, make_snapshot(steps=1))
        assert len(reader.read()) == 1
        shutil.rmtree(run_dir)
        assert reader.read() == []
        write_snapshot(run_dir, make_snapshot(steps=2))
        assert [snapshot.steps for snapshot in reader.read()] == [2]

    def test_an_unchanged_file_is_parsed_once(self, tmp_path: Path) -> None:
        """The same object comes back until the file is replaced."""
        write_snapshot(tmp_path, make_snapshot(steps=1))
        reader = SnapshotReader(tmp_path)
        (first,) = reader.read()
        assert reader.read()[0] is first
        write_snapshot(tmp_path, make_snapshot(steps=2))
        assert reader.read()[0].steps == 2


class TestFullDisk:
    def test_the_error_is_raised_and_the_old_snapshot_stays(self, tmp_path: Path) -> None:
        """When a snapshot does not fit, the caller gets the OSError, the older file stays, nothing is left over."""
        small = make_snapshot(layers=(), instance="w")
        write_snapshot(tmp_path, small)
        with limited_file_size(4096), pytest.raises(OSError, match="File too large") as error:
            write_snapshot(tmp_path, make_snapshot(layers=tuple(range(40)), instance="w"))
        assert error.value.errno == errno.EFBIG
        assert [path.name for path in tmp_path.iterdir()] == ["worker-0-0-w.npz"]
        assert_same(small, read_snapshots(tmp_path)[0])

    def test_a_full_file_system(self, tmp_path: Path) -> None:
        """The same on a file system without a free block."""
        mount = tmp_path / "tiny"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs needs privileges that this user does not have")
        try:
            write_snapshot(mount, make_snapshot(steps=1))
            with pytest.raises(OSError, match="No space left") as error:
                write_snapshot(mount, make_snapshot(steps=2, layers=tuple(range(60)), heads=8))
            assert error.value.errno == errno.ENOSPC
            assert [snapshot.steps for snapshot in read_snapshots(mount)] == [1]
            assert len(list(mount.iterdir())) == 1
        finally:
            subprocess.run(["umount", str(mount)], check=True)


class TestDeadEngines:
    """An engine whose workers have ended is no longer shown, though its files are still there."""

    @pytest.fixture
    def ended(self) -> str:
        """Name of a process that has ended."""
        program = "from glassbox.store.process_name import own_name; print(own_name())"
        run = [sys.executable, "-c", program]
        return subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    def shown(self, run_dir: Path, after_s: float = 3600.0) -> list[tuple[str, int]]:
        """Engines and ranks that a reader finds so long after the last snapshot, at once and when it looks again."""
        reader = SnapshotReader(run_dir, clock=lambda: make_snapshot().time_s + after_s)
        first, again = reader.read(), reader.read()
        assert [snapshot.instance for snapshot in first] == [snapshot.instance for snapshot in again]
        return [(snapshot.engine, snapshot.rank) for snapshot in again]

    def test_after_a_minute(self, tmp_path: Path, ended: str) -> None:
        """Until then it is one that ends just now, whose last numbers are still to be exported."""
        write_snapshot(tmp_path, make_snapshot(instance=f"{ended}-1"))
        write_snapshot(tmp_path, make_snapshot(engine="1", instance=f"{own_name()}-2"))
        assert self.shown(tmp_path, 30.0) == [("0", 0), ("1", 0)]
        assert self.shown(tmp_path) == [("1", 0)]

    def test_a_worker_that_was_restarted_still_counts(self, tmp_path: Path, ended: str) -> None:
        """Its engine lives: counters must not fall."""
        write_snapshot(tmp_path, make_snapshot(instance=f"{ended}-1"))
        write_snapshot(tmp_path, make_snapshot(rank=1, instance=f"{own_name()}-2"))
        assert self.shown(tmp_path) == [("0", 0), ("0", 1)]

    def test_who_can_not_be_looked_for(self, tmp_path: Path, ended: str) -> None:
        """A process of another container or machine; a name that says nothing; whatever a command is asked to read."""
        pid, start, namespace, machine = ended.split("-")
        for engine, instance in enumerate((f"{pid}-{start}-{int(namespace) + 1}-{machine}-1", "abc")):
            write_snapshot(tmp_path, make_snapshot(engine=str(engine), instance=instance))
        assert self.shown(tmp_path) == [("0", 0), ("1", 0)]
        write_snapshot(tmp_path, make_snapshot(engine="2", instance=f"{ended}-1"))
        assert len(read_snapshots(tmp_path, named=True)) == 3

    def test_metrics_and_page_lose_it(self, tmp_path: Path, ended: str) -> None:
        """A view that was made while it lived changes, although no file does."""
        write_snapshot(tmp_path, make_snapshot(engine="1", instance=f"{own_name()}-2"))
        write_snapshot(tmp_path, make_snapshot(instance=f"{ended}-1"))
        now_s = [make_snapshot().time_s + 59.0]
        source = FamilySource(tmp_path, GlassboxConfig, clock=lambda: now_s[0])
        assert [engine.engine for engine in source.view().engines] == ["0", "1"]
        now_s[0] += 1.1
        assert [engine.engine for engine in source.view().engines] == ["1"]
