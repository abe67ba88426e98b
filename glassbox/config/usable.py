"""Whether a valid configuration works here: its paths are expanded, looked at and tried.

Owns what a configuration alone can't tell; `glassbox check`, the start and an edit ask it alike. What is tried leaves
nothing behind. A disk that is full is no mistake of the file, and passes.
"""

import errno
import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from glassbox.config.load import GlassboxConfig, RuleConfig, load_config
from glassbox.config.model import HTTP_FILES
from glassbox.config.webhook_secret import read_webhook_secret
from glassbox.config.wording import setting_error
from glassbox.core.files import ForeignFileError, require_own
from glassbox.core.printable import printable
from glassbox.core.secret_file import SecretFileError

# The longest suffix of a file that is rotated, replaced or locked: `.jsonl` becomes `.jsonl.3`.
_LONGEST_SUFFIX: Final = 8
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


class _Unusable(ValueError):
    """Why a path can't be used, as the end of `got PATH (...)`."""


@dataclass(frozen=True)
class _PathSetting:
    """A setting that names a file or a directory.

    Attributes:
        key: of the setting.
        value: of a configuration: the path, and what else decides what it must be.
        rule: what it must be.
        remedy: what to do if it isn't.
        try_it: raises _Unusable or OSError if it isn't.
    """

    key: str
    value: Callable[[GlassboxConfig], tuple[str | None, str]]
    rule: Callable[[GlassboxConfig], str]
    remedy: str
    try_it: Callable[[Path, GlassboxConfig], None]


class Trial(Protocol):
    """What a room above this one knows to try of a configuration, as whether a probe's file is one."""

    def __call__(self, path: Path, config: GlassboxConfig, before: GlassboxConfig | None) -> None:
        """See `require_usable`."""


def load_usable(path: Path | str, also: Trial | None = None) -> GlassboxConfig:
    """Load, check and try the YAML file at `path`.

    Args:
        also: see `require_usable`.

    Raises:
        ConfigError: as `load_config`; also if something that it names can't be used here.
    """
    config = load_config(path)
    require_usable(Path(path), config, also=also)
    return config


def require_usable(
    path: Path, config: GlassboxConfig, before: GlassboxConfig | None = None, also: Trial | None = None
) -> None:
    """Try what a configuration names.

    Args:
        path: of the YAML file, for the message.
        before: the configuration in force: what it named already isn't tried again, so that a directory which vanished
            meanwhile doesn't hold back an edit of something else.
        also: tries more, once all paths were found good.

    Raises:
        ConfigError: one line that names file, key, rule, value and remedy.
    """
    records = config.requests.records
    if records.path is not None and records.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        remedy = "pip install 'vllm-glassbox[tables]', or use `jsonl`"
        raise setting_error(path, "requests.records.format", "must be jsonl without pyarrow, got parquet", remedy)
    for setting in _PATHS:
        named = setting.value(config)
        written = named[0]
        if written is None or (before is not None and setting.value(before) == named):
            continue
        problem = _problem(setting, written, config)
        if problem is not None:
            shown = f"{setting.rule(config)}, got {printable(written)!r} ({problem})"
            raise setting_error(path, setting.key, shown, setting.remedy)
    _require_apart(path, config)
    window_s, interval_s = config.baseline.window_s, config.export.interval_s
    if config.baseline.path is not None and window_s < interval_s:
        # Rows of the last snapshot would be too old to compare before the next one comes.
        said = f"must be at least export.interval_s, {interval_s:g}, got {window_s:g}"
        raise setting_error(path, "baseline.window_s", said, f"use `{max(600, interval_s):g}`")
    for number, rule in enumerate(config.actions.rules):
        if before is None or rule not in before.actions.rules:
            _require_secret(path, number, rule)
    if also is not None:
        also(path, config, before)


def _require_apart(path: Path, config: GlassboxConfig) -> None:
    """See that what is written is no other file of the configuration: lines of traces would mix with others', or become
    tokens that let in."""
    written = {
        "export.jsonl.path": config.export.jsonl.path,
        "actions.audit.path": config.actions.audit.path,
        "requests.records.path": config.requests.records.path,
    }
    read = {
        "requests.focus_heads": config.requests.focus_heads,
        "baseline.path": config.baseline.path,
        **{f"probes.{number}.file": probe.file for number, probe in enumerate(config.probes)},
        **{f"export.http.{name}": getattr(config.export.http, name) for name in HTTP_FILES},
        **{f"actions.rules.{n}.webhook.secret_file": r.webhook.secret_file for n, r in enumerate(config.actions.rules)},
    }
    places = {key: _place(named) for key, named in {**written, **read}.items() if named is not None}
    places["the configuration itself"] = _place(str(path))
    for key in [key for key in written if key in places]:
        # Rotated ones, too: `.jsonl` becomes `.jsonl.3`.
        taken = re.compile(re.escape(places[key]) + r"(\.\d+)?")
        for other, place in places.items():
            if other != key and taken.fullmatch(place) and (not os.path.exists(place) or os.path.isfile(place)):
                rule = f"must be a file of its own, as must its rotated ones, got the path of {other}"
                raise setting_error(path, key, rule, "name another, or use `null` to write none")


def _place(named: str) -> str:
    """Where a path leads; one whose ~ can't be replaced was refused before, or isn't used."""
    return os.path.realpath(os.path.expanduser(named))


def _require_secret(path: Path, number: int, rule: RuleConfig) -> None:
    written = rule.webhook.secret_file
    if written is None or "webhook" not in rule.do:
        return
    try:
        read_webhook_secret(expanded(written))
    except (_Unusable, SecretFileError) as error:
        key = f"actions.rules.{number}.webhook.secret_file"
        problem, _, remedy = str(error).partition("; ")
        shown = problem if problem.startswith("must") else f"must be a file that can be read ({problem})"
        raise setting_error(path, key, f"{shown}, got {printable(written)!r}", remedy or "name another") from None


def _problem(setting: _PathSetting, written: str, config: GlassboxConfig) -> str | None:
    try:
        setting.try_it(expanded(written), config)
    except _Unusable as error:
        return str(error)
    except OSError as error:
        return None if error.errno in _FULL else error.strerror or str(error)
    except ValueError as error:  # of the system's calls: a character that no file's name can have
        return str(error)
    return None


def expanded(path: str) -> Path:
    """A path with ~ replaced.

    Raises:
        _Unusable: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = path.partition("/")[0][1:]
        if user:
            raise _Unusable(f"there is no user {user!r}; of your own home directory it would be ~/{user}") from None
        raise _Unusable("this process has no home directory") from None


def _try_file(path: Path, _config: GlassboxConfig) -> None:
    """A file that can be appended to, or made."""
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            _try_file(path.parent / path.readlink(), _config)
            return
        _try_new(path)
        return
    if stat.S_ISDIR(found.st_mode):
        raise _Unusable("that is a directory")
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        raise _Unusable("that is a pipe, a socket or a disk")
    # Neither made nor cut: only whether it may be opened as its writer opens it.
    os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))


def _try_directory(path: Path) -> None:
    """A directory that files can be made in, or that can be made."""
    try:
        found = path.stat()
    except FileNotFoundError:
        _try_new(path)
        return
    if not stat.S_ISDIR(found.st_mode):
        raise _Unusable("that is a file")
    _try_making_a_file(path)


def _try_records(path: Path, config: GlassboxConfig) -> None:
    if config.requests.records.format == "parquet":
        _try_directory(path)
    else:
        _try_file(path, config)


def _try_reading(path: Path, _config: GlassboxConfig) -> None:
    """A file that can be read, and that no other user could have written."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise _Unusable("that is no regular file")
        require_own(path, found)
    except ForeignFileError as error:
        raise _Unusable(str(error)) from None
    finally:
        os.close(handle)


def _try_new(path: Path) -> None:
    """A path at which there is nothing: whether something can be made in the nearest directory that there is."""
    above = path.absolute().parent
    missing = [path.name]
    while not os.path.lexists(above):
        missing.append(above.name)
        above = above.parent
    if not above.is_dir():
        raise _Unusable(f"{printable(str(above))} is no directory")
    longest = os.pathconf(above, "PC_NAME_MAX") - _LONGEST_SUFFIX
    for name in missing:
        if len(os.fsencode(name)) > longest:
            raise _Unusable(f"a name of more than {longest} bytes")
    _try_making_a_file(above)


def _try_making_a_file(directory: Path) -> None:
    """Without a name where the file system can do that; else it is gone before this returns."""
    with tempfile.TemporaryFile(dir=directory, prefix=".glassbox-"):
        pass


_PATHS: Final = (
    _PathSetting(
        "requests.records.path",
        lambda config: (config.requests.records.path, config.requests.records.format),
        lambda config: (
            "must be a directory that can be written to"
            if config.requests.records.format == "parquet"
            else "must be a file that can be written to"
        ),
        "name another, correct its permissions, or use `null` to write none",
        _try_records,
    ),
    _PathSetting(
        "requests.focus_heads",
        lambda config: (config.requests.focus_heads, ""),
        lambda _config: "must be a file that can be read",
        "make one with glassbox heads, or use `null` for all heads",
        _try_reading,
    ),
    _PathSetting(
        "baseline.path",
        lambda config: (config.baseline.path, ""),
        lambda _config: "must be a file that can be read",
        "save one with glassbox baseline save, or use `null` to compare with nothing",
        _try_reading,
    ),
    _PathSetting(
        "export.jsonl.path",
        lambda config: (config.export.jsonl.path, ""),
        lambda _config: "must be a file that can be written to",
        "name another, correct its permissions, or use `null` to write none",
        _try_file,
    ),
    _PathSetting(
        "actions.audit.path",
        lambda config: (config.actions.audit.path, ""),
        lambda _config: "must be a file that can be written to",
        "name another, correct its permissions, or use `null` to write none",
        _try_file,
    ),
)
