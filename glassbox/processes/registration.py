"""What glassbox does to a process of vLLM when it is loaded there, and how it takes that back.

It reads the YAML, extends vLLM's backend registry, names the observed backends in it, wraps the intake, and adds a
collector to prometheus_client's registry. It starts no thread and writes no file but the one that says whose a run
directory is that an operator named (`store/ownership.py`); that happens in workers (`processes/worker/worker.py`) and,
when somebody scrapes, in the API server.
"""

import logging
import os
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from glassbox.adapter.seat import SEAT
from glassbox.core.start_parts import StartParts

if TYPE_CHECKING:
    from glassbox.adapter.seat import Hook
    from glassbox.config.load import GlassboxConfig
    from glassbox.config.settings import Settings
    from glassbox.processes.api_server.shown_metrics import ShownMetrics


class Registration:
    """What was changed in this process.

    Attributes:
        shown: what this process shows of its server; None until there is something.
    """

    def __init__(self) -> None:
        self.shown: ShownMetrics | None = None
        self._undo = ExitStack()  # first in, last out

    def close(self) -> None:
        """Take it back."""
        self._undo.close()

    def attach(self, path: Path, config: "GlassboxConfig") -> None:
        """Change this process as the configuration at `path` says."""
        from glassbox.adapter import backend_registry, metrics_route, overrides, publish, ray_environment, worker_start
        from glassbox.config.follow import ConfigFile
        from glassbox.config.load import CONFIG_ENV, packaged_config, restart_needed
        from glassbox.config.settings import Settings
        from glassbox.core.logs import get_logger, set_level
        from glassbox.measure.ahead import compile_ahead
        from glassbox.processes.api_server import intake, shown_metrics
        from glassbox.store import multiprocess_files, ownership, rundir

        undo = self._undo
        undo.callback(backend_registry.install().remove)
        if CONFIG_ENV not in os.environ and path != packaged_config():
            # Found in the working directory, which is another one in Ray's workers.
            os.environ[CONFIG_ENV] = str(path)
            undo.callback(os.environ.pop, CONFIG_ENV, None)
        undo.callback(ray_environment.carry())
        if rundir.RUN_DIR_ENV not in os.environ:
            undo.callback(os.environ.pop, rundir.RUN_DIR_ENV, None)
        if config.enabled:  # else nothing is ever written there
            undo.callback(ownership.settle())
        undo.callback(_remove_files)
        multiprocess_files.purge_dead(multiprocess_files.directory())
        # After those of vLLM's that are made later: an executor ends its workers in one, and they still write there.
        undo.callback(weakref.finalize(self, _remove_files).detach)
        undo.callback(overrides.free_custom)
        settings = Settings(path, config, publish=publish.publish, read=publish.reader(), also=_require_probes)
        # Taken back last to first: the file is followed no more, then the worker ends, then vLLM's own are put back.
        attached = undo.enter_context(ExitStack())
        SEAT.take(settings, lambda: _make_hook(settings))
        undo.callback(SEAT.leave)
        undo.callback(settings.close)
        attached.callback(overrides.override(config))
        if config.enabled:
            attached.callback(worker_start.install(compile_ahead))

        def on_change(edited: "GlassboxConfig") -> None:
            set_level(edited.log_level)
            if not config.enabled:  # then there is no worker of glassbox that would say it
                for message in restart_needed(config, edited):
                    get_logger(__name__).warning("%s: %s", path.name, message)

        live = ConfigFile(path, config, on_change, also=_require_probes)
        self.shown = shown_metrics.ShownMetrics(live, rundir.run_dir())
        attached.callback(shown_metrics.install(self.shown))
        if config.enabled:
            attached.callback(metrics_route.install(self.shown.show_at))
            attached.callback(intake.install(live, rundir.run_dir(), _note_api_server, self.shown.limit_to))


def _remove_files() -> None:
    """At the end of a server's process: what no other one has to remove."""
    from glassbox.store import multiprocess_files, rundir

    rundir.remove()
    multiprocess_files.purge_dead(multiprocess_files.directory())


def _note_api_server() -> None:
    """Tell this node's workers that this process shows what they measure."""
    from glassbox.store import api_server_note, rundir

    try:
        api_server_note.write_note(rundir.create())
    except OSError as error:
        logging.getLogger("glassbox").warning("glassbox's run directory can't be written to: %s", error)


def _require_probes(path: Path, config: "GlassboxConfig", before: "GlassboxConfig | None") -> None:
    if config.probes or config.requests.focus_heads:
        # Only then: most servers have none, and need not import what reads them.
        from glassbox.signals.probe_files import require_probes

        require_probes(path, config, before)


def _make_hook(settings: "Settings") -> "Hook":
    # Only in workers: torch's half of glassbox is nothing that an API server needs.
    from glassbox.processes.worker.hook import StepHook

    return StepHook(settings)


def register(start: StartParts | None = None) -> None:
    """Attach glassbox to this process, wholly or not at all; see `plugin.register`.

    Args:
        start: is told what is done from now on; by default none is known of what was done before.

    Raises:
        SystemExit: the YAML is unusable.
        Exception: of whatever kind, if it can't be attached; what was changed by then has been taken back.
    """
    if SEAT.registration is not None:
        return
    SEAT.start = StartParts() if start is None else start
    try:
        _register()
    except Exception:
        unregister()
        raise


def _register() -> None:
    from glassbox.adapter import backend_registry, internals, release
    from glassbox.adapter.internals import Feature
    from glassbox.config.load import ConfigError, find_config
    from glassbox.config.usable import load_usable
    from glassbox.core.logs import get_logger

    logger = get_logger(__name__)
    found = release.installed()
    # Before the file: a server that can't be observed has no use for it, and must not stop for a mistake in it.
    if (reason := found.unobserved_reason()) is not None:
        logger.error("%s", reason)
        return
    try:
        path = find_config()
        config = load_usable(path, also=_require_probes)
    except ConfigError as error:
        raise SystemExit(f"glassbox: {error}") from None
    if (reason := found.unobserved_reason(config.compat)) is not None:
        logger.error("%s", reason)
        return
    backend_registry.load()
    if internals.lacks(Feature.ATTACHING):
        logger.error("%s", internals.line(Feature.ATTACHING, found.version))
        return
    if not config.enabled:
        logger.info("`enabled: false` in %s: nothing is observed", path)
    SEAT.registration = registration = Registration()
    registration.attach(path, config)


def registered() -> Registration | None:
    """What was changed in this process; None if nothing was."""
    found = SEAT.registration
    assert found is None or isinstance(found, Registration)
    return found


def unregister() -> None:
    """Take back everything `register()` did in this process: patches, overrides, collector, registry API, variable."""
    registration, SEAT.registration = SEAT.registration, None
    if registration is None:
        return
    try:
        registration.close()
    except Exception:
        logging.getLogger("glassbox").exception("glassbox could not take back all of its changes")
