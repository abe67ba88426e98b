"""`register()`: the entry point that vLLM calls in every process it starts; see `processes/registration.py`."""

import logging

from glassbox.adapter import ray_environment
from glassbox.core.kill_switch import is_disabled


def register() -> None:
    """Load the plugin into this process; does nothing the second time, nor with GLASSBOX_DISABLE.

    Raises:
        SystemExit: the YAML is unusable; the message is one line. vLLM stops, nothing is served with a
            configuration that was not meant.
    """
    if is_disabled():
        ray_environment.carry()  # else Ray's workers would not know that it is off
        return
    try:
        from glassbox.processes import registration

        registration.register()
    except Exception:
        # vLLM dies of an exception from here, and an observer must not be the reason: also not a package that it needs
        # and that can't be imported.
        logging.getLogger("glassbox").exception("glassbox could not attach; the server runs unobserved")
