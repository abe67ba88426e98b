"""glassbox: attention statistics of a running vLLM server, for Prometheus and OpenTelemetry."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glassbox.processes.extraction import Extractor
    from glassbox.processes.offline import Capture, capture

__all__ = ["Capture", "Extractor", "__version__", "capture"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: glassbox is loaded into every process of a server.
    if name in {"capture", "Capture"}:
        from glassbox.processes import offline

        return getattr(offline, name)
    if name == "Extractor":
        from glassbox.processes.extraction import Extractor

        return Extractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
