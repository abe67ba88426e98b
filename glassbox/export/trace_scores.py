"""What documents, records and spans say of a traced request's scores.

Owns taking them from where the exporter has left them, and making at once those of a request that runs or that nobody
has scored. Signals on demand are never made here: somebody waits for the answer.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.signal_table import is_on_demand
from glassbox.export.trace_document import plain
from glassbox.signals.chosen_heads import ChosenHeads
from glassbox.signals.probe_files import ProbeFiles
from glassbox.signals.registry import signal_values
from glassbox.signals.scores import scores_of
from glassbox.signals.values import SignalValues
from glassbox.store.acts import acts_of
from glassbox.store.score_files import ScoreFiles, StoredScores, note_awaited
from glassbox.store.trace_directory import TraceKey
from glassbox.store.trace_record import RequestTrace

_LATER: Final = "it is computed once, by the exporter, after the request has ended"


class TraceScores:
    """The scores of a server's traces; may be asked from several threads.

    Args:
        run_dir: of the server.
        config: returns the configuration of the moment.
    """

    def __init__(self, run_dir: Path, config: Callable[[], GlassboxConfig]) -> None:
        self._files, self._probes, self._heads = ScoreFiles(run_dir), ProbeFiles(config), ChosenHeads(config)
        self._run_dir = Path(run_dir)
        self._lock = threading.Lock()

    def stored(self, keys: Collection[TraceKey]) -> dict[TraceKey, StoredScores]:
        """What the exporter has left of these requests.

        Raises:
            OSError: the run directory may not be read.
        """
        with self._lock:
            self._files.refresh()
            found = {key: self._files.of(key) for key in keys}
        return {key: scores for key, scores in found.items() if scores is not None}

    def document(self, trace: RequestTrace, key: TraceKey) -> dict[str, Any]:
        """The part `scores` of a request's document.

        Returns:
            `probes` and `signals` as in `Scores.summary`; `places`, by signal and value numbers [layer][head];
            `final`, false while more may come: the request runs, or the exporter has not scored it; and `actions`, what
        rules did about it (fields of `store/acts.py`), if they did anything.

        Raises:
            OSError: the run directory may not be read.
        """
        stored = self.stored([key]).get(key)
        asked = trace.options.signals
        now = [name for name in asked if not is_on_demand(name)]
        with self._lock:
            probes, heads = self._probes.current(), self._heads.current()
        values: Mapping[str, SignalValues]
        if stored is not None:
            values = signal_values(trace, now, heads)
            summary, places, final = stored.summary, dict(stored.places), True
        else:
            ready = [one for one in probes if not any(map(is_on_demand, one.needs.signals))]
            scores = scores_of(trace, ready, now, focus_heads=heads)
            values, summary, places = scores.signals, scores.summary(), {}
            later = {one.name for one in probes} - {one.name for one in ready}
            summary["probes"] |= {name: {"score": None, "reason": _LATER} for name in sorted(later)}
            summary["signals"] |= {name: {"values": {}, "refused": _LATER} for name in asked if name not in now}
            final = trace.status != "active" and not (probes or asked)
            if later or len(now) < len(asked):
                with contextlib.suppress(OSError):  # the disk is full
                    note_awaited(self._run_dir)  # there may be no exporter: nothing else of a server may need one
        for name, one in values.items():
            places[name] = {value: plain(array) for value, array in one.by_place.items()}
        acts = [asdict(act) for act in acts_of(self._run_dir, key)]
        return {**summary, "places": places, "final": final} | ({"actions": acts} if acts else {})


def in_list(stored: StoredScores | None) -> dict[str, Any]:
    """What the list of requests says of one: `scores` by probe, and `flagged`: probes whose threshold it reached."""
    probes = {} if stored is None else stored.summary.get("probes", {})
    scored = {name: one["score"] for name, one in probes.items() if one.get("score") is not None}
    return {"scores": scored, "flagged": [name for name in scored if probes[name].get("above")]}
