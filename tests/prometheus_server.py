"""A real Prometheus for tests: the demo's, and where its programs are."""

import shutil

from glassbox.cli.demo.prometheus_server import PROMETHEUS, PrometheusServer
from glassbox.cli.demo.vllm_server import free_port

__all__ = ["PROMETHEUS", "PROMTOOL", "PrometheusServer", "free_port"]

PROMTOOL = shutil.which("promtool")
