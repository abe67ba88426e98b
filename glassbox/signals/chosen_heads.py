"""The heads of the signal `focus` that the configuration names, read again when the file or its name changed.

Owns following it; what the file says is `focus_heads.py`'s.
"""

from collections.abc import Callable
from pathlib import Path

from glassbox.config.load import GlassboxConfig
from glassbox.config.wording import setting_error
from glassbox.core.files import FileVersion, own_version
from glassbox.core.printable import printable
from glassbox.signals.focus_heads import FocusHeadsError, read_focus_heads


def require_heads(path: Path, config: GlassboxConfig, before: GlassboxConfig | None) -> None:
    """Read the file that a configuration names; a `config.usable.Trial`.

    Raises:
        ConfigError: it is no file of heads.
    """
    named = config.requests.expanded_focus_heads
    if named is None or (before is not None and before.requests.focus_heads == config.requests.focus_heads):
        return
    try:
        read_focus_heads(named)
    except FocusHeadsError as error:
        rule = f"must be a file of heads, got {printable(str(named))!r} ({error})"
        raise setting_error(path, "requests.focus_heads", rule, "make one with glassbox heads, or use `null`") from None


class ChosenHeads:
    """The heads in force; not thread-safe.

    Args:
        config: returns the configuration of the moment.
        on_error: told once of each reason why the file can't be taken; the heads that were read last stay in force.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], on_error: Callable[[str], None] = lambda _: None) -> None:
        self._config, self._on_error = config, on_error
        self._version: tuple[Path, FileVersion | None] | None = None
        self._places: frozenset[tuple[int, int]] | None = None

    def current(self) -> frozenset[tuple[int, int]] | None:
        """(layer, head) of each, None for all; a `stat` if nothing changed."""
        path = self._config().requests.expanded_focus_heads
        if path is None:
            self._version = self._places = None
            return None
        version = path, own_version(path)
        if version != self._version:
            self._version = version
            try:
                self._places = read_focus_heads(path).places
            except FocusHeadsError as error:
                self._on_error(str(error))
        return self._places
