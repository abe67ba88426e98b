"""`register()`: the entry point that vLLM calls in every process it starts; see `processes/registration.py`."""

from glassbox.core.kill_switch import is_disabled


def register() -> None:
    """Load the plugin into this process; does nothing the second time, nor with GLASSBOX_DISABLE.

    Raises:
        SystemExit: the YAML is unusable; the message is one line. vLLM stops, nothing is served with a
            configuration that was not meant.
    """
    if is_disabled():
        return
    from glassbox.processes import registration

    registration.register()
