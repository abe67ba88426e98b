"""A real Prometheus for tests: the demo's, and where its programs are."""

import shutil

from glassbox.cli.demo.prometheus_server import PROMETHEUS, PrometheusServer

__all__ = ["PROMETHEUS", "PROMTOOL", "PrometheusServer"]

PROMTOOL = shutil.which("promtool")
