"""The probes that the configuration names, read again when a file or the configuration changed.

Owns which probes are in force. A file that can't be read any more, or is none, leaves the probe that was read last in
force and is told once. What a probe's file says is `probe.py`'s.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from glassbox.config.load import GlassboxConfig
from glassbox.config.model import ProbeConfig
from glassbox.config.wording import setting_error
from glassbox.core.files import FileVersion, own_version
from glassbox.core.printable import printable
from glassbox.signals.chosen_heads import require_heads
from glassbox.signals.probe import Probe, ProbeError, read_probe


def load_probe(named: ProbeConfig) -> Probe:
    """The probe that an entry of the configuration names, with the threshold that it gives.

    Raises:
        ProbeError: as `read_probe`, also if another user could have written it.
    """
    probe = read_probe(named.expanded_path, own=True)
    return probe if named.threshold is None else replace(probe, threshold=named.threshold)


def require_probes(path: Path, config: GlassboxConfig, before: GlassboxConfig | None) -> None:
    """Read the probes that a configuration names and the heads of `focus`, and see that its rules name these probes; a
    `config.usable.Trial`.

    Raises:
        ConfigError: a file can't be read or is none, two probes have the same name, or a rule names none of them.
    """
    require_heads(path, config, before)
    if before is None or before.probes != config.probes:
        _require_files(path, config)
        before = None
    _require_named(path, config, before)


def _require_files(path: Path, config: GlassboxConfig) -> None:
    names: dict[str, str] = {}
    for number, named in enumerate(config.probes):
        key = f"probes.{number}.file"
        try:
            probe = load_probe(named)
        except (ProbeError, RuntimeError) as error:  # no home directory
            rule = f"must be a probe's file, got {printable(named.file)!r} ({error})"
            raise setting_error(path, key, rule, "name one that glassbox train wrote, or use `probes: []`") from None
        if probe.name in names:
            rule = f"must be probes of different names, got {probe.name} in {printable(names[probe.name])!r}, too"
            raise setting_error(path, key, rule, "give one of them another name in its file, or take it out")
        names[probe.name] = named.file


def _require_named(path: Path, config: GlassboxConfig, before: GlassboxConfig | None) -> None:
    known = () if before is None else before.actions.rules
    new = [(n, rule) for n, rule in enumerate(config.actions.rules) if rule.probe is not None and rule not in known]
    if not new:
        return
    names = set()
    for named in config.probes:
        # One whose file broke since it was read stays in force, and must not hold back an edit of a rule.
        with contextlib.suppress(ProbeError, RuntimeError):
            names.add(load_probe(named).name)
    for number, rule in new:
        if rule.probe not in names:
            listed = f", which are {', '.join(sorted(names))}" if names else ", of which there are none"
            problem = f"must be the name of one of probes{listed}, got {printable(str(rule.probe))!r}"
            key = f"actions.rules.{number}.probe"
            raise setting_error(path, key, problem, "name one of them, or add the probe's file to probes")


class ProbeFiles:
    """The probes of a server; not thread-safe.

    Args:
        config: returns the configuration of the moment.
        on_error: told once of each reason why a file can't be taken.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], on_error: Callable[[str], None] = lambda _: None) -> None:
        self._config, self._on_error = config, on_error
        self._read: dict[ProbeConfig, tuple[FileVersion | None, Probe | None]] = {}
        self._refused: set[str] = set()

    def current(self) -> tuple[Probe, ...]:
        """Those in force, in the order of the configuration; a `stat` of each file if nothing changed."""
        named = self._config().probes
        self._read = {one: entry for one, entry in self._read.items() if one in named}
        probes: dict[str, Probe] = {}
        for one in named:
            probe = self._current(one)
            if probe is not None:
                probes.setdefault(probe.name, probe)
        return tuple(probes.values())

    def _current(self, named: ProbeConfig) -> Probe | None:
        try:
            version = own_version(named.expanded_path)
        except RuntimeError:  # no home directory in this process
            version = None
        before = self._read.get(named)
        if before is not None and before[0] == version:
            return before[1]
        last = None if before is None else before[1]
        try:
            probe: Probe | None = load_probe(named)
        except (ProbeError, RuntimeError) as error:
            probe = last
            if str(error) not in self._refused:
                self._refused.add(str(error))
                self._on_error(f"{error}; {'the one read last stays in force' if last else 'it scores nothing'}")
        self._read[named] = (version, probe)
        return probe
