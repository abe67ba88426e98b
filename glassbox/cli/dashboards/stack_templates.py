"""Texts of the stack's files, with `%{name}` where a value of `stack.Stack` stands. Owns wording and structure only."""

from textwrap import indent
from typing import Final

COMPOSE: Final = """\
# vLLM with glassbox, Prometheus with the rules, Grafana with the dashboards, an OpenTelemetry collector, and Jaeger for
# the traces. Needs one GPU.
#   docker compose -f deploy/compose.yaml up --build
#   http://127.0.0.1:%{grafana_port}  (MODEL, HF_TOKEN and GRAFANA_PASSWORD may be set in deploy/.env)
#   http://127.0.0.1:%{glassbox_port}/glassbox/  the live page
name: glassbox

services:
  vllm:
    build:
      context: ..
      dockerfile: Dockerfile
    image: %{image}
    command:
      - ${MODEL:-%{model}}
      - --port=%{vllm_port}
      - --max-model-len=%{max_model_len}
      # vLLM's own span of a request, above glassbox's.
      - --otlp-traces-endpoint=http://otel-collector:%{otlp_grpc_port}
    environment:
      GLASSBOX_CONFIG: %{config_dir}/glassbox.yaml
      HF_TOKEN: ${HF_TOKEN:-}
    volumes:
      # The directory, not the file: an editor replaces the file, and a mounted file would stay the old one.
      - ./glassbox:%{config_dir}:ro
      - model-cache:%{home}/.cache
    ports:
      - "127.0.0.1:%{vllm_port}:%{vllm_port}"
      - "127.0.0.1:%{glassbox_port}:%{glassbox_port}"
    ipc: host
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
    healthcheck:
      test:
        - CMD
        - python3
        - -c
        - import urllib.request as r; r.urlopen('http://127.0.0.1:%{vllm_port}/health', timeout=5)
      interval: 10s
      timeout: 6s
      retries: 3
      start_period: 10m
    restart: unless-stopped

  prometheus:
    image: %{prometheus_image}
    command:
      - --config.file=/etc/prometheus/prometheus.yaml
      - --storage.tsdb.path=/prometheus
      - --storage.tsdb.retention.time=%{retention}
      - --web.listen-address=:%{prometheus_port}
      - --enable-feature=exemplar-storage   # the dots that lead from a panel to a traced request
    volumes:
      - ./prometheus:/etc/prometheus:ro
      - prometheus-data:/prometheus
    ports:
      - "127.0.0.1:%{prometheus_port}:%{prometheus_port}"
    restart: unless-stopped

  grafana:
    image: %{grafana_image}
    environment:
      GF_SERVER_HTTP_PORT: "%{grafana_port}"
      GF_SECURITY_ADMIN_PASSWORD: ${GRAFANA_PASSWORD:-admin}
      # Whoever reaches the port (this machine only, see below) may look, not edit.
      GF_AUTH_ANONYMOUS_ENABLED: "true"
      GF_AUTH_ANONYMOUS_ORG_ROLE: Viewer
      GF_ANALYTICS_REPORTING_ENABLED: "false"
      GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH: %{dashboards_dir}/glassbox-overview.json
    volumes:
      - ../dashboards/provisioning:/etc/grafana/provisioning:ro
      - ../dashboards:%{dashboards_dir}:ro
      - grafana-data:/var/lib/grafana
    ports:
      - "127.0.0.1:%{grafana_port}:%{grafana_port}"
    depends_on:
      - prometheus
    restart: unless-stopped

  otel-collector:
    image: %{collector_image}
    command: ["--config=/etc/otel-collector/config.yaml"]
    volumes:
      - ./otel-collector:/etc/otel-collector:ro
    restart: unless-stopped

  jaeger:
    image: %{jaeger_image}
    # Its receiver listens on localhost by default in some versions.
    command: ["--set=receivers.otlp.protocols.grpc.endpoint=0.0.0.0:%{otlp_grpc_port}"]
    ports:
      - "127.0.0.1:%{traces_port}:%{traces_port}"
    restart: unless-stopped

volumes:
  model-cache:
  prometheus-data:
  grafana-data:
"""

GLASSBOX: Final = """\
# What is measured, and where it goes. Save it while the server runs: it takes effect within two seconds (in Kubernetes
# as soon as the kubelet has brought the new ConfigMap, about a minute). All keys: configs/glassbox.yaml.
sample_rate: %{sample_rate}

sampling:
  overhead_budget: %{overhead_budget}   # the sample rate falls by itself when measuring would cost more

export:
  interval_s: %{export_interval_s}
  prometheus:
    detail: layer          # head: a series for each head, for the dashboard Heads
  http:                    # its own port: live page, pages of traced requests, /metrics with exemplars
    port: %{glassbox_port}
    host: 0.0.0.0          # Prometheus comes from another container; without, 127.0.0.1
    token_file: null       # a mounted secret: whoever reaches the port has to know it; Prometheus by `authorization`
  otel:
    enabled: %{otel_enabled}
    endpoint: http://otel-collector:%{otlp_grpc_port}
    protocol: grpc
    metrics: false         # Prometheus scrapes them; by OTLP as well every number would be there twice
    traces: true

requests:
  opt_in: true             # a client may ask for a trace of its own request
  trace_rate: 0            # share of all others that are traced; to find out who it was, 0.001 or so
  include_text: false      # prompts are private; true, with http.token_file: the pages show the tokens' texts
"""

PROMETHEUS: Final = """\
global:
  scrape_interval: %{scrape_interval_s}s
  scrape_timeout: 10s
  evaluation_interval: 30s

rule_files:
  - rules.yaml

# No Alertmanager is part of the stack; name yours here to be told of alerts:
# alerting: {alertmanagers: [{static_configs: [{targets: ["alertmanager:9093"]}]}]}

scrape_configs:
  - job_name: %{job}
    static_configs:
      - targets: ["vllm:%{vllm_port}"]
    # vLLM's port has glassbox's metrics, too, but no exemplars: they come from glassbox's own port, and only once.
    metric_relabel_configs:
      - source_labels: [__name__]
        regex: glassbox_.*
        action: drop
  - job_name: glassbox
    static_configs:
      - targets: ["vllm:%{glassbox_port}"]
        labels: {job: %{job}}
  - job_name: prometheus
    static_configs:
      - targets: ["localhost:%{prometheus_port}"]
  # The collector itself. What it received (port %{collector_port}) is not scraped: it would be there twice.
  - job_name: otel-collector
    static_configs:
      - targets: ["otel-collector:%{collector_metrics_port}"]
"""

COLLECTOR: Final = """\
# Takes OTLP from vLLM and glassbox. Traces go to Jaeger; for another backend name it instead.
receivers:
  otlp:
    protocols:
      grpc:
        endpoint: 0.0.0.0:%{otlp_grpc_port}
      http:
        endpoint: 0.0.0.0:%{otlp_http_port}

processors:
  memory_limiter:
    check_interval: 1s
    limit_mib: 256
  batch: {}

exporters:
  otlp:
    endpoint: jaeger:%{otlp_grpc_port}
    tls:
      insecure: true
  prometheus:
    endpoint: 0.0.0.0:%{collector_port}
    resource_to_telemetry_conversion:
      enabled: true

service:
  telemetry:
    metrics:
      readers:
        - pull:
            exporter:
              prometheus:
                host: 0.0.0.0
                port: %{collector_metrics_port}
  pipelines:
    traces:
      receivers: [otlp]
      processors: [memory_limiter, batch]
      exporters: [otlp]
    metrics:
      receivers: [otlp]
      processors: [memory_limiter, batch]
      exporters: [prometheus]
"""

GRAFANA_DATASOURCES: Final = """\
apiVersion: 1
datasources:
  - name: Prometheus
    uid: %{datasource_uid}
    type: prometheus
    access: proxy
    url: http://prometheus:%{prometheus_port}
    isDefault: true
    jsonData:
      httpMethod: POST
      timeInterval: %{scrape_interval_s}s   # the scrape interval: $__rate_interval follows from it
      # From a dot on a panel to the request's page and to its trace. `$$`: Grafana replaces variables in this file.
      exemplarTraceIdDestinations:
        - name: request_id
          url: http://127.0.0.1:%{glassbox_port}/glassbox/v1/requests/$${__value.raw}?format=html
          urlDisplayLabel: Attention of this request
        - name: trace_id
          datasourceUid: %{traces_uid}
          urlDisplayLabel: Trace of the client
  - name: Traces
    uid: %{traces_uid}
    type: jaeger
    access: proxy
    url: http://jaeger:%{traces_port}
"""

GRAFANA_DASHBOARDS: Final = """\
apiVersion: 1
providers:
  - name: glassbox
    folder: glassbox
    type: file
    allowUiUpdates: false
    options:
      path: %{dashboards_dir}
"""

DASHBOARDS_KUSTOMIZATION: Final = """\
# The dashboards as ConfigMaps, found by Grafana's sidecar by their label.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
generatorOptions:
  disableNameSuffixHash: true
  labels:
    grafana_dashboard: "1"
  annotations:
    grafana_folder: glassbox
configMapGenerator:
  - name: glassbox-overview
    files: [glassbox-overview.json]
  - name: glassbox-fleet
    files: [glassbox-fleet.json]
  - name: glassbox-heads
    files: [glassbox-heads.json]
  - name: glassbox-requests
    files: [glassbox-requests.json]
"""

KUSTOMIZATION: Final = """\
# kubectl apply --server-side -k deploy/kubernetes
# Needs the Prometheus operator (PodMonitor, PrometheusRule) and the image in a registry that the cluster reaches:
#   kustomize edit set image vllm-glassbox=REGISTRY/vllm-glassbox:TAG
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: %{namespace}
resources:
  - namespace.yaml
  - deployment.yaml
  - service.yaml
  - podmonitor.yaml
  - prometheusrule.yaml
  - ../../dashboards
configMapGenerator:
  # Without a hash in its name: an edit reaches the running server, which takes it over, and no pod is restarted.
  - name: glassbox-config
    files: [glassbox.yaml]
    options:
      disableNameSuffixHash: true
"""

NAMESPACE: Final = """\
apiVersion: v1
kind: Namespace
metadata:
  name: %{namespace}
"""

_POD: Final = """\
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: %{uid}
  runAsGroup: %{uid}
  fsGroup: %{uid}
  seccompProfile:
    type: RuntimeDefault
containers:
  - name: vllm
    image: %{image}
    args: <args>
    env:
      - name: GLASSBOX_CONFIG
        value: %{config_dir}/glassbox.yaml
    ports:
<http>      - name: glassbox
        containerPort: %{glassbox_port}
    securityContext:
      allowPrivilegeEscalation: false
      capabilities:
        drop: [ALL]
    resources:
      requests:
        cpu: "4"
        memory: 16Gi
      limits:
        memory: 32Gi
        nvidia.com/gpu: "1"
<probes>    volumeMounts:
      # The whole directory: with subPath an edited ConfigMap would not arrive.
      - name: config
        mountPath: %{config_dir}
        readOnly: true
      - name: cache
        mountPath: %{home}/.cache
      - name: shm
        mountPath: /dev/shm
volumes:
  - name: config
    configMap:
      name: glassbox-config
  - name: cache
    emptyDir: {}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: 8Gi
"""
_HTTP_PORT: Final = """\
      - name: http
        containerPort: %{vllm_port}
"""
_PROBES: Final = """\
    # The model is fetched and compiled before the server answers: up to 30 minutes.
    startupProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 10
      failureThreshold: 180
    readinessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 5
    livenessProbe:
      httpGet: {path: /health, port: http}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
"""
_MODEL: Final = '"%{model}"'
_PORT: Final = '"--port", "%{vllm_port}"'
_LENGTH: Final = '"--max-model-len", "%{max_model_len}"'
# Of a model whose pipeline stages are on the nodes of a group, one each.
_STAGES: Final = '"--pipeline-parallel-size", "$(LWS_GROUP_SIZE)", "--nnodes", "$(LWS_GROUP_SIZE)"'
_NODE: Final = '"--node-rank", "$(LWS_WORKER_INDEX)", "--master-addr", "$(LWS_LEADER_ADDRESS)"'


def _pod(spaces: int, *args: str, has_api: bool) -> str:
    """The spec of a pod with vLLM, as a text with so many spaces before each line.

    Args:
        args: of `vllm serve`, as many on a line as belong together.
        has_api: whether it has an API server.
    """
    on_one_line = f"[{', '.join(args)}]"
    given = on_one_line if len(args) <= 3 else "".join(["[\n", *(f"      {line},\n" for line in args), "    ]"])
    text = _POD.replace("<args>", given)
    text = text.replace("<http>", _HTTP_PORT if has_api else "").replace("<probes>", _PROBES if has_api else "")
    return indent(text, " " * spaces)


DEPLOYMENT: Final = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: vllm
  labels:
    app.kubernetes.io/name: vllm
    app.kubernetes.io/part-of: glassbox
spec:
  replicas: 1
  # A new pod would wait for the GPU that the old one holds.
  strategy:
    type: Recreate
  selector:
    matchLabels:
      app.kubernetes.io/name: vllm
  template:
    metadata:
      labels:
        app.kubernetes.io/name: vllm
        app.kubernetes.io/part-of: glassbox
    spec:
""" + _pod(6, _MODEL, _PORT, _LENGTH, has_api=True)

LEADER_WORKER_SET: Final = (
    """\
# One model over the GPUs of two nodes. The leader has the API server; the other node has none (--headless), and what it
# measures is at its own port like the leader's. Needs the controller of LeaderWorkerSet (lws.sigs.k8s.io).
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: vllm
  labels:
    app.kubernetes.io/name: vllm
    app.kubernetes.io/part-of: glassbox
spec:
  replicas: 1
  leaderWorkerTemplate:
    size: 2
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      metadata:
        labels:
          app.kubernetes.io/name: vllm
          app.kubernetes.io/component: leader
          app.kubernetes.io/part-of: glassbox
      spec:
"""
    + _pod(8, _MODEL, _PORT, _LENGTH, _STAGES, _NODE, has_api=True)
    + """\
    workerTemplate:
      metadata:
        labels:
          app.kubernetes.io/name: vllm
          app.kubernetes.io/component: worker
          app.kubernetes.io/part-of: glassbox
      spec:
"""
    + _pod(8, _MODEL, '"--headless"', _LENGTH, _STAGES, _NODE, has_api=False)
)

LEADER_WORKER_SET_KUSTOMIZATION: Final = """\
# kubectl apply --server-side -k deploy/leaderworkerset
# All of deploy/kubernetes, with a LeaderWorkerSet for the Deployment. The PodMonitor finds the pods of both templates:
# glassbox's port of each, vLLM's of the leader.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: %{namespace}
resources:
  - ../kubernetes
  - leaderworkerset.yaml
patches:
  - patch: |-
      $patch: delete
      apiVersion: apps/v1
      kind: Deployment
      metadata:
        name: vllm
  # Clients reach the leader, no other node listens to them.
  - patch: |-
      apiVersion: v1
      kind: Service
      metadata:
        name: vllm
      spec:
        selector:
          app.kubernetes.io/component: leader
"""

SERVICE: Final = """\
apiVersion: v1
kind: Service
metadata:
  name: vllm
  labels:
    app.kubernetes.io/name: vllm
    app.kubernetes.io/part-of: glassbox
spec:
  selector:
    app.kubernetes.io/name: vllm
  ports:
    - name: http
      port: %{vllm_port}
      targetPort: http
    - name: glassbox
      port: %{glassbox_port}
      targetPort: glassbox
"""

POD_MONITOR: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: %{job}
  labels:
    app.kubernetes.io/part-of: glassbox
spec:
  jobLabel: app.kubernetes.io/name   # the label `job` becomes %{job}, as with compose
  selector:
    matchLabels:
      app.kubernetes.io/name: vllm
  podMetricsEndpoints:
    - port: http
      path: /metrics
      interval: %{scrape_interval_s}s
      # They come from the other port: with exemplars, and only once.
      metricRelabelings:
        - sourceLabels: [__name__]
          regex: glassbox_.*
          action: drop
    - port: glassbox
      path: /metrics
      interval: %{scrape_interval_s}s
"""

PROMETHEUS_RULE: Final = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: glassbox
  labels:
    app.kubernetes.io/part-of: glassbox
spec:
"""
