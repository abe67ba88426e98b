"""From what is wrong with a setting to one line: key, rule, value and remedy.

Owns the wording of errors and of values, and which of those may be secrets. Rules and remedies stand beside the
settings, in `model.py`.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from glassbox.config.yaml import ConfigError, UnclearNumber, kind
from glassbox.core.printable import printable

_MAX_VALUE_CHARS: Final = 60

_SWITCH_WORDS: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), "true"),
    **dict.fromkeys(("false", "0", "no", "off"), "false"),
}
_EXPECTED_TYPES: Final = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "model_type": "a mapping",
}


def setting_error(path: Path, key: str, problem: str, remedy: str) -> ConfigError:
    """An error of one setting.

    Args:
        problem: rule and value.
        remedy: what to do; what it says to write stands between backquotes, which aren't shown.
    """
    return ConfigError(path, f"{key} {problem}; {_unquoted(remedy)}", key, advised(remedy))


def advised(remedy: str) -> tuple[str, ...]:
    """What a remedy says to write: all that stands between backquotes."""
    return tuple(re.findall("`([^`]+)`", remedy))


def _unquoted(remedy: str) -> str:
    return re.sub("`([^`]+)`", r"\1", remedy)


def validation_error(path: Path, error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """One line for pydantic's findings: the first of them, and how many more there are."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    detail = details[0]
    if detail["type"] in {"extra_forbidden", "invalid_key"}:
        return ConfigError(path, _describe_unknown(detail["loc"], model) + more, _dotted(detail["loc"]))
    problem, remedy = _describe(detail, model)
    return setting_error(path, _dotted(detail["loc"]), problem, remedy + more)


def _describe(detail: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """Rule and value, and the remedy."""
    location = detail["loc"]
    problem = detail["type"]
    extra = _field_extra(location, model)
    rule = extra.get("rule", "must be valid")
    remedy = extra.get("remedy", "delete the line to use the default")
    value = detail["input"]
    if problem == "value_error" and "ctx" in detail:
        # A validator of ours, which words rule and remedy itself.
        rule, _, own_remedy = str(detail["ctx"]["error"]).partition("; ")
        remedy = own_remedy or remedy
        if ", got " in rule:  # of several keys: it says, too, which of them there are
            return rule, remedy
    elif problem == "missing":
        return f"{rule}, got nothing", remedy
    elif problem in _EXPECTED_TYPES:
        rule = f"must be {_EXPECTED_TYPES[problem]}"
        remedy = _type_remedy(problem, value, lambda other: _accepts(model, location, other)) or remedy
    elif problem == "literal_error" and isinstance(value, str):
        options = re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected", "")))
        if near := difflib.get_close_matches(value.lower(), options, n=1, cutoff=0.8):
            remedy = f"write `{near[0]}`"
    elif isinstance(value, bool):
        remedy = f"{remedy} (on, off, yes and no are true and false in YAML; put words between quotes)"
    return f"{rule}, got {_show(location, value, model)}", remedy


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


def _type_remedy(problem: str, value: object, accepted: Callable[[object], bool]) -> str | None:
    """What to do about a value of the wrong type, if the value itself tells."""
    if value is None:
        return "give it a value, or delete the line to use the default"
    if problem == "bool_type":
        word = _SWITCH_WORDS.get(str(value).strip().lower())
        return None if word is None else f"write `{word}` without quotes"
    if problem not in {"float_type", "int_type", "int_from_float"}:
        return None
    # An advice that the next message refuses would be none.
    numbers = [number for number in _numbers(value) if accepted(number)]
    if not numbers:
        return None if _numbers(value) else "write a plain number"
    quotes = "" if isinstance(value, UnclearNumber | float) else " without quotes"
    return f"write {' or '.join(f'`{number}`' for number in numbers)}{quotes}"


def _numbers(value: object) -> tuple[int | float, ...]:
    """What somebody may have meant who wrote this instead of a number."""
    if isinstance(value, UnclearNumber):
        return value.meant
    if not isinstance(value, str | float):
        return ()
    try:
        number = float(value)
    except ValueError:
        return ()
    if not math.isfinite(number):
        return ()
    return (int(number) if number.is_integer() and abs(number) < 1e15 else number,)


def _accepts(model: type[BaseModel], location: tuple[int | str, ...], value: object) -> bool:
    """Whether a setting may have that value, with all others as they are by default."""
    content = value
    for part in reversed(location):
        content = {part: content}
    try:
        model.model_validate(content)
    except ValidationError:
        return False
    return True


def _fields(location: Sequence[int | str], model: type[BaseModel]) -> Iterator[FieldInfo]:
    """The fields of the model along a location, the innermost that it has last."""
    current: object = model
    for part in location:
        if isinstance(part, int):
            current = _item(current)
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return
        field = current.model_fields.get(part)
        if field is None:
            return
        yield field
        current = field.annotation


def _item(annotation: object) -> object:
    """What a list of that type has in it; None of anything else."""
    return next(iter(get_args(annotation)), None) if get_origin(annotation) is tuple else None


def _field_extra(location: Sequence[int | str], model: type[BaseModel]) -> Mapping[str, Any]:
    """`json_schema_extra` (rule and remedy) of the innermost field that `location` names."""
    found: Mapping[str, Any] = {}
    for field in _fields(location, model):
        found = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return found


def _section_keys(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    *_, field = (None, *_fields(location, model))
    section: object = model if field is None else field.annotation
    if location and isinstance(location[-1], int):
        section = _item(section)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


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


def is_secret(location: Sequence[int | str], value: object, model: type[BaseModel]) -> bool:
    """Whether a setting's value may be a secret: if it isn't in the model's repr, or looks like a URL with a user."""
    return any(field.repr is False for field in _fields(location, model)) or (isinstance(value, str) and "@" in value)


def shown(value: object) -> str:
    """A value on one short line, as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, UnclearNumber):
        readings = " or ".join(map(str, value.meant))
        return f"{value[:_MAX_VALUE_CHARS]}, which may be read as {readings or 'another number'}"
    # Not repr: references in the file can make a value of a few lines unfold to gigabytes.
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = short.maxlong = _MAX_VALUE_CHARS
    text = printable(value[: 2 * _MAX_VALUE_CHARS]) if isinstance(value, str) else short.repr(value)
    return f"{text[: _MAX_VALUE_CHARS - 3]}..." if len(text) > _MAX_VALUE_CHARS else text


def _show(location: tuple[int | str, ...], value: object, model: type[BaseModel]) -> str:
    if is_secret(location, value, model):
        return "a value that is not shown, as it may be a secret"
    if isinstance(value, Mapping):
        return kind(value)
    if isinstance(value, str) and not isinstance(value, UnclearNumber):
        return f"the string {shown(value)!r}"
    return shown(value)
