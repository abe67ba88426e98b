"""From a path to a plain mapping.

Owns reading: size, encoding, YAML syntax, what is a number, duplicate keys. Whatever is wrong is a `ConfigError`; how
one of a setting is worded is `wording.py`'s, what the settings mean `model.py`'s.
"""

import os
import re
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from glassbox.core.printable import printable

# A configuration has some fifty lines; a larger file is a checkpoint or a log named by mistake.
MAX_CONFIG_BYTES: Final = 1_000_000


class ConfigError(ValueError):
    """The configuration can't be used. `str()` is one line: file, key, rule, value, remedy.

    Attributes:
        key: dotted name of the setting; None if it is no single one.
        advice: what the remedy says to write, as YAML: a value of `key`, or lines such as `sample_rate: 0`.
    """

    def __init__(self, path: Path | str, problem: str, key: str | None = None, advice: tuple[str, ...] = ()) -> None:
        # A message is logged and shown as one line, whatever the path or the YAML library put into it.
        super().__init__(printable(" ".join(f"{path}: {problem}".split())))
        self.key = key
        self.advice = advice


class UnclearNumber(str):
    """A number that its reader may take for another one, as it was written; `meant` is what it may be.

    In YAML 1.1 0100 is 64 and 1:30 is 90. As a setting's text (a header, a path) it is what was written; where a
    number is needed it is refused, with these as remedy.
    """

    meant: tuple[int | float, ...]


_DECIMAL: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_UNCLEAR: Final = re.compile(
    r"[-+]?(?:0[0-9_]+|[1-9][0-9]*_[0-9_]*|0b[01_]+|0o[0-7]+|0x[0-9a-fA-F_]+"  # octal, grouped, of another base
    r"|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?|(?=[0-9.]*_)[0-9][0-9_]*\.[0-9_]*)"  # sexagesimal, grouped fractions
)
# A merge key copies another mapping; a file with three levels of settings has use for a few.
_MAX_MERGED: Final = 16
_MAX_KEYS: Final = 10_000
_MAX_MEANT: Final = 10**15


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, for which a key given twice is an error.

    If the last one won, an edit of the first would seem to have no effect. A date is text, as in YAML 1.2.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception as error:  # `!!bool maybe` is a KeyError, `!!timestamp x` an AttributeError
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"it can't be read as {kind} ({type(error).__name__})", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merged mappings that merge others multiply: nine lines of ten would make 10^9 keys.
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged) > _MAX_MERGED:
            problem = f"it merges more than {_MAX_MERGED} mappings"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            problem = f"a mapping of more than {_MAX_KEYS} keys"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """A number as YAML 1.2 has it, also after a tag (`!!int 0100`); others are left as they were written."""
        text = str(self.construct_scalar(node))
        if _DECIMAL.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        if not _UNCLEAR.fullmatch(text):
            raise ValueError(text)
        unclear = UnclearNumber(text)
        unclear.meant = _readings(text)
        return unclear


# Of YAML 1.1 everything but numbers, timestamps and the value `=`.
_StrictLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].rpartition(":")[2] not in {"int", "float", "timestamp", "value"}]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (("int", _DECIMAL), ("float", _FLOAT), ("int", _UNCLEAR)):
    _name = f"tag:yaml.org,2002:{_tag}"
    _StrictLoader.add_implicit_resolver(_name, re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789"))
    _StrictLoader.add_constructor(_name, _StrictLoader.construct_number)


def _readings(text: str) -> tuple[int | float, ...]:
    """What an unclear number may be: first as YAML 1.1 has it, then as YAML 1.2."""
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-").replace("_", "")
    found: list[int | float] = []
    try:
        if ":" in digits:
            *minutes, seconds = digits.split(":")
            whole = 0
            for part in minutes:
                whole = 60 * whole + int(part)
            found.append(60 * whole + (float(seconds) if "." in seconds else int(seconds)))
        elif digits[:2] in {"0b", "0o", "0x"}:
            found.append(int(digits, 0))
        elif "." in digits:
            found.append(float(digits))
        else:
            if digits.startswith("0") and set(digits) <= set("01234567"):
                found.append(int(digits, 8))
            found.append(int(digits))
    except ValueError:  # more digits than Python takes
        return ()
    # Of a number that no setting can have it doesn't matter what it may be.
    return tuple(dict.fromkeys(sign * value for value in found if value < _MAX_MEANT))


def parse_mapping(path: Path, data: bytes) -> dict[Any, Any]:
    """Parse `data`, the content of the YAML file at `path`.

    Returns:
        the file's top-level mapping, of plain Python values.

    Raises:
        ConfigError: not UTF-8, not YAML, empty or not a mapping.
    """
    text = _decode(path, data)
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(
            path, f"is not valid YAML{where}: {problem}; check quotes, colons and indentation there"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            path, f"is not valid YAML in line {line}: character {error.character!r} is not allowed; delete it"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(path, f"is not valid YAML: {error}; correct that value") from None
    except RecursionError:
        raise ConfigError(path, "is not valid YAML: nested too deep; it needs three levels") from None
    except Exception as error:  # whatever else a parser of others ends with: the file is at fault, not its reader
        raise ConfigError(
            path, f"is not valid YAML ({type(error).__name__}: {error}); write plain keys and values, without tags"
        ) from None
    if value is None:
        raise ConfigError(path, "must not be empty; write at least `enabled: true`", advice=("enabled: true",))
    if not isinstance(value, dict):
        raise ConfigError(
            path,
            f"must be a mapping of settings, got {kind(value)}; write lines such as `sample_rate: 0.01`",
            advice=("sample_rate: 0.01",),
        )
    return value


def read_bytes(path: Path) -> bytes:
    """The content of the file at `path`.

    Raises:
        ConfigError: not there, not a readable regular file, or larger than MAX_CONFIG_BYTES.
    """
    try:
        # Non-blocking, so that a FIFO named by mistake can't hang the server before its kind is looked at.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(path, "must be a file, but does not exist; create it or correct GLASSBOX_CONFIG") from None
    except PermissionError:
        raise ConfigError(path, f"must be readable by user {os.geteuid()}, permission denied; use chmod") from None
    except (OSError, ValueError) as error:
        raise ConfigError(path, f"can't be opened: {error}; correct GLASSBOX_CONFIG") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(path, "must be a file, got a directory; name the YAML file in it")
        if not stat.S_ISREG(mode):
            raise ConfigError(path, "must be a regular file, got a device or pipe; name a YAML file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, f"can't be read: {error.strerror}; check the file system") from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(path, f"must be at most {MAX_CONFIG_BYTES} bytes, got more; is it the right file?")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            path,
            f"must be UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8",
        ) from None


def kind(value: object) -> str:
    """`a mapping`, `a list`, or what else a value is."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else f"a value of type {type(value).__name__}"
