"""From a path to a plain mapping, and from what is wrong with it to one line.

Owns reading (size, encoding, YAML syntax, duplicate keys) and the wording of every configuration error. It
does not know what the settings mean: that is `glassbox.config`.
"""

import difflib
import os
import reprlib
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

# A configuration has some fifty lines; a larger file is a checkpoint or a log named by mistake.
MAX_CONFIG_BYTES: Final = 1_000_000
_MAX_VALUE_CHARS: Final = 60

_EXPECTED_TYPES: Final = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "model_type": "a mapping",
}


class ConfigError(ValueError):
    """The configuration can't be used. `str()` is one line: file, key, rule, value, remedy."""

    def __init__(self, path: Path | str, problem: str) -> None:
        # A message is logged and shown as one line, whatever the path or the YAML library put into it.
        super().__init__(" ".join(f"{path}: {problem}".split()))


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader for which a key given twice is an error.

    If the last one won, an edit of the first would seem to have no effect.
    """

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
    if value is None:
        raise ConfigError(path, "must not be empty; write at least `enabled: true`")
    if not isinstance(value, dict):
        raise ConfigError(
            path,
            f"must be a mapping of settings, got {_kind(value)}; write lines such as `sample_rate: 0.01`",
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


def validation_error(path: Path, error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """One line for pydantic's findings: the first of them, and how many more there are."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return ConfigError(path, _describe(details[0], model) + more)


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location = detail["loc"]
    kind = detail["type"]
    if kind in {"extra_forbidden", "invalid_key"}:
        return _describe_unknown(location, model)
    extra = _field_extra(location, model)
    rule = extra.get("rule", "must be valid")
    remedy = extra.get("remedy", "delete the line to use the default")
    value = detail["input"]
    if kind == "value_error" and "ctx" in detail:
        # A validator of ours, which words rule and remedy itself.
        rule, _, own_remedy = str(detail["ctx"]["error"]).partition("; ")
        remedy = own_remedy or remedy
    elif kind in _EXPECTED_TYPES:
        rule = f"must be {_EXPECTED_TYPES[kind]}"
        remedy = _type_remedy(kind, value) or remedy
    return f"{_dotted(location)} {rule}, got {_show(location, value)}; {remedy}"


def _describe_unknown(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    # The value is left out: under a misspelt `headers` it may be a secret.
    key = str(location[-1])
    siblings = _section_keys(location[:-1], model)
    leaves = {name.rpartition(".")[2]: name for name in all_keys(model)}
    prefix = "".join(f"{part}." for part in location[:-1])
    if near := difflib.get_close_matches(key, siblings, n=1):
        remedy = f"did you mean {prefix}{near[0]}?"
    elif near := difflib.get_close_matches(key, leaves, n=1, cutoff=0.8):
        remedy = f"did you mean {leaves[near[0]]}?"
    else:
        remedy = f"known here: {', '.join(siblings)}"
    return f"{_dotted(location)} is not a known key; {remedy}"


def _type_remedy(kind: str, value: object) -> str | None:
    """What to do about a value of the wrong type, if the value itself tells."""
    if value is None:
        return "give it a value, or delete the line to use the default"
    if isinstance(value, str) and kind in {"float_type", "int_type"}:
        try:
            number = float(value)
        except ValueError:
            return "write a plain number"
        # YAML 1.1 reads 1e-2 as a string; only 1.0e-2 is a number.
        return f"write {int(number) if number.is_integer() else number} without quotes or exponent"
    if kind in {"float_type", "int_type", "int_from_float"}:
        return "write a plain number"
    return None


def _field_extra(location: tuple[int | str, ...], model: type[BaseModel]) -> Mapping[str, Any]:
    """`json_schema_extra` (rule and remedy) of the innermost field that `location` names."""
    found: Mapping[str, Any] = {}
    current: object = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            break
        field = current.model_fields.get(str(part))
        if field is None:
            break
        found = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        current = field.annotation
    return found


def _section_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    current = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        current = field.annotation
    return list(current.model_fields)


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings below `model`, in the order of the file."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += all_keys(section, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _dotted(location: tuple[int | str, ...]) -> str:
    # pydantic marks an error about a mapping's key with this pseudo part.
    return ".".join(str(part) for part in location if part != "[key]")


def _show(location: tuple[int | str, ...], value: object) -> str:
    if "headers" in location or (isinstance(value, str) and "@" in value):
        return "a value that is not shown, as it may be a secret"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return _kind(value)
    # Not repr: references in the file can make a value of a few lines unfold to gigabytes.
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = short.maxlong = _MAX_VALUE_CHARS
    text = short.repr(value)
    if len(text) > _MAX_VALUE_CHARS:
        text = f"{text[: _MAX_VALUE_CHARS - 3]}..."
    return f"the string {text}" if isinstance(value, str) else text


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else f"a value of type {type(value).__name__}"
