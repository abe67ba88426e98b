"""What is valid is usable: a path that can't be used is an error at start, at an edit and in `glassbox check`."""

import functools
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.config.follow import ConfigFollower
from glassbox.config.load import ConfigError, GlassboxConfig, find_config, load_config
from glassbox.config.usable import load_usable, require_usable

KEYS = ("export.jsonl.path", "requests.records.path", "baseline.path")
WRITTEN = ("export.jsonl.path", "requests.records.path", "actions.audit.path")
WEBHOOK = {"name": "a", "signal": "spectral.sv1", "above": 1.0, "webhook": {"secret_file": "FILE"}}
HOMELESS = 4_242_424  # a user id that no list of users has


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that any user may enter, but only its owner write to."""
    with tempfile.TemporaryDirectory(prefix="glassbox-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Not root, who may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def config_with(key: str, path: str, **records: str) -> GlassboxConfig:
    content: object = {key.rpartition(".")[2]: path, **records}
    for part in reversed(key.split(".")[:-1]):
        content = {part: content}
    return GlassboxConfig.model_validate(content)


def problem(key: str, path: str, **records: str) -> str:
    """What is said of a path, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        require_usable(Path("x.yaml"), config_with(key, path, **records))
    assert caught.value.key == key
    assert "null" in caught.value.advice
    text = str(caught.value)
    assert text.startswith(f"x.yaml: {key} must be a ")
    assert text.endswith(
        tuple(f"or use null {what}" for what in ("to write none", "to compare with nothing", "for all heads"))
    )
    return text


def settings(values: dict[str, object]) -> GlassboxConfig:
    """Of values by their keys."""
    whole: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda section, inner: section.setdefault(inner, {}), sections, whole)[name] = value
    return GlassboxConfig.model_validate(whole)


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


class TestPaths:
    @pytest.mark.parametrize("key", KEYS)
    def test_a_forgotten_slash(self, key: str) -> None:
        """~run.jsonl is the home of a user called run.jsonl; the message names what was meant."""
        text = problem(key, "~run.jsonl")
        assert (
            "got '~run.jsonl' (there is no user 'run.jsonl'; of your own home directory it would be ~/run.jsonl)"
            in text
        )

    @pytest.mark.parametrize("key", KEYS)
    def test_no_home(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without HOME, of a user that is in no list, ~ leads nowhere."""
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: HOMELESS)
        assert "(this process has no home directory)" in problem(key, "~/run.jsonl")

    @pytest.mark.parametrize("key", KEYS)
    def test_below_a_file(self, key: str, folder: Path) -> None:
        """A path that goes on below a file."""
        (folder / "file").touch()
        assert "Not a directory" in problem(key, f"{folder}/file/run.jsonl")

    @pytest.mark.parametrize("key", KEYS)
    def test_names_that_cannot_be(self, key: str, folder: Path) -> None:
        """Too long, here or below a directory that would be made; a loop of links."""
        assert "File name too long" in problem(key, f"{folder}/{'x' * 300}")
        (folder / "loop").symlink_to("loop")
        assert "symbolic links" in problem(key, str(folder / "loop"))

    def test_too_long_when_rotated(self, folder: Path) -> None:
        """A name that fits as such but not with a suffix, or below directories that aren't there yet."""
        for name in ("x" * 250, f"new/{'x' * 300}/y"):
            assert "a name of more than 247 bytes" in problem("export.jsonl.path", f"{folder}/{name}")

    def test_a_nul(self) -> None:
        """No file's name has one: not valid to begin with."""
        for key in KEYS:
            with pytest.raises(ValueError, match="must be a path, which has no NUL in it"):
                config_with(key, "/tmp/a\0b")

    @pytest.mark.parametrize("key", KEYS[:2])
    def test_a_directory_as_file(self, key: str, folder: Path) -> None:
        """Where a file is to be written there is a directory."""
        assert "(that is a directory)" in problem(key, str(folder))

    def test_a_file_as_directory(self, folder: Path) -> None:
        """Where Parquet's directory is to be there is a file."""
        (folder / "file").touch()
        text = problem("requests.records.path", str(folder / "file"), format="parquet")
        assert "must be a directory that can be written to" in text
        assert "(that is a file)" in text

    def test_parquet_without_its_package(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The format that needs one is no format to write in."""
        config = config_with("requests.records.path", str(folder / "new"), format="parquet")
        require_usable(Path("x.yaml"), config)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="must be jsonl without pyarrow, got parquet; pip install"):
            require_usable(Path("x.yaml"), config)

    def test_a_pipe(self, folder: Path) -> None:
        """Whoever writes to one waits for its reader."""
        os.mkfifo(folder / "pipe")
        for key in KEYS[:2]:
            assert "(that is a pipe, a socket or a disk)" in problem(key, str(folder / "pipe"))
        assert "(that is no regular file)" in problem("baseline.path", str(folder / "pipe"))

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
    @pytest.mark.parametrize("key", ["baseline.path", "requests.focus_heads"])
    def test_what_another_user_could_have_written(self, key: str, folder: Path) -> None:
        """Alerts follow the one, rules the other."""
        path = folder / "file"
        path.touch()
        os.chown(path, 12345, -1)
        require_usable(Path("x.yaml"), config_with(key, str(path)))  # mounted into a container
        folder.chmod(0o1777)
        assert f"(must belong to user 0 or root in {folder}, where everybody may put" in problem(key, str(path))
        os.chown(path, 0, -1)
        path.chmod(0o646)
        assert "(must not be writable by everybody, got mode 0646; use chmod o-w); " in problem(key, str(path))
        path.chmod(0o664)
        require_usable(Path("x.yaml"), config_with(key, str(path)))

    @pytest.mark.parametrize("written", WRITTEN)
    @pytest.mark.parametrize(
        ("other", "value"),
        [
            ("requests.focus_heads", "FILE"),
            ("baseline.path", "FILE"),
            ("export.http.token_file", "FILE"),
            ("probes", [{"file": "FILE"}]),
            ("actions.rules", [WEBHOOK]),
        ],
    )
    def test_what_is_written_is_not_read(self, written: str, other: str, value: Any, folder: Path) -> None:
        """Lines of traces would become tokens that let in; under another name of the file, too."""
        (folder / "file").touch()
        (folder / "link").symlink_to("file")
        named = json.loads(json.dumps(value).replace("FILE", str(folder / "file")))
        config = settings({written: str(folder / "link"), other: named})
        with pytest.raises(ConfigError, match=rf"{written} must be a file of its own, .* got the path of {other}"):
            require_usable(Path("x.yaml"), config)

    def test_what_is_written_is_written_once(self, folder: Path) -> None:
        """Nor over the configuration, nor into what another rotates; where nothing is kept all may write."""
        path = folder / "glassbox.yaml"
        for key in WRITTEN:
            with pytest.raises(ConfigError, match=f"{key} must be .* got the path of the configuration itself; name"):
                require_usable(path, settings({key: str(path)}))
        for first, second, name in (
            ("export.jsonl.path", "actions.audit.path", "a"),
            ("export.jsonl.path", "requests.records.path", "a.3"),
            ("actions.audit.path", "requests.records.path", "../" + folder.name + "/a"),
        ):
            both = {first: str(folder / "a"), second: str(folder / name)}
            with pytest.raises(ConfigError, match=f"{first} must be .* got the path of {second}; name another"):
                require_usable(path, settings(both))
        require_usable(path, settings(dict.fromkeys(WRITTEN, "/dev/null")))
        require_usable(path, settings({key: str(folder / f"a.{n}x") for n, key in enumerate(WRITTEN)}))

    @pytest.mark.parametrize("key", KEYS)
    def test_what_is_no_path(self, key: str, folder: Path) -> None:
        """A URL and a shell's variable would be folders, made where the server happens to run."""
        for path, rule in (
            ("s3://bucket/run.jsonl", "must be a path, not a URL; take away all up to ://"),
            ("$HOME/run.jsonl", "must be a path without variables, for .HOME is not replaced; spell it out"),
            ("/var/${USER}/x", "must be a path without variables, for ..USER. is not replaced"),
        ):
            with pytest.raises(ValueError, match=rule):
                config_with(key, path)
        config_with(key, f"{folder}/price$/a$b")

    def test_a_window_that_ends_before_the_next_snapshot(self, folder: Path) -> None:
        """Drift would be there for a moment after each, and its alert never."""
        (folder / "b.npz").touch()
        values = {"baseline.path": str(folder / "b.npz"), "baseline.window_s": 5.0, "export.interval_s": 30.0}
        with pytest.raises(ConfigError, match=r"must be at least export\.interval_s, 30, got 5; use 600"):
            require_usable(Path("x.yaml"), settings(values))
        require_usable(Path("x.yaml"), settings({**values, "baseline.window_s": 30.0}))

    def test_a_baseline_that_is_not_there(self, folder: Path) -> None:
        """It is read, not made."""
        assert "(No such file or directory); save one with glassbox baseline save" in problem(
            "baseline.path", str(folder / "b.npz")
        )

    @pytest.mark.usefixtures("unprivileged")
    @pytest.mark.parametrize("missing", ["", "new/deeper/"])
    @pytest.mark.parametrize(("key", "format"), [(KEYS[0], None), (KEYS[1], "jsonl"), (KEYS[1], "parquet")])
    def test_without_permission(self, key: str, format: str | None, missing: str) -> None:
        """In a directory of others, or below one that would have to be made there."""
        path = f"/etc/{missing}run"
        assert "(Permission denied)" in problem(key, path, **({"format": format} if format else {}))

    @pytest.mark.usefixtures("unprivileged")
    def test_a_file_of_others(self) -> None:
        """It may be read, but not written to."""
        assert "(Permission denied)" in problem("export.jsonl.path", "/etc/passwd")
        require_usable(Path("x.yaml"), config_with("baseline.path", "/etc/passwd"))


class TestNothingIsLeft:
    @pytest.mark.parametrize("key", KEYS[:2])
    @pytest.mark.parametrize("name", ["run.jsonl", "new/deeper/run.jsonl"])
    def test_a_new_path(self, key: str, name: str, folder: Path) -> None:
        """It can be made, and is not."""
        require_usable(Path("x.yaml"), config_with(key, f"{folder}/{name}"))
        assert set() == contents(folder)

    def test_a_file_that_is_there(self, folder: Path) -> None:
        """It keeps its content and its time."""
        path = folder / "run.jsonl"
        path.write_text("line\n")
        os.utime(path, (1, 1))
        require_usable(Path("x.yaml"), config_with("export.jsonl.path", str(path)))
        assert ("line\n", 1) == (path.read_text(), path.stat().st_mtime)

    def test_a_link_to_nothing(self, folder: Path) -> None:
        """What it leads to can be made, and is not."""
        (folder / "link").symlink_to("run.jsonl")
        require_usable(Path("x.yaml"), config_with("export.jsonl.path", str(folder / "link")))
        assert {folder / "link"} == contents(folder)

    def test_devices_are_left_alone(self) -> None:
        """/dev/null is a place to write to."""
        require_usable(Path("x.yaml"), config_with("export.jsonl.path", "/dev/null"))


class TestWhoAsks:
    def test_check_and_start_alike(self, folder: Path) -> None:
        """`glassbox check` says in one line what stops the server."""
        file = folder / "glassbox.yaml"
        file.write_text("export: {jsonl: {path: ~run.jsonl}}")
        with pytest.raises(ConfigError) as caught:
            load_usable(file)
        result = CliRunner().invoke(main, ["check", str(file)])
        assert (1, "", f"glassbox: {caught.value}\n") == (result.exit_code, result.stdout, result.stderr)

    def test_check_reads_the_baseline(self, folder: Path) -> None:
        """A file that is no baseline is not valid."""
        file = folder / "glassbox.yaml"
        (folder / "b.npz").write_text("no archive")
        file.write_text(f"baseline: {{path: {folder}/b.npz}}")
        result = CliRunner().invoke(main, ["check", str(file)])
        assert (1, 1) == (result.exit_code, len(result.stderr.splitlines()))
        assert "b.npz is no file of glassbox" in result.stderr

    def test_check_shows_no_secrets(self, folder: Path) -> None:
        """Its output stands in a build's log."""
        file = folder / "glassbox.yaml"
        file.write_text("export: {otel: {headers: {authorization: s3cret}, endpoint: 'http://me:s3cret@c:4317'}}")
        result = CliRunner().invoke(main, ["check", str(file)])
        assert 0 == result.exit_code
        assert "s3cret" not in result.stdout
        assert {"authorization": "(not shown)"} == yaml.safe_load(result.stdout)["export"]["otel"]["headers"]

    def test_an_edit(self, folder: Path) -> None:
        """It is refused as one with a wrong number; the settings in force stay, and a later good edit counts."""
        file = folder / "glassbox.yaml"
        file.write_text("sample_rate: 0.1")
        errors: list[str] = []
        follower = ConfigFollower(
            file, lambda config: None, lambda error: errors.append(str(error)), initial=load_config(file)
        )
        follower.look()
        file.write_text("{sample_rate: 0.2, export: {jsonl: {path: ~run.jsonl}}}")
        follower.look()
        assert (False, 0.1) == (follower.status.successful, follower.current and follower.current.sample_rate)
        assert "there is no user 'run.jsonl'" in errors[0]
        file.write_text("{sample_rate: 0.2}")
        follower.look()
        assert (True, 0.2) == (follower.status.successful, follower.current and follower.current.sample_rate)

    def test_what_broke_later_holds_nothing_back(self, folder: Path) -> None:
        """A directory that was removed since doesn't keep `enabled: false` from arriving."""
        before = config_with("export.jsonl.path", "/proc/nothing/run.jsonl")
        after = before.model_copy(update={"enabled": False})
        require_usable(Path("x.yaml"), after, before=before)
        with pytest.raises(ConfigError):
            require_usable(Path("x.yaml"), after)

    def test_the_file_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """GLASSBOX_CONFIG=~nobody-here/x.yaml is one line, too."""
        with pytest.raises(ConfigError, match="GLASSBOX_CONFIG must lead to a file"):
            find_config({"GLASSBOX_CONFIG": "~nobody-here/x.yaml"})
        monkeypatch.setenv("GLASSBOX_CONFIG", "~nobody-here/x.yaml")
        result = CliRunner().invoke(main, ["check"])
        assert (1, 1) == (result.exit_code, len(result.stderr.splitlines()))
