"""A real Prometheus for tests: the demo's, and where its programs are."""

import shutil

from glassbox.demo.prometheus import PROMETHEUS, PrometheusServer
from glassbox.demo.server import free_port

__all__ = ["PROMETHEUS", "PROMTOOL", "PrometheusServer", "free_port"]

PROMTOOL = shutil.which("promtool")
