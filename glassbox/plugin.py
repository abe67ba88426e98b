"""`register()`: the entry point that vLLM calls in every process it starts.

It reads the YAML, extends vLLM's backend registry, names the observed backends in it, and adds a collector to
prometheus_client's registry. It starts no thread and writes no file; that happens in workers (`worker.py`) and, when
somebody scrapes, in the API server.
"""

import atexit
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassbox.config import GlassboxConfig

# What `register()` changed in this process and how to take it back; None if nothing.
_undo: ExitStack | None = None


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True if the kill switch GLASSBOX_DISABLE is set to anything but nothing, 0, false, no or off."""
    return environ.get("GLASSBOX_DISABLE", "").strip().lower() not in {"", "0", "false", "no", "off"}


def register() -> None:
    """Load the plugin into this process; does nothing the second time.

    Raises:
        SystemExit: the YAML is unusable; the message is one line. vLLM stops, nothing is served with a
            configuration that was not meant.
    """
    if is_disabled() or _undo is not None:
        return
    try:
        _register()
    except Exception:
        # vLLM dies of an exception from here, and an observer must not be the reason.
        logging.getLogger("glassbox").exception("glassbox could not attach; the server runs unobserved")
        unregister()


def _register() -> None:
    from glassbox import vllm_compat
    from glassbox.config import ConfigError, find_config, load_config
    from glassbox.logs import get_logger

    logger = get_logger(__name__)
    reason = vllm_compat.unsupported_reason()
    if reason is not None:
        logger.error("%s", reason)
        return
    path = find_config().absolute()
    try:
        config = load_config(path)
    except ConfigError as error:
        raise SystemExit(f"glassbox: {error}") from None
    if not config.enabled:
        logger.info("`enabled: false` in %s: nothing is observed", path)
    _attach(path, config)


def _attach(path: Path, config: "GlassboxConfig") -> None:
    global _undo  # noqa: PLW0603 (vLLM gives a plugin no object to hang this on)
    from glassbox import attach, registry, rundir
    from glassbox.settings import Settings
    from glassbox.step import hook

    undo = _undo = ExitStack()  # first in, last out
    undo.callback(registry.install().remove)
    if rundir.RUN_DIR_ENV not in os.environ:
        undo.callback(os.environ.pop, rundir.RUN_DIR_ENV, None)
    rundir.run_dir()
    undo.callback(rundir.remove)
    atexit.register(rundir.remove)
    undo.callback(atexit.unregister, rundir.remove)
    undo.callback(attach.detach)
    settings = hook().settings = Settings(path, config)
    undo.callback(hook().forget)
    undo.callback(settings.close)
    attach.attach(settings)


def unregister() -> None:
    """Take back everything `register()` did in this process: patches, overrides, collector, registry API, variable."""
    global _undo
    undo, _undo = _undo, None
    if undo is None:
        return
    try:
        undo.close()
    except Exception:
        logging.getLogger("glassbox").exception("glassbox could not take back all of its changes")
