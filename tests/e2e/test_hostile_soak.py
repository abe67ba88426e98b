"""Everything at once: many clients, aborts, traces, edits, scrapes, an exporter that is killed or stopped, a full disk.

A real Prometheus watches with glassbox's own rules: what falls silent for longer than an alert waits is told by one.
The short form runs with the other tests; the long one (`make soak`, GLASSBOX_SOAK_S seconds, 3600 unless set) has 200
clients and the rules as they are shipped, and looks at memory, descriptors and files.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from glassbox.cli.dashboards.generated import rules_yaml
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.rules import build_groups
from tests.e2e.small_disk import SmallDisk
from tests.e2e.test_request_load import Load, settle
from tests.e2e.test_soak import growth_mb_per_h, warm_up
from tests.ports import free_port
from tests.prometheus_server import PrometheusServer
from tests.serving import GlassboxServer, require_tool, wait_for

pytestmark = pytest.mark.e2e

LONG_S: Final = float(os.environ.get("GLASSBOX_SOAK_S", "3600"))
SHORT_S: Final = 60.0
INTERVAL_S: Final = 1.0
RUN_DIR: Final = "run"
EXPORTER: Final = "glassbox.processes.exporter"
# A scrape may take as long as the time to the next one, and needs it where clients and trouble share two cores.
SCRAPE_S: Final = 3.0
# Of one process: 1 MB a minute.
MAX_GROWTH_MB_PER_H: Final = 60.0
# Descriptors and files that a process, or the run directory, may have more at the end than after warm-up.
MAX_MORE_DESCRIPTORS: Final = 16
MAX_MORE_FILES: Final = 16
# Requests whose traces are kept; as many may be active beside them (`requests.max_active`), each a file.
KEEP: Final = 64
MAX_ACTIVE: Final = 64
# Exporters are killed all the while: of those that were seen running for so long, memory says something.
EXPORTER_LOOKS: Final = 100
# Prometheus, vLLM and all clients share two cores: a scrape or an evaluation may come so late.
SLACK_S: Final = 45.0
# Those that say that something fell silent; but for those about what the test breaks itself, no other may fire.
TELLING: Final = {"GlassboxSnapshotStale", "GlassboxExporterDown", "GlassboxSinkFailing"}
# A full disk is an error, of which the alert tells for some time; one of the edits is out of range.
BROKEN_HERE: Final = {"GlassboxErrors", "GlassboxConfigReloadFailed"}
# What measuring may cost, and the share above which an alert tells: it is kept, whatever clients ask.
BUDGET: Final = {"overhead_budget": 0.03}
TOLD_ABOVE: Final = 0.05
EDITS: Final[tuple[dict[str, Any], ...]] = (
    {"sample_rate": 0.05},
    {"sample_rate": 0.2, "sampling": {**BUDGET, "layers": {"every": 4}, "max_rows_per_step": 16}},
    {"sample_rate": 7.0},  # out of range: the last good configuration stays
    {"sample_rate": 0.05, "log_level": "warning"},
    {"sample_rate": 0.1, "sampling": {**BUDGET, "prefill_rows_per_request": 64}},
)
LONG_RULES: Final = RuleSettings(overhead_budget=TOLD_ABOVE)
SHORT_RULES: Final = replace(LONG_RULES, stale_s=6.0, hold=dict.fromkeys(RuleSettings().hold, "4s"))


@dataclass(frozen=True)
class Silence:
    """Something that was made silent, in Unix time, and the alerts of which one has to tell it; none if it heals.

    What makes it silent begins `since` then: of a disk that fills up snapshots find room for longest.
    """

    what: str
    begin: float
    end: float
    alerts: frozenset[str]
    since: float


@dataclass
class Life:
    """What one process had, at each look while it ran: seconds since the first look at any, and a number."""

    name: str
    is_exporter: bool = False
    memory_mb: list[tuple[float, float]] = field(default_factory=list)
    descriptors: list[tuple[float, float]] = field(default_factory=list)

    @property
    def growth_mb_per_h(self) -> float:
        """After its own warm-up."""
        return growth_mb_per_h(self.memory_mb)


@dataclass
class Seen:
    """What was there, at each look: seconds and a number.

    Attributes:
        lives: of each process, also one that came later, by its pid and when it began (pids come again).
        traces: files in the run directory that hold traces: a full disk takes them away.
        files: all others there.
    """

    lives: dict[tuple[int, float], Life] = field(default_factory=dict)
    traces: list[tuple[float, float]] = field(default_factory=list)
    files: list[tuple[float, float]] = field(default_factory=list)

    def look(self, processes: Iterable[psutil.Process], run_dir: Path, now_s: float) -> None:
        """Note what there is now. A process that is held shows nothing of what it would do."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    continue
                memory_mb, descriptors = process.memory_info().rss / 1e6, process.num_fds()
                life = self.lives.setdefault(
                    (process.pid, process.create_time()), Life(f"{process.pid} {process.name()}")
                )
                life.is_exporter = EXPORTER in process.cmdline()
                life.memory_mb.append((now_s, memory_mb))
                life.descriptors.append((now_s, descriptors))
        names = [name for _, _, names in os.walk(run_dir) for name in names]
        traces = sum(name.startswith("trace-") for name in names)
        self.traces.append((now_s, traces))
        self.files.append((now_s, len(names) - traces))

    @property
    def lasting(self) -> list[Life]:
        """Of those that lived all along."""
        return [life for life in self.lives.values() if len(life.memory_mb) > 0.95 * len(self.files)]

    @property
    def exporters(self) -> list[Life]:
        """Of those that lived long enough to tell, in their order."""
        return [life for life in self.lives.values() if life.is_exporter and len(life.memory_mb) >= EXPORTER_LOOKS]


class Trouble:
    """Makes things fail in turns, in a thread, until told to stop.

    Attributes:
        silences: what was made silent.
        failures: of the thread itself.
    """

    def __init__(self, server: GlassboxServer, disk: SmallDisk, rules: RuleSettings, *, long: bool) -> None:
        self.silences: list[Silence] = []
        self.failures: list[str] = []
        self._server, self._disk, self._rng = server, disk, random.Random(0)
        self._run_dir = disk.path / RUN_DIR
        # How long a silence lasts before somebody must have been told: the age, and the alert's `for`.
        stale_s = rules.stale_s + rules.stale_intervals * INTERVAL_S
        self._full_s = stale_s + _seconds(rules.hold["SnapshotStale"]) + SLACK_S
        self._held_s = stale_s + _seconds(rules.hold["SinkFailing"]) + SLACK_S
        self._stop = threading.Event()
        kinds = [self._kill, self._fill, self._kill, self._stop_once, self._hold] if long else [self._kill, self._fill]
        self._thread = threading.Thread(target=self._run, args=(kinds,), name="trouble")

    def __enter__(self) -> "Trouble":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, kinds: list[Callable[[], None]]) -> None:
        for kind in itertools.cycle(kinds):
            if self._stop.wait(self._rng.uniform(5.0, 15.0)):
                return
            try:
                kind()
            except Exception as error:  # kept for the test, which names it in its message
                self.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")
                return

    def _exporters(self) -> list[psutil.Process]:
        found = []
        for process in self._server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if EXPORTER in process.cmdline():
                    found.append(process)
        return found

    def _kill(self) -> None:
        """Another one is started within seconds: nobody needs to be told."""
        for process in self._exporters():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _stop_once(self) -> None:
        """The worker that started it replaces it."""
        # One that was killed just now is started again within seconds, or more on a busy machine.
        process = wait_for(self._exporters, lambda found: len(found) == 1, 120.0, "an exporter")[0]
        begin = time.time()
        process.suspend()
        while time.time() - begin < 300 and not self._stop.wait(1.0):
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                self.silences.append(Silence("stopped exporter", begin, time.time(), frozenset(), begin))
                return
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
        if not self._stop.is_set():
            raise TimeoutError("a stopped exporter was not replaced within five minutes")

    def _hold(self) -> None:
        """Every exporter is stopped as soon as it is there."""
        begin = time.time()
        while time.time() - begin < self._held_s and not self._stop.wait(0.2):
            for process in self._exporters():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP)
        self._note("exporters that hang", begin, self._held_s, {"GlassboxExporterDown", "GlassboxSinkFailing"})
        for process in self._exporters():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def _fill(self) -> None:
        """What is freed is filled again, until the oldest traces are gone and no snapshot has found room for long."""
        begin = silent = time.time()
        try:
            while time.time() - silent < self._full_s and not self._stop.wait(0.2):
                if time.time() - begin > 5 * self._full_s:
                    raise TimeoutError(f"snapshots still found room after {time.time() - begin:.0f} s")
                self._disk.fill()
                silent = max(begin, *(path.stat().st_mtime for path in self._run_dir.glob("worker-*.npz")))
        finally:
            self._disk.empty()
        self._note("full disk", silent, self._full_s, {"GlassboxSnapshotStale"}, since=begin)

    def _note(self, what: str, begin: float, whole_s: float, alerts: set[str], *, since: float | None = None) -> None:
        """A silence that was cut short by the end need not be told."""
        told = alerts if time.time() - begin >= whole_s else set()
        since = begin if since is None else since
        self.silences.append(Silence(what, begin, time.time(), frozenset(told), since))


def _seconds(duration: str) -> float:
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def firing(prometheus: PrometheusServer, begin: float, end: float) -> dict[str, list[float]]:
    """Times at which each alert fired."""
    expression = 'ALERTS{alertstate="firing"}'
    answer = prometheus.api("query_range", query=expression, start=f"{begin}", end=f"{end}", step="1")
    found: dict[str, list[float]] = defaultdict(list)
    for series in answer["result"]:
        found[series["metric"]["alertname"]] += [float(when) for when, _ in series["values"]]
    return found


@contextlib.contextmanager
def watched_server(
    start_server: Callable[..., GlassboxServer], folder: Path, rules: RuleSettings, **options: Any
) -> Iterator[tuple[GlassboxServer, SmallDisk, PrometheusServer]]:
    """A server whose run directory and JSONL lie on a small disk, and a Prometheus that scrapes it all the while."""
    require_tool("prometheus", "prometheus")
    rule_file = folder / "rules.yaml"
    rule_file.write_text(rules_yaml(build_groups(rules), rules))
    with SmallDisk(folder / "disk", 64) as disk:
        config = {
            "sample_rate": 0.1,
            "sampling": dict(BUDGET),
            "requests": {"keep": KEEP, "keep_mb": 8, "max_active": MAX_ACTIVE},
            "export": {
                "interval_s": INTERVAL_S,
                "http": {"port": free_port()},
                "jsonl": {"path": str(folder / "windows.jsonl"), "max_mb": 1},
            },
        }
        server = start_server(config=config, env={"GLASSBOX_RUN_DIR": str(disk.path / RUN_DIR)}, **options)
        target = f"127.0.0.1:{server.port}"
        with PrometheusServer(folder, [target], interval_s=SCRAPE_S, rule_files=[rule_file]) as prometheus:
            prometheus.wait_for("glassbox_snapshot_age_seconds")
            prometheus.wait_for("glassbox_exporter_up == 1")
            yield server, disk, prometheus
            server.stop()  # before its disk goes


def storm(
    server: GlassboxServer,
    disk: SmallDisk,
    trouble: Trouble,
    clients: int,
    seconds: float,
    until: Callable[[], bool] = lambda: True,
) -> tuple[Load, Seen]:
    """Clients, edits and trouble for so long, and on a slow machine for longer, until all has happened."""
    load, seen, edits = Load(server.url, clients=clients), Seen(), itertools.cycle(EDITS)
    begin, edited = time.monotonic(), 0.0

    def watch(now_s: float) -> None:
        nonlocal edited
        if now_s - edited > 5.0:
            server.edit_config(**next(edits))
            edited = now_s
        seen.look(server.processes(), disk.path / RUN_DIR, time.monotonic() - begin)

    with trouble:
        asyncio.run(load.run(seconds, watch, finish=True))
        while not until() and not trouble.failures and time.monotonic() - begin < 4 * seconds:
            asyncio.run(load.run(10.0, watch, finish=True))
    return load, seen


def assert_told(prometheus: PrometheusServer, trouble: Trouble, begin: float) -> None:
    """Each long silence by one of its alerts while it lasted, and no alert without one."""
    fired = firing(prometheus, begin, time.time())
    for silence in trouble.silences:
        print(f"{silence.what}: {silence.end - silence.begin:.0f} s, {sorted(silence.alerts) or 'healed'}")
        told = [
            when for alert in silence.alerts for when in fired[alert] if silence.begin < when < silence.end + SLACK_S
        ]
        assert told or not silence.alerts, (
            f"{silence.what}: nobody was told; fired: { {k: len(v) for k, v in fired.items()} }"
        )
        if told:
            print(f"  told after {min(told) - silence.begin:.0f} s")
    for alert, times in fired.items():
        if alert in BROKEN_HERE:
            continue
        assert alert in TELLING, f"{alert} fired {len(times)} times"
        alone = [when for when in times if not any(s.since < when < s.end + 2 * SLACK_S for s in trouble.silences)]
        assert not alone, f"{alert} fired without a reason"


class TestShort:
    @pytest.mark.timeout(1500)
    def test_everything_fails_once(self, start_server: Callable[..., GlassboxServer], tmp_path: Path) -> None:
        """A minute: all requests are answered, an exporter that is killed comes again, a full disk is told."""
        with watched_server(start_server, tmp_path, SHORT_RULES) as (server, disk, prometheus):
            trouble, begin = Trouble(server, disk, SHORT_RULES, long=False), time.time()

            def was_full() -> bool:
                return any(silence.what == "full disk" and silence.alerts for silence in trouble.silences)

            load, _ = storm(server, disk, trouble, 20, SHORT_S + trouble._full_s, was_full)
            assert [] == load.failures + trouble.failures
            assert was_full()
            wait_for(lambda: server.metric("glassbox_exporter_up"), lambda up: up == 1.0, 60.0, "an exporter")
            wait_for(lambda: server.metric("glassbox_snapshot_age_seconds"), lambda age: age < 10, 60.0, "a snapshot")
            assert_told(prometheus, trouble, begin)
            assert (server.metric("glassbox_exporter_restarts_total") or 0.0) >= 1


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(LONG_S + 1800)
    def test_an_hour_of_it(self, start_server: Callable[..., GlassboxServer], tmp_path: Path) -> None:
        """200 clients: no failed request; every silence told; memory, descriptors and files flat after warm-up."""
        rules, args = LONG_RULES, ("--max-num-batched-tokens", "256")
        with watched_server(start_server, tmp_path, rules, args=args) as (server, disk, prometheus):
            warm_up(server)
            trouble, begin = Trouble(server, disk, rules, long=True), time.time()
            load, seen = storm(server, disk, trouble, 200, LONG_S)
            print(f"{dict(load.answered)} requests, {load.tokens / LONG_S:.1f} tokens per second")
            assert [] == load.failures + trouble.failures
            settle(server)
            tell_growth(seen)
            assert_told(prometheus, trouble, begin)
        assert_flat(seen)


def tell_growth(seen: Seen) -> None:
    """Say what each process that lived long enough had, and the run directory."""
    for life in seen.lasting + seen.exporters:
        (begin, first), (end, last) = life.memory_mb[0], life.memory_mb[-1]
        print(
            f"{life.name}{', exporter' * life.is_exporter}, {begin:.0f} to {end:.0f} s: {first:.0f} -> {last:.0f} MB, "
            f"{life.growth_mb_per_h:+.1f} MB/h; {_lows(life.descriptors)} descriptors"
        )
    print(f"files: {_lows(seen.files)}, at most {max(n for _, n in seen.traces):.0f} traces")


def assert_flat(seen: Seen) -> None:
    """Memory by its slope, descriptors and files by their lows, first and last.

    No exporter lives as long as the others: the slope is the median of theirs, and nothing that one leaves to the next
    may make that one larger.
    """
    assert len(seen.lasting) >= 2
    growth = {life.name: life.growth_mb_per_h for life in seen.lasting}
    assert {name: slope for name, slope in growth.items() if slope > MAX_GROWTH_MB_PER_H} == {}
    assert len(seen.exporters) >= 2
    assert statistics.median(life.growth_mb_per_h for life in seen.exporters) <= MAX_GROWTH_MB_PER_H
    (begin, first), (end, last) = (_typical(life.memory_mb) for life in (seen.exporters[0], seen.exporters[-1]))
    assert (last - first) / (end - begin) * 3600 <= MAX_GROWTH_MB_PER_H
    for life in seen.lasting + seen.exporters:
        first, last = _lows(life.descriptors)
        assert last <= first + MAX_MORE_DESCRIPTORS, life.name
    first, last = _lows(seen.files)
    assert last <= first + MAX_MORE_FILES
    assert max(n for _, n in seen.traces) <= KEEP + MAX_ACTIVE


def _typical(points: list[tuple[float, float]]) -> tuple[float, float]:
    """When an exporter began, and what it had at the age at which all of them still lived."""
    return points[0][0], statistics.median(n for _, n in points[EXPORTER_LOOKS // 2 : EXPORTER_LOOKS])


def _lows(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The lowest of the third tenth and of the last: requests come and go, what leaks stays."""
    tenth = max(1, len(points) // 10)
    return min(n for _, n in points[2 * tenth : 3 * tenth] or points), min(n for _, n in points[-tenth:])
