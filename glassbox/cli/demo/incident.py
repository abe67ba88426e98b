"""`glassbox demo --incident`: a healthy model, then the same one broken in ways that happen; which alert tells?

Owns the order: serve, save a baseline, see that no alert fires, let clients do wrong, break the server's kernel, then
the model in one way after the other; each time wait for the alert that must fire, in a real Prometheus with the shipped
rules. Only their time constants are shortened, and outputs are checked more often. The faults are `faults.py`, what is
printed in the end `incident_report.py`.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from rich.console import Console
from rich.markup import escape

from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.rules import alerts, build_groups, to_data
from glassbox.cli.demo.broken_kernel import break_kernel, plugin_environment
from glassbox.cli.demo.clients import Clients
from glassbox.cli.demo.demo_model import DemoModelError, demo_model
from glassbox.cli.demo.faults import FAULTS, Fault
from glassbox.cli.demo.incident_report import Outcome, Rows, report
from glassbox.cli.demo.prometheus_server import PROMETHEUS, PrometheusServer
from glassbox.cli.demo.questions import AT_ONCE, ask, questions
from glassbox.cli.demo.run import SERVED_NAME, SERVER_ARGS, DemoError, interruptible, make_progress
from glassbox.cli.demo.traffic import Answer, Request, TrafficError, send_traffic
from glassbox.cli.demo.vllm_server import HOST, ServerError, VllmServer
from glassbox.signals.baseline import Baseline, from_engines, save_baseline
from glassbox.store.merge import merge
from glassbox.store.snapshot import read_snapshots

QUESTION: Final = "What is the capital of France?"
WINDOW_S: Final = 20
# Ten minutes become 20 seconds, a day ten minutes, an hour of history ten windows; every threshold is as shipped. The
# history ends 15 seconds ago, so that a fault isn't in its own yardstick before its alert has fired.
SHORT: Final = RuleSettings(
    window=f"{WINDOW_S}s",
    window_interval="1s",
    history="10m",
    history_offset="15s",
    history_interval="1s",
    min_history=10,
    sampling_window=f"{WINDOW_S}s",
    hold=dict.fromkeys(RuleSettings().hold, "2s"),
)
# How long a fault is looked at: at least, for alerts that must not fire, and at most, for the one that must.
WATCH_S: Final = 15.0
_PATIENCE_S: Final = 90.0
# How long the healthy model is looked at once all rules have something to compare: longer than any `hold`.
_PROOF_S: Final = 6.0
_SETTLE_S: Final = 2.5
_POLL_S: Final = 0.25
_SCRAPE_S: Final = 2.0
_CHECK_S: Final = 5
_REPRODUCED: Final = 'glassbox_canary_rows_total{result="reproduced"} > 0'


@dataclass(frozen=True)
class IncidentOptions:
    """What the command line chose: the faults."""

    faults: tuple[Fault, ...] = FAULTS


def choose(names: Sequence[str]) -> tuple[Fault, ...]:
    """The faults of these names, all if there is none.

    Raises:
        DemoError: one isn't known.
    """
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise DemoError(f"--fault must be one of {', '.join(known)}, got {name}")
    return tuple(known[name] for name in dict.fromkeys(names)) or FAULTS


def run_incident(options: IncidentOptions, console: Console) -> list[Outcome]:
    """Run it and print the table.

    Returns:
        what came of the healthy model (first) and of each fault.

    Raises:
        DemoError: something needed can't be had; what was started is stopped.
    """
    if PROMETHEUS is None:
        raise DemoError("the incident needs the program prometheus on PATH; on Debian: apt-get install prometheus")
    begin = time.monotonic()
    with interruptible(), tempfile.TemporaryDirectory(prefix="glassbox-demo-") as temporary:
        try:
            model = demo_model(report=lambda text: console.print(f"[dim]{text}[/dim]"))
            outcomes = _Incident(Path(temporary), model, options, console).run()
        except KeyboardInterrupt:
            raise DemoError("interrupted") from None
        except (DemoModelError, ServerError, TrafficError, httpx.HTTPError, RuntimeError, OSError) as error:
            raise DemoError(str(error)) from error
    console.print(report(outcomes))
    console.print(f"Took {time.monotonic() - begin:.0f} s.", highlight=False)
    return outcomes


@dataclass
class _Watch:
    """What Prometheus said of one server: seconds from the first request to the first firing, by alert.

    Attributes:
        before: what the server had measured when the first request came.
        rows: measured since, when the alert fired.
    """

    before: Rows | None
    fired: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


class _Incident:
    """One run of the demonstration, in `folder`."""

    def __init__(self, folder: Path, model: Path, options: IncidentOptions, console: Console) -> None:
        self._folder, self._model, self._options, self._console = folder, model, options, console
        self._baseline_path = folder / "baseline.npz"
        self._baseline: Baseline | None = None
        self._attention = _attention_alerts()

    def run(self) -> list[Outcome]:
        rules = self._folder / "rules.yaml"
        rules.write_text(yaml.safe_dump(to_data(build_groups(SHORT), SHORT), sort_keys=False), encoding="utf-8")
        jobs = [fault.name for fault in self._options.faults]
        outcomes = {fault.name: left_out for fault in self._options.faults if (left_out := self._left_out(fault))}
        faults = [fault for fault in self._options.faults if fault.name not in outcomes]
        # Last, for it spoils the server for the others.
        of_healthy = sorted((fault for fault in faults if fault.make is None), key=lambda fault: fault.breaks_kernel)
        kernel = self._folder / "kernel"
        breakable = plugin_environment(kernel) if any(fault.breaks_kernel for fault in faults) else {}
        with PrometheusServer(
            self._folder, (), interval_s=_SCRAPE_S, evaluation_s=1.0, rule_files=[rules], changing_jobs=jobs
        ) as prometheus:
            self._prometheus = prometheus
            with self._serve("healthy", self._model, with_baseline=False, env=breakable) as (server, folder):
                for job in jobs:
                    prometheus.set_targets(job, [self._target(server)])
                healthy = self._healthy(server, folder, jobs)
                # What clients do wrong now is no history for the broken models.
                for job in jobs:
                    prometheus.set_targets(job, [])
                for number, fault in enumerate(of_healthy):
                    if number:
                        time.sleep(WINDOW_S)  # what the one before has done must be out of all windows
                    if fault.breaks_kernel:
                        break_kernel(kernel)
                    outcomes[fault.name] = self._fault(fault, server, folder, healthy)
            for fault in faults:
                if fault.make is not None:
                    outcomes[fault.name] = self._broken(fault, fault.make, healthy)
        return [healthy, *(outcomes[name] for name in jobs)]

    def _left_out(self, fault: Fault) -> Outcome | None:
        """Of a fault that this machine can't have."""
        reason = fault.needs()
        if reason is None:
            return None
        self._console.print(f"[yellow]{fault.name}: left out, {reason}[/yellow]")
        return Outcome(fault.name, fault.what, fault.alert, skipped=reason)

    def _broken(self, fault: Fault, make: Callable[[Path, Path], None], healthy: Outcome) -> Outcome:
        """A broken model, on a server of its own."""
        model = self._folder / "models" / fault.name
        make(self._model, model)
        with self._serve(fault.name, model, with_baseline=True) as (server, folder):
            return self._fault(fault, server, folder, healthy)

    @staticmethod
    def _target(server: VllmServer) -> str:
        return f"{HOST}:{server.port}"

    @contextlib.contextmanager
    def _serve(
        self, name: str, model: Path, *, with_baseline: bool, env: Mapping[str, str | None] | None = None
    ) -> Iterator[tuple[VllmServer, Path]]:
        """A server, with its folder, as long as the block lasts."""
        folder = self._folder / name
        folder.mkdir()
        self._configure(folder, with_baseline=with_baseline)
        with make_progress(self._console) as progress:
            task = progress.add_task(f"{name}: vllm serve", total=None)
            server = VllmServer(
                model,
                args=("--served-model-name", SERVED_NAME, *SERVER_ARGS),
                env={
                    "GLASSBOX_CONFIG": str(folder / "glassbox.yaml"),
                    "GLASSBOX_RUN_DIR": str(folder / "run"),
                    "GLASSBOX_DISABLE": None,
                    "VLLM_PLUGINS": None,
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    **(env or {}),
                },
                log_path=folder / "server.log",
            )
            server.start()
            progress.update(task, total=1, completed=1)
        try:
            yield server, folder
        finally:
            server.stop()

    def _configure(self, folder: Path, *, with_baseline: bool) -> None:
        """Write a server's YAML; a running one reads it again by itself."""
        path = str(self._baseline_path) if with_baseline else None
        config: dict[str, Any] = {
            "sample_rate": 1.0,
            "sampling": {"prefill_rows_per_request": 32, "max_rows_per_step": 1024},
            "canary": {"interval_s": _CHECK_S},
            "baseline": {"path": path, "window_s": WINDOW_S},
            "export": {"interval_s": 1},
        }
        fresh = folder / "glassbox.yaml.new"
        fresh.write_text(yaml.safe_dump(config), encoding="utf-8")
        fresh.replace(folder / "glassbox.yaml")

    def _healthy(self, server: VllmServer, folder: Path, jobs: Sequence[str]) -> Outcome:
        """Save the baseline, then watch the same server with other questions: nothing may fire."""
        answer = self._ask(server, bare=False)
        with make_progress(self._console) as progress:
            self._send(server, progress, "healthy: requests for the baseline", questions(held_out=False))
            engines = merge(read_snapshots(folder / "run"))
            self._baseline = from_engines(engines, "the healthy model of the demo")
            save_baseline(self._baseline_path, self._baseline)
            self._configure(folder, with_baseline=True)
            before = Rows.of(engines)
            begin = time.monotonic()
            task = progress.add_task("healthy: other requests", total=None)
            watch = _Watch(before)
            with Clients(server.url, SERVED_NAME, questions(held_out=True)) as traffic:
                compared: float | None = None
                while traffic.rounds < 1 or compared is None or time.monotonic() - compared < _PROOF_S:
                    self._look(watch, jobs, self._target(server), folder, begin)
                    self._raise(traffic, server)
                    compared = compared or self._compared()
                    if compared is None and time.monotonic() - begin > _PATIENCE_S:
                        raise DemoError("Prometheus has nothing to compare the healthy server with; is it too slow?")
                    time.sleep(_POLL_S)
            progress.update(task, total=1, completed=1)
        measured = self._measured(folder, before)
        return Outcome(
            "healthy",
            "nothing",
            None,
            answer=answer,
            fired=watch.fired,
            rows=watch.rows,
            measured=measured,
            baseline=self._baseline,
        )

    def _fault(self, fault: Fault, server: VllmServer, folder: Path, healthy: Outcome) -> Outcome:
        """Watch a server until the fault's alert and those that come with it fire, and for at least WATCH_S."""
        self._prometheus.set_targets(fault.name, [self._target(server)])
        begin = time.monotonic()
        before = Rows.of(merge(read_snapshots(folder / "run")))
        watch = _Watch(before)
        with (
            make_progress(self._console) as progress,
            Clients(server.url, SERVED_NAME, questions(held_out=True, bare=fault.bare_prompts)) as traffic,
        ):
            task = progress.add_task(f"{fault.name}: requests, waiting for Glassbox{fault.alert}", total=None)
            while (now := time.monotonic() - begin) < _PATIENCE_S:
                seconds = [watch.fired.get(name, _PATIENCE_S) for name in (fault.alert, *fault.also)]
                if now >= max(WATCH_S, max(seconds) + 2 * _SCRAPE_S):
                    break
                self._look(watch, [fault.name], self._target(server), folder, begin)
                self._raise(traffic, server)
                time.sleep(_POLL_S)
            told = f"after {watch.fired[fault.alert]:.0f} s" if fault.alert in watch.fired else "didn't fire"
            progress.update(task, description=f"{fault.name}: Glassbox{fault.alert} {told}", total=1, completed=1)
        answer = self._ask(server, bare=fault.bare_prompts)
        time.sleep(_SETTLE_S)
        measured = self._measured(folder, before)
        return Outcome(
            fault.name,
            fault.what,
            fault.alert,
            answer=answer,
            fired=watch.fired,
            rows=watch.rows,
            measured=measured,
            healthy=healthy,
            baseline=self._baseline,
        )

    @staticmethod
    def _measured(folder: Path, before: Rows | None) -> Rows | None:
        """What a server has measured since `before`."""
        now = Rows.of(merge(read_snapshots(folder / "run")))
        return None if now is None else now.since(before)

    def _look(self, watch: _Watch, jobs: Sequence[str], target: str, folder: Path, begin: float) -> None:
        """Ask Prometheus which alerts about attention fire for a server now."""
        matchers = f'alertstate="firing", job=~"{"|".join(jobs)}", instance="{target}"'
        for labels in self._prometheus.query(f"ALERTS{{{matchers}}}"):
            name = dict(labels)["alertname"].removeprefix("Glassbox")
            if name in self._attention and name not in watch.fired:
                watch.fired[name] = time.monotonic() - begin
                measured = self._measured(folder, watch.before)
                watch.rows[name] = 0 if measured is None else int(measured.rows.sum())

    @staticmethod
    def _raise(traffic: Clients, server: VllmServer) -> None:
        if not server.running:
            raise ServerError(f"the server ended; its log:\n{server.log_tail()}")
        if traffic.error is not None:
            raise traffic.error

    def _send(self, server: VllmServer, progress: Any, text: str, requests: Sequence[Request]) -> None:
        """Each of them once, as many at a time as there are `Clients`."""
        task = progress.add_task(text, total=len(requests))

        def advance(_: Answer) -> None:
            progress.advance(task)

        batches = [requests[i : i + AT_ONCE] for i in range(0, len(requests), AT_ONCE)]
        send_traffic(server.url, SERVED_NAME, batches, advance)
        time.sleep(_SETTLE_S)

    def _ask(self, server: VllmServer, *, bare: bool) -> str:
        """The answer that a user sees."""
        [answer] = send_traffic(server.url, SERVED_NAME, [[ask(QUESTION, bare=bare)]])
        self._console.print(f"  [dim]{QUESTION}[/dim] {escape(' '.join(answer.text.split()))}", highlight=False)
        return answer.text

    def _compared(self) -> float | None:
        """The time, if the healthy server is compared with its baseline, its history and its own cache; else None.

        Without these no rule could fire, and silence would prove nothing.
        """
        sink = f"layer_phase:glassbox_attention_sink_ratio:mean{SHORT.window}"
        series = ("glassbox_attention_drift_psi", f"engine_{sink}", f"model_{sink}:avg{SHORT.history}", _REPRODUCED)
        return time.monotonic() if all(self._prometheus.query(name) for name in series) else None


def _attention_alerts() -> dict[str, str]:
    """Severity of each alert about the model; those about glassbox itself say nothing of it."""
    groups = [group for group in build_groups(SHORT) if group.name != "glassbox-self"]
    return {alert.name: alert.severity for alert in alerts(tuple(groups))}


def passed(outcomes: Sequence[Outcome]) -> bool:
    """True if the healthy model fired nothing, and each fault its alert and no other critical one."""
    severity = _attention_alerts()
    return all(
        outcome.skipped is not None
        or (
            (outcome.alert is None and not outcome.fired)
            or (
                outcome.alert in outcome.fired
                and {name for name in outcome.fired if severity[name] == "critical"} <= {outcome.alert}
            )
        )
        for outcome in outcomes
    )
