"""The stack's files: valid for the programs that read them, agreeing with each other, and all values from one place."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")
pytest.importorskip("kubernetes_validate", reason="needs the extra dev")

import kubernetes_validate

from glassbox.cli.dashboards import generated as files
from glassbox.cli.dashboards import stack_templates
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.stack import Stack, stack_files
from glassbox.config.load import load_config
from glassbox.export.exemplars import labels_of
from tests.serving import require_tool
from tests.trace_samples import make_trace

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
STACK = Stack()
LEADER_WORKER_SET = DEPLOY / "leaderworkerset"
KUBERNETES_VERSION = "1.31"
MANIFESTS = sorted(
    path for path in KUBERNETES.glob("*.yaml") if path.name not in {"kustomization.yaml", "glassbox.yaml"}
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


COMPOSE = load(DEPLOY / "compose.yaml")


class TestCompose:
    def test_is_a_compose_file(self) -> None:
        """Valid by the schema of the compose specification."""
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
        done = subprocess.run([*command, str(DEPLOY / "compose.yaml")], capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr

    def test_has_the_services(self) -> None:
        """vLLM is built from this repository's Dockerfile, the others are pinned images."""
        services = COMPOSE["services"]
        assert {"vllm", "prometheus", "grafana", "otel-collector", "jaeger"} == services.keys()
        build = services["vllm"]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
        assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]) for service in services.values())

    def test_every_mounted_path_and_volume_exists(self) -> None:
        """Paths of the host are in the repository; named volumes are declared, and used."""
        sources = [
            mount.split(":")[0] for service in COMPOSE["services"].values() for mount in service.get("volumes", ())
        ]
        paths = [source for source in sources if source.startswith(".")]
        assert paths
        assert [] == [path for path in paths if not (DEPLOY / path).is_dir()]
        assert COMPOSE["volumes"].keys() == set(sources) - set(paths)

    def test_ports_are_open_on_this_machine_only(self) -> None:
        """Nothing of the stack has a password that could be called one."""
        ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
        assert ports
        assert [] == [port for port in ports if not port.startswith("127.0.0.1:")]

    def test_healthcheck_is_a_program(self) -> None:
        """Its Python compiles."""
        command = COMPOSE["services"]["vllm"]["healthcheck"]["test"]
        assert ["CMD", "python3", "-c"] == command[:3]
        compile(command[3], "healthcheck", "exec")


class TestGlassboxConfig:
    @pytest.mark.parametrize(("folder", "otel"), [("glassbox", True), ("kubernetes", False)])
    def test_is_valid(self, folder: str, otel: bool) -> None:
        """glassbox itself loads it; OTLP goes to the collector where there is one, and metrics only once."""
        config = load_config(DEPLOY / folder / "glassbox.yaml")
        assert STACK.sample_rate == config.sample_rate
        assert RuleSettings().overhead_budget == config.sampling.overhead_budget
        assert otel == config.export.otel.enabled
        assert f"http://otel-collector:{STACK.otlp_grpc_port}" == config.export.otel.endpoint
        assert STACK.glassbox_port == config.export.own_port
        # Prometheus is not in the server's container.
        assert "0.0.0.0" == config.export.http.host
        assert not config.export.otel.metrics


class TestPrometheus:
    def test_promtool_accepts_the_configuration(self) -> None:
        """`promtool check config`, which reads the rules as well."""
        promtool = require_tool("promtool", "prometheus")
        command = [promtool, "check", "config", str(DEPLOY / "prometheus/prometheus.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr
        assert "1 rule files found" in done.stdout

    def test_targets_are_services_of_the_compose_file(self) -> None:
        """Host names and ports are those that the services have."""
        config = load(DEPLOY / "prometheus/prometheus.yaml")
        targets = {
            target
            for job in config["scrape_configs"]
            for static in job["static_configs"]
            for target in static["targets"]
        }
        hosts = {target.split(":")[0] for target in targets} - {"localhost"}
        assert {"vllm", "otel-collector"} == hosts
        assert {"vllm", "otel-collector"} <= COMPOSE["services"].keys()
        assert {f"vllm:{STACK.vllm_port}", f"vllm:{STACK.glassbox_port}"} <= targets

    def test_exemplars_are_stored(self) -> None:
        """Prometheus only keeps them if it is told to."""
        assert "--enable-feature=exemplar-storage" in COMPOSE["services"]["prometheus"]["command"]


class TestGrafana:
    def test_data_source_is_the_prometheus_of_the_stack(self) -> None:
        """And tells the scrape interval, from which Grafana derives $__rate_interval."""
        source, _ = load(ROOT / "dashboards/provisioning/datasources/prometheus.yaml")["datasources"]
        assert ("prometheus", True) == (source["type"], source["isDefault"])
        assert f"http://prometheus:{STACK.prometheus_port}" == source["url"]
        assert f"{STACK.scrape_interval_s}s" == source["jsonData"]["timeInterval"]

    def test_exemplars_lead_to_the_page_and_to_the_trace(self) -> None:
        """By the labels that exemplars have: the request's page on a published port, the trace in Jaeger."""
        prometheus, traces = load(ROOT / "dashboards/provisioning/datasources/prometheus.yaml")["datasources"]
        links = {link["name"]: link for link in prometheus["jsonData"]["exemplarTraceIdDestinations"]}
        assert {"request_id", "trace_id"} == links.keys()
        assert links.keys() <= (labels_of(make_trace(), (f"{7:032x}", f"{7:016x}")) or {}).keys()
        host = links["request_id"]["url"].removeprefix("http://").split("/")[0]
        assert f"{host}:{STACK.glassbox_port}" in COMPOSE["services"]["vllm"]["ports"]
        # Grafana reads $$ as $ in provisioning files.
        assert "/glassbox/v1/requests/$${__value.raw}?format=html" in links["request_id"]["url"]
        assert links["trace_id"]["datasourceUid"] == traces["uid"]
        assert ("jaeger", f"http://jaeger:{STACK.traces_port}") == (traces["type"], traces["url"])

    def test_dashboards_are_found_where_they_are_mounted(self) -> None:
        """The provider's path and the home dashboard are under the mount of dashboards/."""
        (provider,) = load(ROOT / "dashboards/provisioning/dashboards/glassbox.yaml")["providers"]
        grafana = COMPOSE["services"]["grafana"]
        mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
        assert provider["options"]["path"] == mounts["../dashboards"]
        home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
        assert (ROOT / "dashboards" / home.relative_to(mounts["../dashboards"])).is_file()
        assert "/etc/grafana/provisioning" == mounts["../dashboards/provisioning"]


class TestCollector:
    """Structural: the collector is a Go program that no Python package carries, so it can't check its own file."""

    CONFIG = load(DEPLOY / "otel-collector/config.yaml")

    def test_pipelines_use_what_is_defined_and_all_of_it(self) -> None:
        """A component that is named but missing stops the collector; one that is never used is a mistake."""
        for kind in ("receivers", "processors", "exporters"):
            used = {name for pipeline in self.CONFIG["service"]["pipelines"].values() for name in pipeline[kind]}
            assert self.CONFIG[kind].keys() == used

    def test_memory_is_limited_before_batching(self) -> None:
        """The collector's documentation wants memory_limiter first."""
        for pipeline in self.CONFIG["service"]["pipelines"].values():
            assert ["memory_limiter", "batch"] == pipeline["processors"]

    def test_listens_where_the_others_send_and_scrape(self) -> None:
        """OTLP over gRPC and HTTP, what it received, and its own metrics: four ports, the values of the stack."""
        protocols = self.CONFIG["receivers"]["otlp"]["protocols"]
        assert f"0.0.0.0:{STACK.otlp_grpc_port}" == protocols["grpc"]["endpoint"]
        assert f"0.0.0.0:{STACK.otlp_http_port}" == protocols["http"]["endpoint"]
        assert f"0.0.0.0:{STACK.collector_port}" == self.CONFIG["exporters"]["prometheus"]["endpoint"]
        (reader,) = self.CONFIG["service"]["telemetry"]["metrics"]["readers"]
        assert STACK.collector_metrics_port == reader["pull"]["exporter"]["prometheus"]["port"]


class TestKubernetes:
    @pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
    def test_manifest_is_valid(self, path: Path) -> None:
        """By Kubernetes' own schemas, without unknown keys; kinds of the Prometheus operator by their structure."""
        manifest = load(path)
        if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            # The schemas of custom resources come with their operator, in no package: see the tests below.
            assert {"apiVersion", "kind", "metadata", "spec"} == manifest.keys()
        else:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)

    def test_kustomization_names_every_manifest_and_only_files_that_exist(self) -> None:
        """The dashboards come in as a base of their own: kustomize reads no file outside of a root."""
        kustomization = load(KUBERNETES / "kustomization.yaml")
        assert {path.name for path in MANIFESTS} | {"../../dashboards"} == set(kustomization["resources"])
        for generator in kustomization["configMapGenerator"]:
            assert [] == [name for name in generator["files"] if not (KUBERNETES / name).is_file()]

    def test_dashboards_become_config_maps_that_grafana_finds(self) -> None:
        """One each, because of the limit of size, with the label of Grafana's sidecar."""
        kustomization = load(ROOT / "dashboards/kustomization.yaml")
        generated = {name for entry in kustomization["configMapGenerator"] for name in entry["files"]}
        assert {f"{uid}.json" for uid in files.dashboards()} == generated
        assert {"grafana_dashboard": "1"} == kustomization["generatorOptions"]["labels"]

    def test_kustomize_builds_it(self) -> None:
        """With kubectl's built-in kustomize: all objects, in one namespace, valid, dashboards unchanged."""
        kubectl = shutil.which("kubectl")
        if kubectl is None:
            pytest.skip(
                "needs kubectl, which Debian's packages don't have; the tests above check the same by structure"
            )
        done = subprocess.run([kubectl, "kustomize", str(KUBERNETES)], capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stderr
        objects = list(yaml.safe_load_all(done.stdout))
        kinds = sorted(entry["kind"] for entry in objects)
        assert ["ConfigMap"] * 5 + ["Deployment", "Namespace", "PodMonitor", "PrometheusRule", "Service"] == kinds
        for entry in objects:
            if entry["kind"] != "Namespace":
                assert STACK.namespace == entry["metadata"]["namespace"]
            if not entry["apiVersion"].startswith("monitoring.coreos.com/"):
                kubernetes_validate.validate(entry, KUBERNETES_VERSION, strict=True)
        maps = {entry["metadata"]["name"]: entry["data"] for entry in objects if entry["kind"] == "ConfigMap"}
        for uid, board in files.dashboards().items():
            assert board == json.loads(maps[uid][f"{uid}.json"])

    def test_configuration_reaches_the_running_server(self) -> None:
        """The pod mounts the ConfigMap as a directory under the name that GLASSBOX_CONFIG says, never by subPath."""
        kustomization = load(KUBERNETES / "kustomization.yaml")
        (generator,) = kustomization["configMapGenerator"]
        assert generator["options"]["disableNameSuffixHash"]
        pod = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert volumes.keys() == mounts.keys()
        assert generator["name"] == volumes["config"]["configMap"]["name"]
        assert "subPath" not in mounts["config"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert f"{mounts['config']['mountPath']}/{generator['files'][0]}" == environment["GLASSBOX_CONFIG"]

    def test_pod_is_found_by_service_and_pod_monitor(self) -> None:
        """Labels and port names agree; the label `job` is the same as with compose."""
        template = load(KUBERNETES / "deployment.yaml")["spec"]["template"]
        labels = template["metadata"]["labels"].items()
        ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        service = load(KUBERNETES / "service.yaml")["spec"]
        monitor = load(KUBERNETES / "podmonitor.yaml")["spec"]
        assert service["selector"].items() <= labels
        assert monitor["selector"]["matchLabels"].items() <= labels
        endpoints = monitor["podMetricsEndpoints"]
        assert {port["targetPort"] for port in service["ports"]} == ports == {entry["port"] for entry in endpoints}
        assert STACK.job == dict(labels)[monitor["jobLabel"]]
        assert {"/metrics"} == {entry["path"] for entry in endpoints}
        # glassbox's metrics come from one of them only.
        (rule,) = next(entry for entry in endpoints if entry["port"] == "http")["metricRelabelings"]
        assert {"sourceLabels": ["__name__"], "regex": "glassbox_.*", "action": "drop"} == rule

    def test_pod_runs_without_privileges(self) -> None:
        """As the image's user."""
        pod = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"USER {pod['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
        assert not pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


class TestLeaderWorkerSet:
    """Its schema comes with its controller, in no package; what is in it are pods, which Kubernetes' schemas know."""

    SET = load(LEADER_WORKER_SET / "leaderworkerset.yaml")
    GROUP = SET["spec"]["leaderWorkerTemplate"]
    TEMPLATES: ClassVar[dict[str, Any]] = {"leader": GROUP["leaderTemplate"], "worker": GROUP["workerTemplate"]}

    @staticmethod
    def container(role: str) -> Any:
        (container,) = TestLeaderWorkerSet.TEMPLATES[role]["spec"]["containers"]
        return container

    def test_its_keys(self) -> None:
        """Those of the API, with two pods in a group that start and end together."""
        assert (self.SET["apiVersion"], self.SET["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
        assert self.SET.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert self.SET["spec"].keys() == {"replicas", "leaderWorkerTemplate"}
        assert self.GROUP.keys() == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
        assert (self.GROUP["size"], self.GROUP["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")

    @pytest.mark.parametrize("role", ["leader", "worker"])
    def test_pods_are_valid(self, role: str) -> None:
        """Each is a pod by Kubernetes' own schema, without unknown keys."""
        template = self.TEMPLATES[role]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role, **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES_VERSION, strict=True)

    def test_the_same_pod_as_the_deployment(self) -> None:
        """But for arguments, and for what a node without API server has not."""
        deployed = load(KUBERNETES / "deployment.yaml")["spec"]["template"]["spec"]
        (single,) = deployed["containers"]
        of_api = {"startupProbe", "readinessProbe", "livenessProbe"}
        for role, lacks in (("leader", set()), ("worker", of_api)):
            spec, container = self.TEMPLATES[role]["spec"], self.container(role)
            assert {**spec, "containers": []} == {**deployed, "containers": []}
            assert container.keys() == single.keys() - lacks
            assert {k: v for k, v in container.items() if k not in {"args", "ports"}} == {
                k: v for k, v in single.items() if k not in {"args", "ports"} | lacks
            }

    def test_vllm_takes_the_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With what the controller puts in for the variables: two stages on two nodes, of which one is headless."""
        cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args", reason="needs vLLM")
        # Its parser loads plugins, which would stay in this process.
        monkeypatch.setattr("vllm.plugins.plugins_loaded", True)
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        for index, role in enumerate(("leader", "worker")):
            variables = {"GROUP_SIZE": "2", "WORKER_INDEX": str(index), "LEADER_ADDRESS": "vllm-0.vllm"}
            put_in = {f"$(LWS_{name})": value for name, value in variables.items()}
            args = [put_in.get(arg, arg) for arg in self.container(role)["args"]]
            found = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(args)
            assert (found.model_tag, found.headless) == (STACK.model, role == "worker")
            assert (found.pipeline_parallel_size, found.nnodes, found.node_rank) == (2, 2, index)
            assert found.master_addr == "vllm-0.vllm"

    def test_what_each_node_measures_is_scraped(self) -> None:
        """The PodMonitor finds both pods, and glassbox's port on each; vLLM's is the leader's."""
        monitor = load(KUBERNETES / "podmonitor.yaml")["spec"]
        for role, ports in (("leader", {"http", "glassbox"}), ("worker", {"glassbox"})):
            labels = self.TEMPLATES[role]["metadata"]["labels"]
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
            assert STACK.job == labels[monitor["jobLabel"]]
            assert ports == {port["name"] for port in self.container(role)["ports"]}
        (shown,) = [entry for entry in monitor["podMetricsEndpoints"] if "metricRelabelings" not in entry]
        assert shown["port"] == "glassbox"

    def test_it_takes_the_deployments_place(self) -> None:
        """The kustomization removes the Deployment and sends clients to the leader alone."""
        kustomization = load(LEADER_WORKER_SET / "kustomization.yaml")
        assert kustomization["resources"] == ["../kubernetes", "leaderworkerset.yaml"]
        removed, patched = (yaml.safe_load(entry["patch"]) for entry in kustomization["patches"])
        deployment, service = (load(KUBERNETES / f"{name}.yaml") for name in ("deployment", "service"))
        assert removed == {
            "$patch": "delete",
            "apiVersion": deployment["apiVersion"],
            "kind": deployment["kind"],
            "metadata": {"name": deployment["metadata"]["name"]},
        }
        assert (patched["kind"], patched["metadata"]["name"]) == ("Service", service["metadata"]["name"])
        selector = {**service["spec"]["selector"], **patched["spec"]["selector"]}.items()
        chosen = [
            role for role, template in self.TEMPLATES.items() if selector <= template["metadata"]["labels"].items()
        ]
        assert chosen == ["leader"]


class TestOnePlace:
    def test_no_text_repeats_a_value(self) -> None:
        """Ports, images, paths and names stand in `Stack` only."""
        texts = "\n".join(text for name, text in vars(stack_templates).items() if name.isupper())
        unique = [value for value in (getattr(STACK, field.name) for field in fields(Stack)) if len(str(value)) > 4]
        assert 10 < len(unique)
        # The namespace and the job are words that also mean something else.
        repeated = [value for value in unique if str(value) in texts and value not in {STACK.namespace, STACK.job}]
        assert [] == repeated

    def test_a_changed_value_changes_all_files(self) -> None:
        """Of the old port and image nothing is left."""
        changed = replace(STACK, vllm_port=18000, prometheus_port=19090, image="registry.example/glassbox:1.2.3")
        text = "\n".join(stack_files(files.header, changed).values())
        for old in (r"(?<!1)8000\b", r"(?<!1)9090\b", re.escape(STACK.image)):
            assert [] == re.findall(old, text)

    def test_image_runs_as_the_user_of_the_stack(self) -> None:
        """The Dockerfile's user, home and working command are what the manifests expect."""
        dockerfile = (ROOT / "Dockerfile").read_text()
        assert f"USER {STACK.uid}" in dockerfile
        assert f"HOME={STACK.home}" in dockerfile

    def test_volumes_for_caches_belong_to_the_images_user(self) -> None:
        """A new volume takes the owner of the directory that it is mounted at: the image makes it as its user."""
        mounts = [mount.split(":")[1] for mount in COMPOSE["services"]["vllm"]["volumes"] if mount.startswith("model-")]
        assert [f"{STACK.home}/.cache"] == mounts
        made = (ROOT / "Dockerfile").read_text().split(f"USER {STACK.uid}\n")[1]
        assert f"WORKDIR {STACK.home}\n" in made
        assert "RUN mkdir .cache\n" in made
