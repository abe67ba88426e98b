"""Fields of a mapping that came as JSON from somebody: each is there, known, and within its rule.

Owns the checks and what an error says of field, rule and value. Which file it was and what to do, its caller adds.
"""

import json
import re
from collections.abc import Collection
from typing import Any, Final

from glassbox.core.printable import printable

MAX_TEXT: Final = 256
# Of any number: squares and sums of many stay finite.
MAX_NUMBER: Final = 1e30
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


class FieldError(ValueError):
    """A field breaks its rule; the message says field, rule and value."""


class JsonFields:
    """A mapping whose fields are taken one by one.

    Args:
        value: the mapping.
        names: of its fields, all of which must be there, and no others.
        where: of the mapping in the file, a prefix of its fields' names such as `features[3].`.

    Raises:
        FieldError: it is none, or has other fields.
    """

    def __init__(self, value: Any, names: Collection[str], where: str = "") -> None:
        self._where = where
        if not isinstance(value, dict):
            raise FieldError(f"{where.rstrip('.') or 'the file'} must be a mapping, got {_shown(value)}")
        self._values = value
        for name in names:
            if name not in value:
                raise self.error(name, "must be there, but is missing")
        for name in value:
            if name not in names:
                raise self.error(name, f"must be one of {', '.join(names)}")

    def error(self, name: str, rule: str) -> FieldError:
        """What is wrong with a field."""
        got = f", got {_shown(self._values[name])}" if name in self._values else ""
        return FieldError(f"{self._where}{name[:MAX_TEXT]} {rule}{got}")

    def part(self, name: str, names: Collection[str]) -> "JsonFields":
        """A mapping in it."""
        return JsonFields(self._values[name], names, f"{self._where}{name}.")

    def parts(self, name: str, names: Collection[str], most: int) -> list["JsonFields"]:
        """The mappings of a list of 1 to `most`."""
        items = self.items(name, most)
        return [JsonFields(item, names, f"{self._where}{name}[{i}].") for i, item in enumerate(items)]

    def items(self, name: str, most: int) -> list[Any]:
        """A list of 1 to `most`."""
        value = self._values[name]
        rule = f"must be a list of 1 to {most}"
        if not isinstance(value, list):
            raise self.error(name, rule)
        if not 1 <= len(value) <= most:
            raise FieldError(f"{self._where}{name} {rule}, got {len(value)}")
        return value

    def pairs(self, name: str, most: int) -> list[tuple[float, float]]:
        """Pairs of numbers, 1 to `most`."""
        pairs = self.items(name, most)
        if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs):
            raise self.error(name, "must be pairs of numbers")
        return [(float(a), float(b)) for a, b in pairs]

    def numbers(self, name: str, most: int) -> dict[str, float]:
        """A mapping of at most `most` numbers."""
        value = self._values[name]
        if not isinstance(value, dict) or len(value) > most:
            raise self.error(name, f"must be a mapping of at most {most} numbers")
        part = self.part(name, value)
        return {key: part.number(key) for key in value}

    def choice(self, name: str, *values: str | int) -> str | int:
        """One of a few values."""
        value = self._values[name]
        for one in values:
            if value == one and type(value) is type(one):
                return one
        raise self.error(name, f"must be {' or '.join(map(str, values))}")

    def text(self, name: str) -> str:
        """A short text that can be shown."""
        value = self._values[name]
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT or printable(value) != value:
            raise self.error(name, f"must be a text of 1 to {MAX_TEXT} characters that can be shown")
        return value

    def name(self, name: str) -> str:
        """A text that can be a label's value and a part of a key."""
        value = self._values[name]
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self.error(name, "must be 1 to 64 letters, digits, _ . or -, the first a letter")
        return value

    def number(self, name: str, lower: float = -MAX_NUMBER, upper: float = MAX_NUMBER) -> float:
        """A number within limits."""
        value = self._values[name]
        if not _is_number(value) or not lower <= value <= upper:
            raise self.error(name, f"must be a number from {lower:g} to {upper:g}")
        return float(value)

    def whole(self, name: str, upper: int) -> int:
        """A whole number from 0 on."""
        value = self._values[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= upper:
            raise self.error(name, f"must be a whole number from 0 to {upper}")
        return value


def parse_json(data: bytes) -> Any:
    """What JSON says; a key given twice is an error, and so is nesting without end.

    Raises:
        FieldError: it is none.
    """
    try:
        return json.loads(data, object_pairs_hook=_no_repeats)
    except RecursionError:
        raise FieldError("must be JSON, but is nested too deeply") from None
    except ValueError as error:
        raise FieldError(f"must be JSON ({str(error)[:MAX_TEXT]})") from None


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _shown(value: object) -> str:
    text = repr(value[:MAX_TEXT] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
