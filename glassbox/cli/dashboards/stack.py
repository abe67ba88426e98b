"""The stack around a server: compose file, Kubernetes manifests, configurations of Prometheus, Grafana, the collector.

Owns the values: image versions, ports, intervals and names stand in `Stack` and nowhere else. The files' texts are in
`stack_templates.py`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from string import Template
from typing import Final

from glassbox import __version__
from glassbox.cli.dashboards import stack_templates as texts
from glassbox.cli.dashboards.rule_model import RuleSettings


@dataclass(frozen=True)
class Stack:
    """Every value that more than one file of the stack needs, or that is likely to be changed.

    Attributes:
        model: what `vllm serve` serves; small, so that the stack starts anywhere.
        max_model_len: tokens of a sequence.
        image: of vLLM with glassbox, built from the Dockerfile.
        vllm_port, prometheus_port, grafana_port: of the services; the compose file opens them on loopback only.
        otlp_grpc_port, otlp_http_port, collector_port, collector_metrics_port: of the OpenTelemetry collector: OTLP,
            the metrics it received, its own metrics.
        glassbox_port: glassbox's own: its /metrics with exemplars, the live page, the pages of traced requests.
        traces_port: of the interface of Jaeger, which keeps the traces (in memory).
        uid: user of the image (see the Dockerfile).
        config_dir: where glassbox.yaml lies in the container. A directory is mounted, not the file: editors and
            Kubernetes replace the file, and a mounted file would stay the old one.
        sample_rate, overhead_budget, export_interval_s: of glassbox.
        scrape_interval_s: of Prometheus, and what Grafana derives $__rate_interval from.
        retention: of Prometheus; the rules look back one day.
        job: the label of the scraped servers, whichever of their ports is scraped.
        namespace: in Kubernetes.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    max_model_len: int = 4096
    image: str = f"vllm-glassbox:{__version__}"
    prometheus_image: str = "prom/prometheus:v3.5.0"
    grafana_image: str = "grafana/grafana:11.6.0"
    collector_image: str = "otel/opentelemetry-collector-contrib:0.120.0"
    jaeger_image: str = "jaegertracing/jaeger:2.13.0"
    vllm_port: int = 8000
    glassbox_port: int = 9464
    prometheus_port: int = 9090
    grafana_port: int = 3000
    otlp_grpc_port: int = 4317
    otlp_http_port: int = 4318
    collector_port: int = 8889
    collector_metrics_port: int = 8888
    traces_port: int = 16686
    uid: int = 10001
    home: str = "/home/vllm"
    config_dir: str = "/etc/glassbox"
    dashboards_dir: str = "/var/lib/grafana/dashboards"
    datasource_uid: str = "glassbox-prometheus"
    traces_uid: str = "glassbox-traces"
    sample_rate: float = 0.01
    overhead_budget: float = RuleSettings().overhead_budget
    export_interval_s: int = 5
    scrape_interval_s: int = 15
    retention: str = "15d"
    job: str = "vllm"
    namespace: str = "glassbox"


class _Text(Template):
    """Placeholders are `%{name}`: the compose file has its own `${NAME}`."""

    delimiter = "%"


_FILES: Final[dict[str, str]] = {
    "dashboards/kustomization.yaml": texts.DASHBOARDS_KUSTOMIZATION,
    "dashboards/provisioning/dashboards/glassbox.yaml": texts.GRAFANA_DASHBOARDS,
    "dashboards/provisioning/datasources/prometheus.yaml": texts.GRAFANA_DATASOURCES,
    "deploy/compose.yaml": texts.COMPOSE,
    "deploy/glassbox/glassbox.yaml": texts.GLASSBOX,
    "deploy/otel-collector/config.yaml": texts.COLLECTOR,
    "deploy/prometheus/prometheus.yaml": texts.PROMETHEUS,
    "deploy/kubernetes/deployment.yaml": texts.DEPLOYMENT,
    "deploy/kubernetes/glassbox.yaml": texts.GLASSBOX,
    "deploy/kubernetes/kustomization.yaml": texts.KUSTOMIZATION,
    "deploy/kubernetes/namespace.yaml": texts.NAMESPACE,
    "deploy/kubernetes/podmonitor.yaml": texts.POD_MONITOR,
    "deploy/kubernetes/service.yaml": texts.SERVICE,
    "deploy/leaderworkerset/kustomization.yaml": texts.LEADER_WORKER_SET_KUSTOMIZATION,
    "deploy/leaderworkerset/leaderworkerset.yaml": texts.LEADER_WORKER_SET,
}
# Kubernetes: no collector is deployed there.
_WITHOUT_COLLECTOR: Final = frozenset({"deploy/kubernetes/glassbox.yaml"})


def stack_files(header: Callable[[str], str], stack: Stack | None = None) -> dict[str, str]:
    """Path in the repository and text of every file of the stack, dashboards and rules not included.

    Args:
        header: the comment at the top of a file, given its comment sign.
        stack: the values.
    """
    values = asdict(stack or Stack())
    files = {}
    for path, text in _FILES.items():
        otel = "false" if path in _WITHOUT_COLLECTOR else "true"
        files[path] = header("#") + _Text(text).substitute(values, otel_enabled=otel)
    return files
