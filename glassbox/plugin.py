"""`register()`: the entry point that vLLM calls in every process it starts; see `processes/registration.py`."""

import logging
import os

from glassbox.adapter import ray_environment
from glassbox.core.kill_switch import is_disabled


def register() -> None:
    """Load the plugin into this process; does nothing the second time.

    With GLASSBOX_DISABLE it only removes what a server with glassbox, which was killed, has left for scrapes.

    Raises:
        SystemExit: the YAML is unusable; the message is one line. vLLM stops, nothing is served with a
            configuration that was not meant.
    """
    try:
        if is_disabled():
            _stay_out()
            return
        from glassbox.core.start_parts import StartParts

        start = StartParts()
        with start.timed("register"):
            from glassbox.processes import registration

            registration.register(start)
    except Exception:
        # vLLM dies of an exception from here, and an observer must not be the reason: also not a package that it needs
        # and that can't be imported.
        logging.getLogger("glassbox").exception("glassbox could not attach; the server runs unobserved")


def _stay_out() -> None:
    ray_environment.carry()  # else Ray's workers would not know that it is off
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from glassbox.store import multiprocess_files

        multiprocess_files.purge_dead(multiprocess_files.directory())
