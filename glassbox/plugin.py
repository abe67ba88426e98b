"""`register()`: the entry point that vLLM calls in every process it starts.

It reads the YAML, extends vLLM's backend registry, names the observed backends in it, and adds a collector to
prometheus_client's registry. It starts no thread and writes no file; that happens in workers (`worker.py`) and, when
somebody scrapes, in the API server.
"""

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glassbox.config import GlassboxConfig


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True if the kill switch GLASSBOX_DISABLE is set to anything but nothing, 0, false, no or off."""
    return environ.get("GLASSBOX_DISABLE", "").strip().lower() not in {"", "0", "false", "no", "off"}


def register() -> None:
    """Load the plugin into this process; does nothing the second time.

    Raises:
        SystemExit: the YAML is unusable; the message is one line. vLLM stops, nothing is served with a
            configuration that was not meant.
    """
    if is_disabled():
        return
    from glassbox import vllm_compat
    from glassbox.config import ConfigError, find_config, load_config
    from glassbox.logs import get_logger
    from glassbox.step import hook

    if hook().settings is not None:
        return
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

    try:
        _attach(path, config)
    except Exception as error:
        # vLLM dies of an exception from here, and an observer must not be the reason.
        logger.exception("glassbox could not attach: %s. The server runs unobserved.", error)
        unregister()


def _attach(path: Path, config: "GlassboxConfig") -> None:
    from glassbox import attach, registry, rundir
    from glassbox.logs import get_logger
    from glassbox.settings import Settings
    from glassbox.step import hook

    registry.install()
    rundir.run_dir()
    atexit.register(rundir.remove)
    settings = hook().settings = Settings(path, config)
    if not config.enabled:
        get_logger(__name__).info("`enabled: false` in %s: nothing is observed", path)
    attach.attach(settings)


def unregister() -> None:
    """Take back everything `register()` did in this process: patches, overrides, collector, registry API."""
    from glassbox import attach, registry
    from glassbox.step import hook

    settings = hook().settings
    if settings is None:
        return
    hook().remove()
    settings.close()
    attach.detach()
    registry.install().remove()
    hook().settings = None
