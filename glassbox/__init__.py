"""glassbox: attention statistics of a running vLLM server, for Prometheus and OpenTelemetry."""

__version__ = "0.1.0"
