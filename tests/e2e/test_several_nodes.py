"""Servers of several engines, over nodes and ports: each engine is exported once, under vLLM's own label.

The nodes are two servers of one machine, each with its own run directory, as nodes have.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from glassbox.cli.demo.vllm_server import HOST
from tests.e2e.samples import Key, counts_against_rows, glassbox_samples
from tests.integration.parallel_engine import HEADS as LLAMA_HEADS
from tests.integration.parallel_engine import LAYERS as LLAMA_LAYERS
from tests.integration.parallel_engine import prompts, random_llama
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.ports import free_port
from tests.serving import BASE_CONFIG, MODEL_NAME, GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]  # two engines at once, for minutes

REQUESTS: Final = {"0": 3, "1": 2}
TOKENS: Final = 6
LAYERS, HEADS, PREFILL_ROWS = 30, 9, 8


class HeadlessNode(GlassboxServer):
    """A node without an API server: it is there when the one that waits for its engines is."""

    def _wait_healthy(self) -> None:
        self._healthy = True


def engines(samples: dict[Key, float], name: str = "glassbox_steps_total") -> set[str]:
    return {dict(labels)["engine"] for found, labels in samples if found == name}


def vllm_engines(server: GlassboxServer) -> set[str]:
    (family,) = (found for found in server.metrics() if found.name == "vllm:generation_tokens")
    return {sample.labels["engine"] for sample in family.samples if sample.name == "vllm:generation_tokens_total"}


def own_port(port: int) -> dict[Key, float]:
    """What glassbox's port shows; nothing while nobody listens there."""
    try:
        return glassbox_samples(httpx.get(f"http://{HOST}:{port}/metrics", timeout=30).raise_for_status().text)
    except httpx.TransportError:
        return {}


def rows(samples: dict[Key, float], phase: str, engine: str | None = None) -> float:
    """Of an engine, or of all that are shown."""
    wanted = {("phase", phase), *({("engine", engine)} if engine is not None else ())}
    name = "glassbox_attention_rows_total"
    return sum(value for (found, labels), value in samples.items() if found == name and wanted <= labels)


class Nodes:
    """A server over two nodes, of which the second is headless and has a port of glassbox's.

    Args:
        model: folder.
        folder: for the two nodes'.
        args: of both; leader_args, headless_args: further ones of each.
        export: of the headless node.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        args: tuple[str, ...],
        leader_args: tuple[str, ...],
        headless_args: tuple[str, ...],
        **export: Any,
    ) -> None:
        self.port = free_port()
        own: dict[str, Any] = {**BASE_CONFIG["export"], "http": {"port": self.port}, **export}
        for name in ("headless", "leader"):
            (folder / name).mkdir()
        self.headless = HeadlessNode(
            model,
            folder / "headless",
            config={**BASE_CONFIG, "export": own},
            args=(*args, "--headless", *headless_args),
            env={"GLASSBOX_RUN_DIR": None, "XDG_RUNTIME_DIR": str(folder / "headless")},
        )
        self.leader = GlassboxServer(model, folder / "leader", args=(*args, *leader_args))

    def start(self, stack: ExitStack) -> None:
        """Both; the leader waits for the other."""
        for server in (self.headless, self.leader):
            stack.enter_context(server)

    def ask(self, prompt: list[int], engine: str) -> None:
        """A request for an engine, which the client names."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        httpx.post(
            f"{self.leader.url}/v1/completions", json=body, headers={"X-data-parallel-rank": engine}, timeout=120
        ).raise_for_status()


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def nodes(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory, collector: OtlpReceiver) -> Iterator[Nodes]:
    """A data-parallel server; the headless node pushes to a collector, too. Both have answered."""
    parallel = ("--data-parallel-size", "2", "--data-parallel-size-local", "1")
    nodes = Nodes(
        demo_model_path,
        tmp_path_factory.mktemp("nodes"),
        (*parallel, "--data-parallel-address", HOST, "--data-parallel-rpc-port", str(free_port())),
        ("--api-server-count", "1"),
        ("--data-parallel-start-rank", "1"),
        otel={"enabled": True, "endpoint": collector.grpc_endpoint},
    )
    with ExitStack() as stack:
        nodes.start(stack)
        for engine, count in REQUESTS.items():
            for number in range(count):
                nodes.ask([2000 + number, *range(1000, 1020)], engine)
        yield nodes


def expected_rows(engine: str, per_request: int) -> int:
    return REQUESTS[engine] * per_request * LAYERS * HEADS


@pytest.fixture(scope="module")
def shown(nodes: Nodes) -> dict[str, dict[Key, float]]:
    """What each node shows once all rows have arrived: the leader at vLLM's /metrics, the other at its port."""
    reads = {"0": lambda: glassbox_samples(nodes.leader.metrics()), "1": lambda: own_port(nodes.port)}
    return {
        engine: wait_for(
            read,
            lambda found, engine=engine: rows(found, "decode") >= expected_rows(engine, TOKENS - 1),
            60.0,
            f"rows of engine {engine}",
        )
        for engine, read in reads.items()
    }


class TestTwoNodes:
    def test_each_engine_is_on_its_node(self, nodes: Nodes, shown: dict[str, dict[Key, float]]) -> None:
        """Each is exported by its node alone, and has the label that vLLM's metrics have for it."""
        assert {node: engines(samples) for node, samples in shown.items()} == {"0": {"0"}, "1": {"1"}}
        assert vllm_engines(nodes.leader) == {"0", "1"}

    def test_rows_count_once(self, shown: dict[str, dict[Key, float]]) -> None:
        """Each node has the rows of the requests that its engine served."""
        for engine, samples in shown.items():
            assert rows(samples, "decode") == expected_rows(engine, TOKENS - 1)
            assert rows(samples, "prefill") == expected_rows(engine, PREFILL_ROWS)
            assert counts_against_rows(samples) == {}

    def test_nothing_failed(self, nodes: Nodes, shown: dict[str, dict[Key, float]]) -> None:
        """No errors; neither node says that nobody reads it."""
        for samples in shown.values():
            assert not [key for key in samples if key[0] == "glassbox_errors_total"]
        for server in (nodes.headless, nodes.leader):
            assert "reaches nobody" not in server.log_path.read_text(errors="replace")

    def test_the_headless_node_pushes(self, nodes: Nodes, collector: OtlpReceiver) -> None:
        """OTLP has its engine, rank and host, and only its."""
        # The first exports come before the first request.
        collector.wait_until(lambda got: "glassbox.attention.rows" in got.metrics(), 90.0)
        metrics = collector.metrics()
        (worker,) = (attributes(point.attributes) for point in metrics["glassbox.worker_info"].gauge.data_points)
        assert (worker["glassbox.engine"], worker["glassbox.rank"], worker["glassbox.heads"]) == ("1", 0, "0-8")
        (resource,) = collector.requests[-1].message.resource_metrics
        assert attributes(resource.resource.attributes)["host.name"] == worker["host.name"]
        pushed = {
            attributes(point.attributes)["glassbox.engine"]
            for point in metrics["glassbox.attention.rows"].sum.data_points
        }
        assert pushed == {"1"}


def tiny_llama(folder: Path, tokenizer: Path) -> Path:
    """A random dense model that answers at once, with somebody's tokenizer."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(random_llama(folder))
    return folder


def test_ranks_on_two_nodes(demo_model_path: Path, tmp_path: Path) -> None:
    """One engine, a tensor-parallel rank on each node: each exports its heads, and together they are the engine's."""
    model = tiny_llama(tmp_path / "model", demo_model_path)
    parallel = ("--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HOST)
    nodes = Nodes(
        model,
        tmp_path,
        (*parallel, "--master-port", str(free_port()), "--max-model-len", "512"),
        ("--node-rank", "0"),
        ("--node-rank", "1"),
    )
    given, of_a_node = prompts(), LLAMA_LAYERS * LLAMA_HEADS // 2
    with ExitStack() as stack:
        nodes.start(stack)
        for prompt in given:
            nodes.ask(prompt, "0")
        reads = (lambda: glassbox_samples(nodes.leader.metrics()), lambda: own_port(nodes.port))
        decoded = len(given) * (TOKENS - 1) * of_a_node
        shown = [wait_for(read, lambda found: rows(found, "decode") >= decoded, 60.0, "all rows") for read in reads]
    for rank, samples in enumerate(shown):
        assert rows(samples, "decode") == decoded
        assert rows(samples, "prefill") == sum(min(len(prompt), PREFILL_ROWS) for prompt in given) * of_a_node
        assert counts_against_rows(samples) == {}
        (worker,) = (dict(labels) for name, labels in samples if name == "glassbox_worker_info")
        assert (worker["engine"], worker["rank"], worker["heads"]) == ("0", str(rank), ("0-3", "4-7")[rank])
    assert list((tmp_path / "headless").glob("glassbox-*")) == [], "the headless node leaves no run directory"


def tiny_moe(folder: Path, tokenizer: Path) -> Path:
    """A random mixture of experts of three layers: vLLM's supervisor takes no other model."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.save_pretrained(folder)
    config = Qwen3MoeConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "dtype": "bfloat16"}))
    return folder


def test_supervisor(demo_model_path: Path, tmp_path: Path) -> None:
    """Its API servers share a run directory: each shows its own engine, and glassbox's port shows all of them.

    On a CPU such a model can't answer (vLLM lacks the exchange between its ranks), so only what stands before the
    first request is looked at.
    """
    ports = {"glassbox": free_port(), "supervisor": free_port()}
    (tmp_path / "server").mkdir()
    (tmp_path / "model").mkdir()
    parallel = ("--data-parallel-size", "2", "--data-parallel-size-local", "2")
    parallel += ("--data-parallel-multi-port-external-lb", "--data-parallel-supervisor-port", str(ports["supervisor"]))
    # The experts, too, are shared out among the engines.
    parallel += ("--enable-expert-parallel",)
    server = GlassboxServer(
        tiny_moe(tmp_path / "model", demo_model_path),
        tmp_path / "server",
        config={**BASE_CONFIG, "export": {"interval_s": 1, "http": {"port": ports["glassbox"]}}},
        args=parallel,
        # As an operator runs it: the supervisor, in which the plugin is loaded first, names the directory.
        env={"GLASSBOX_RUN_DIR": None, "XDG_RUNTIME_DIR": str(tmp_path)},
    )

    def shown(url: str) -> dict[Key, float]:
        try:
            return glassbox_samples(httpx.get(url, timeout=30, follow_redirects=True).raise_for_status().text)
        except httpx.TransportError:
            return {}

    urls = {str(rank): f"http://{HOST}:{server.port + rank}/metrics" for rank in range(2)}
    with server:
        for engine, url in urls.items():
            samples = wait_for(lambda url=url: shown(url), bool, 60.0, f"metrics of engine {engine}")
            assert engines(samples, "glassbox_layers_observed") == {engine}
            text = httpx.get(url, timeout=30, follow_redirects=True).text
            assert f'vllm:generation_tokens_total{{engine="{engine}"' in text
        together = wait_for(
            lambda: own_port(ports["glassbox"]), lambda found: len(engines(found)) == 2, 60.0, "both engines"
        )
        ranks = [dict(labels)["rank"] for name, labels in together if name == "glassbox_worker_info"]
        assert ranks == ["0", "0"], "each engine has a first tensor-parallel rank, whatever its experts are"
        (run_dir,) = tmp_path.glob("glassbox-*")
        assert run_dir.name.split("-")[2] == str(server.pid)
    assert not run_dir.exists()


def test_hybrid_load_balancing(demo_model_path: Path, tmp_path: Path) -> None:
    """Each of two nodes has API servers for its own engines, and shows these, under vLLM's own numbers of them.

    Of a node with two engines vLLM starts two API servers unless it is told otherwise: whichever answers shows both
    engines. (With one engine a node, vLLM 0.32 does not start for a dense model: it takes that for external load
    balancing, and fails with `assert self.stats_update_address is not None`.)
    """
    local = 2
    model = tiny_llama(tmp_path / "model", demo_model_path)
    parallel = ("--data-parallel-size", str(2 * local), "--data-parallel-size-local", str(local))
    parallel += ("--data-parallel-hybrid-lb", "--data-parallel-address", HOST)
    parallel += ("--data-parallel-rpc-port", str(free_port()), "--max-model-len", "512")
    own = [("--data-parallel-start-rank", "0"), ("--data-parallel-start-rank", str(local), "--api-server-count", "1")]
    folders = [tmp_path / f"node-{number}" for number in range(2)]
    for folder in folders:
        folder.mkdir()
    servers = [
        GlassboxServer(
            model,
            folder,
            args=(*parallel, *args),
            env={"GLASSBOX_RUN_DIR": None, "XDG_RUNTIME_DIR": str(folder)},
            start_timeout_s=600,
        )
        for folder, args in zip(folders, own, strict=True)
    ]
    engines_of = [{str(number * local + engine) for engine in range(local)} for number in range(2)]
    of_a_row = LLAMA_LAYERS * LLAMA_HEADS
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:  # each waits for the other
            list(pool.map(stack.enter_context, servers))
        for number, server in enumerate(servers):
            for engine in range(local):
                # So many that each engine of the four has a number of its own; the header counts within the node.
                for request in range(number * local + engine + 1):
                    body = {"model": MODEL_NAME, "prompt": [2 + request, *range(8, 47)], "max_tokens": TOKENS}
                    httpx.post(
                        f"{server.url}/v1/completions",
                        json={**body, "temperature": 0, "ignore_eos": True},
                        headers={"X-data-parallel-rank": str(engine)},
                        timeout=120,
                    ).raise_for_status()
        for server, expected in zip(servers, engines_of, strict=True):
            decoded = {engine: (int(engine) + 1) * (TOKENS - 1) * of_a_row for engine in expected}
            samples = wait_for(
                lambda server=server: glassbox_samples(server.metrics()),
                lambda found, decoded=decoded: rows(found, "decode") >= sum(decoded.values()),
                60.0,
                f"rows of engines {sorted(expected)}",
            )
            # Each is on a connection of its own, so that with two API servers both answer.
            for shown in (samples, *(glassbox_samples(server.metrics()) for _ in range(8))):
                assert engines(shown) == engines(shown, "glassbox_layers_observed") == expected
                assert {engine: rows(shown, "decode", engine) for engine in expected} == decoded
                prefill = {engine: (int(engine) + 1) * PREFILL_ROWS * of_a_row for engine in expected}
                assert {engine: rows(shown, "prefill", engine) for engine in expected} == prefill
                assert counts_against_rows(shown) == {}
                assert not [key for key in shown if key[0] == "glassbox_errors_total"]
            assert vllm_engines(server) == expected
        run_dirs = [list(folder.glob("glassbox-*")) for folder in folders]
        assert [1, 1] == [len(found) for found in run_dirs]
        assert [found.name.split("-")[2] for (found,) in run_dirs] == [str(server.pid) for server in servers]
    assert [[], []] == [list(folder.glob("glassbox-*")) for folder in folders]
