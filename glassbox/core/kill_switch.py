"""GLASSBOX_DISABLE: with it set, glassbox does nothing in any process."""

import os
from collections.abc import Mapping


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True if the kill switch GLASSBOX_DISABLE is set to anything but nothing, 0, false, no or off."""
    return environ.get("GLASSBOX_DISABLE", "").strip().lower() not in {"", "0", "false", "no", "off"}
