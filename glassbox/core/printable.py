"""Text of others, as a terminal, a log or a page may show it."""

import unicodedata
from typing import Final

# Of these a terminal takes orders (Cc), readers see another order or nothing (Cf: bidi marks, zero width), lines break
# where no line ends (Zl, Zp), or encoders fail (Cs); what has no meaning (Co, Cn) is whatever a font makes of it.
_UNSHOWN: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"})


def printable(text: str) -> str:
    r"""The same text on one line without anything that isn't seen: such characters are shown as `\x1b` or `\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(character) if unicodedata.category(character) in _UNSHOWN else character for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
