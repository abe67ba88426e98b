"""Whatever the file holds, reading it ends with settings or a ConfigError; whatever happens, it is followed on."""

import math
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glassbox.config import watch
from glassbox.config.follow import ConfigFollower
from glassbox.config.load import ConfigError, GlassboxConfig, load_config, packaged_config, parse_config
from glassbox.config.watch import ConfigWatcher, FileWatcher
from glassbox.config.wording import all_keys
from glassbox.config.yaml import MAX_CONFIG_BYTES
from tests.waiting import wait_for

PATH = Path("x.yaml")
DIGITS = "9" * 5000
MERGED = "\n".join(
    ["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}" for n in range(1, 12))]
)
CORPUS: tuple[bytes, ...] = (
    b"sample_rate: !!bool maybe",
    b"sample_rate: !!int",
    b"sample_rate: !!float x",
    b"sample_rate: !!timestamp x",
    b"sample_rate: !!null 3",
    b"sample_rate: !!binary '\xc3\xa9'",
    b"sample_rate: !!binary AAAA",
    b"sample_rate: !!set {a}",
    b"sample_rate: !!omap [a: 1, b]",
    b"sample_rate: !!pairs {a: 1}",
    b"sample_rate: !!seq {a: 1}",
    b"sample_rate: !!map [a]",
    b"sample_rate: !!str {a: 1}",
    b"sample_rate: !!merge x",
    b"sample_rate: !x 1",
    b"sample_rate: !!python/object/apply:os.system [id]",
    b"!!set {enabled}",
    b"&a {export: *a}",
    b"sampling: &a {layers: &b [*b]}",
    b"sampling: &a {layers: *a}",
    b"export: &a {otel: &b {headers: *b}}",
    b"export: &a {prometheus: *a, otel: *a, jsonl: *a}",
    b"a: &a {<<: *a}",
    b"<<: 3",
    b"<<: [3]",
    b"<<: {sample_rate: 3}",
    b"? {a: 1}\n: 2",
    b"? [a]\n: 2",
    b"? !!binary AAAA\n: 2",
    b"? ~\n: 2",
    b"? .nan\n: 2",
    b'"\\ud800": 1',
    b'baseline: {path: "\\ud800"}',
    b'export: {jsonl: {path: "\\udcff"}}',
    b'export: {otel: {endpoint: "http://\\ud800"}}',
    b'export: {otel: {headers: {"\\ud800": "\\ud800"}}}',
    b'log_level: "\\e[31m\\u202e\\a"',
    b"\xef\xbb\xbfsample_rate: 3",
    "sample_rate: 3".encode("utf-16"),
    "sample_rate: 3".encode("utf-32"),
    b"\tsample_rate: 3",
    b"sample_rate: 3\n\tx: 1",
    b"sample_rate: 1\nsample_rate: 1",
    b"sample_rate: 1\n'sample_rate': 3",
    f"sample_rate: {DIGITS}".encode(),
    f"sampling: {{max_rows_per_step: {DIGITS}}}".encode(),
    f"sampling: {{layers: [{DIGITS}]}}".encode(),
    f"sampling: {{layers: {{every: {DIGITS}}}}}".encode(),
    f"sampling: {{max_rows_per_step: 0{DIGITS}}}".encode(),
    f"sampling: {{max_rows_per_step: 0x{DIGITS}}}".encode(),
    f"sampling: {{max_rows_per_step: 1:{':'.join(['59'] * 3000)}}}".encode(),
    b"sample_rate: 1e999",
    b"sample_rate: -.inf",
    b"sample_rate: .nan",
    b"sample_rate: 0b",
    b"sample_rate: 2026-01-01",
    b"sample_rate: 2026-99-99",
    b"sample_rate: =",
    b"%YAML 9.9\n---\nsample_rate: 3",
    b"%TAG ! tag:x,2000:\n---\nsample_rate: !y 3",
    b"--- \n--- \n",
    b"*a",
    b"&a",
    b"[" * 100_000,
    b"{a: " * 20_000,
    b"- " * 100_000,
    b"? " * 50_000,
    b"a: |\n" + b" x\n" * 100_000,
    b"\x00",
    b"\xc0\x80",
    b"\xed\xa0\x80: 1",
    MERGED.encode(),
    b"a: " + b"'" * 3 + b"x" * 900_000,
    b"#" * (MAX_CONFIG_BYTES + 1),
)


def outcome(data: bytes) -> GlassboxConfig | ConfigError:
    try:
        return parse_config(PATH, data)
    except ConfigError as error:
        return error


def assert_told(data: bytes) -> None:
    """Settings that are in range, or one line that may be printed and isn't long."""
    found = outcome(data)
    if isinstance(found, GlassboxConfig):
        assert 0 <= found.sample_rate <= 1
        assert yaml.safe_dump(found.model_dump(mode="json"))
        return
    text = str(found)
    assert text.startswith("x.yaml: ")
    assert text.isprintable()
    text.encode()
    assert len(text) < 1500


class TestCorpus:
    @pytest.mark.parametrize("data", CORPUS, ids=range(len(CORPUS)))
    def test_is_refused_in_one_line(self, data: bytes) -> None:
        """In time, too: merged mappings that would multiply to 10^11 keys, nesting, numbers of 5,000 digits."""
        started = time.monotonic()
        assert isinstance(outcome(data), ConfigError)
        assert_told(data)
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize("key", all_keys(GlassboxConfig))
    @pytest.mark.parametrize(
        "number", ["0100", "-0100", "1:30", "0x1F", "0b1", "0o17", "1_000", "!!int 0100", "1:30.5"]
    )
    def test_no_number_is_taken_for_another(self, key: str, number: str) -> None:
        """A surprising number is refused, or text as it is written."""
        data: object = "VALUE"
        for part in reversed(key.split(".")):
            data = {part: data}
        found = outcome(yaml.safe_dump(data).replace("VALUE", number).encode())
        if isinstance(found, GlassboxConfig):
            value: object = found
            for part in key.split("."):
                value = getattr(value, part)
            assert number.rpartition(" ")[2] == value


class TestFuzz:
    @settings(max_examples=300, deadline=None, database=None)
    @given(st.binary(max_size=200))
    def test_bytes(self, data: bytes) -> None:
        """Any bytes at all."""
        assert_told(data)

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.text(alphabet="abc01_.:-+eExX{}[],&*!|>?<'\"\\#%@` \n\t~=", max_size=60))
    @example("<<: &a [*a]")
    def test_syntax(self, text: str) -> None:
        """Text of YAML's own signs, alone and as a setting's value."""
        assert_told(text.encode())
        assert_told(f"sample_rate: {text}".encode())

    @settings(max_examples=200, deadline=None, database=None)
    @given(
        st.sampled_from(all_keys(GlassboxConfig)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8) | st.dates(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=6,
        ),
    )
    def test_values(self, key: str, value: object) -> None:
        """Any value of any setting."""
        data = value
        for part in reversed(key.split(".")):
            data = {part: data}
        try:
            text = yaml.safe_dump(data, allow_unicode=True).encode()
        except UnicodeEncodeError:
            return
        assert_told(text)

    def test_damage(self) -> None:
        """The documented file with a few bytes changed, as a disk or an editor may leave it."""
        chance = random.Random(3)
        good = packaged_config().read_bytes()
        for _ in range(100):
            data = bytearray(good)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            assert_told(bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data))


class TestFilesThatAreNone:
    @pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "/proc/self/fd", "/proc"])
    def test_of_the_system(self, name: str) -> None:
        """Devices that never end, directories, files that can't be read."""
        with pytest.raises(ConfigError) as caught:
            load_config(name)
        assert str(caught.value).isprintable()

    def test_large(self, tmp_path: Path) -> None:
        """A file of 1 GB is not read."""
        path = tmp_path / "large.yaml"
        with path.open("wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(ConfigError, match="must be at most 1000000 bytes"):
            load_config(path)

    def test_sockets_and_loops(self, tmp_path: Path) -> None:
        """A socket, a link to itself, a name that is too long or holds a NUL."""
        (tmp_path / "loop").symlink_to("loop")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(tmp_path / "s"))
            for name in ("s", "loop", "x" * 300, "a\0b"):
                with pytest.raises(ConfigError):
                    load_config(tmp_path / name)


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[tuple[Path, ConfigWatcher]]:
    path = tmp_path / "glassbox.yaml"
    path.write_text("sample_rate: 0.5")
    watcher = ConfigWatcher(path, lambda config: None, lambda error: None, initial=load_config(path))
    watcher.start()
    yield path, watcher
    watcher.stop()


def rate(watcher: ConfigWatcher) -> float:
    assert watcher.current is not None
    return watcher.current.sample_rate


class TestFollowing:
    def test_after_each_of_them_a_good_edit_counts(self, tmp_path: Path) -> None:
        """Each is a failed reload that leaves the settings as they were."""
        path = tmp_path / "glassbox.yaml"
        path.write_text("sample_rate: 0")
        follower = ConfigFollower(path, lambda config: None, lambda error: None, initial=load_config(path))
        for number, data in enumerate(CORPUS, start=1):
            path.write_bytes(data)
            follower.look()
            assert not follower.status.successful
            assert follower.current is not None
            assert math.isclose((number - 1) / 1000, follower.current.sample_rate)
            path.write_text(f"sample_rate: {number / 1000}")
            follower.look()
            assert follower.status.successful
            assert math.isclose(number / 1000, follower.current.sample_rate)

    def test_kinds_of_files(self, followed: tuple[Path, ConfigWatcher]) -> None:
        """The file becomes a directory, a pipe, an endless device and nothing; then it is good again."""
        path, watcher = followed
        for number, make in enumerate((Path.mkdir, os.mkfifo, lambda at: at.symlink_to("/dev/zero"), Path.absolute), 1):
            path.unlink()
            make(path)
            wait_for(lambda: watcher.status.successful, lambda good: not good, what="the failed reload")
            if path.is_dir():
                path.rmdir()
            good = path.with_suffix(".new")
            good.write_text(f"sample_rate: 0.{number}")
            good.replace(path)
            wait_for(lambda: rate(watcher), lambda found, number=number: found == number / 10, what="the good edit")

    def test_a_reader_that_fails(self, followed: tuple[Path, ConfigWatcher], monkeypatch: pytest.MonkeyPatch) -> None:
        """An exception that nobody thought of is a failed reload, not the end of the thread."""
        path, watcher = followed

        def broken(*_: object, **__: object) -> None:
            raise KeyError("nobody thought of it")

        with monkeypatch.context() as patch:
            patch.setattr("glassbox.config.follow.parse_config", broken)
            path.write_text("sample_rate: 0.25")
            wait_for(lambda: watcher.status.successful, lambda good: not good, what="the failed reload")
            assert "KeyError" in (watcher.status.error or "")
            assert 0.5 == rate(watcher)
        path.write_text("sample_rate: 0.75")
        wait_for(lambda: rate(watcher), lambda found: found == 0.75, what="the good edit")
        wait_for(lambda: watcher.status.successful, what="the status that follows it")


class TestSupervision:
    @pytest.mark.parametrize("kind", [KeyError, MemoryError, GeneratorExit, SystemExit])
    def test_the_thread_outlives_whatever_is_raised(
        self, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Watching itself fails again and again: the file is looked at all the same, and the log tells once."""
        path = tmp_path / "x"
        path.touch()
        looks: list[float] = []
        watcher = FileWatcher(path, lambda: looks.append(time.monotonic()), "test-watcher")
        logged: list[int] = []

        def broken(*_: object, **__: object) -> Iterator[bool]:
            raise kind("no")

        monkeypatch.setattr(FileWatcher, "_events", broken)
        monkeypatch.setattr(watch.get_logger(watch.__name__), "log", lambda level, *_, **__: logged.append(level))
        watcher.start()
        try:
            wait_for(lambda: len(looks), lambda number: number >= 3, what="three looks")
            assert watcher.running
            assert [40, 10] == logged[:2]
        finally:
            watcher.stop()
        wait_for(lambda: not watcher.running, what="the thread to end")

    def test_a_callback_that_raises_is_called_again(self, tmp_path: Path) -> None:
        """At the next event."""
        path = tmp_path / "x"
        path.touch()
        calls: list[int] = []

        def call() -> None:
            calls.append(1)
            raise KeyError("no")

        watcher = FileWatcher(path, call, "test-watcher")
        watcher.start()
        try:
            wait_for(lambda: len(calls), bool, what="the first call")
            path.write_text("more")
            wait_for(lambda: len(calls), lambda number: number >= 3, what="more of them")
            assert watcher.running
        finally:
            watcher.stop()
