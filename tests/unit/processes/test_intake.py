"""What the API server does with a request's keys: checks, spans by message, a traceparent for the worker."""

import ast
import asyncio
import gc
import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glassbox.adapter import http_request
from glassbox.adapter import server as vllm_server
from glassbox.adapter.server import INTAKE_PATCHES, EngineLabels, Patch, SentRequest, Wrappers
from glassbox.config.load import GlassboxConfig
from glassbox.processes.api_server import intake as intake_module
from glassbox.processes.api_server.intake import MAX_REMEMBERED, Intake, TracedRequests
from glassbox.store.logprobs_files import LogprobsFiles, read_logprobs
from glassbox.store.trace_directory import traces_path
from tests import probe_samples

vllm_exceptions = pytest.importorskip("vllm.exceptions", reason="needs vLLM")
ClientError = vllm_exceptions.VLLMValidationError

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Params:
    extra_args: dict[str, Any] | None
    n: int = 1


@dataclass
class Model:
    """30 layers, 9 heads in all on 3 ranks."""

    def get_num_attention_heads(self, parallel: Any) -> int:
        return 9 // int(parallel.tensor_parallel_size)

    def get_total_num_hidden_layers(self) -> int:
        return 30


VLLM_CONFIG = SimpleNamespace(model_config=Model(), parallel_config=SimpleNamespace(tensor_parallel_size=3))


@dataclass
class Server:
    """vLLM's methods as the intake wraps them; `seen` is what the originals were given."""

    config: dict[str, Any] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    run_dir: Path = Path("unused")

    def __post_init__(self) -> None:
        self.intake = Intake(lambda: GlassboxConfig.model_validate(self.config), self.run_dir)
        self.engine_client = SimpleNamespace(vllm_config=VLLM_CONFIG)

        async def check_model(_: Any, request: Any) -> None:
            self.seen.append(request)

        def process_inputs(_: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(params)
            return SimpleNamespace(sampling_params=Params(params.extra_args), cache_salt=None)

        async def add_request(_: Any, request_id: str, prompt: Any, params: Any, trace_headers: Any = None) -> Any:
            # As AsyncLLM without --otlp-traces-endpoint: the headers go no further.
            return self.process("r1", params.extra_args)

        self.wrappers = Wrappers(self.intake)
        self._check = self.wrappers.check_model(check_model)
        self._process = self.wrappers.process_inputs(process_inputs)
        self._add = self.wrappers.add_request(add_request)

    def check(self, xargs: Mapping[str, Any] | None, **fields: Any) -> None:
        asyncio.run(self._check(self, SimpleNamespace(vllm_xargs=xargs, **fields)))

    def process(self, request_id: str, extra_args: dict[str, Any] | None, **kwargs: Any) -> dict[str, Any] | None:
        processor = SimpleNamespace(vllm_config=VLLM_CONFIG)
        result: dict[str, Any] | None = self._process(
            processor, request_id, kwargs.pop("prompt", {}), Params(extra_args), ("generate",), **kwargs
        ).sampling_params.extra_args
        return result

    def add(self, extra_args: dict[str, Any], headers: dict[str, str] | None) -> dict[str, Any] | None:
        result: dict[str, Any] | None = asyncio.run(
            self._add(None, "r1", {}, Params(extra_args), trace_headers=headers)
        )
        return result


@pytest.fixture
def server() -> Server:
    return Server()


class TestPatches:
    @pytest.mark.parametrize("patch", INTAKE_PATCHES, ids=lambda patch: f"{patch.cls}.{patch.method}")
    def test_the_methods_are_there(self, patch: Patch) -> None:
        """The installed vLLM defines each of them in that very class, and the intake has a wrapper for it."""
        spec = importlib.util.find_spec(patch.module)
        assert spec is not None
        assert spec.origin is not None
        classes = {n.name: n for n in ast.parse(Path(spec.origin).read_text()).body if isinstance(n, ast.ClassDef)}
        methods = {n.name for n in classes[patch.cls].body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert patch.method in methods
        assert callable(getattr(Wrappers, patch.wrapper))


class TestCheckModel:
    @pytest.mark.parametrize("xargs", [None, {}, {"other": 1}, {"glassbox": "trace"}, {"glassbox": "off"}])
    def test_good_ones_pass(self, server: Server, xargs: Any) -> None:
        """vLLM's own check gets the request."""
        server.check(xargs)
        assert [xargs] == [request.vllm_xargs for request in server.seen]

    @pytest.mark.parametrize(
        ("xargs", "message"),
        [
            ({"glassbox": "yes"}, "glassbox must be trace or off, got 'yes'"),
            ({"glassbox_tracing": 1}, "'glassbox_tracing' must be one of glassbox, "),
            ({"glassbox": "trace", "glassbox_top_k": 99}, "glassbox_top_k must be a whole number from 0 to 32, got 99"),
            ({"glassbox": "trace", "glassbox_layers": [3, 30]}, "glassbox_layers must be from 0 to 29"),
            ({"glassbox": "trace", "glassbox_heads": [9]}, "glassbox_heads must be from 0 to 8"),
            ({"glassbox": "trace", "glassbox_traceparent": TRACEPARENT}, "glassbox_traceparent must not be given"),
        ],
    )
    def test_bad_ones_are_the_clients_error(self, server: Server, xargs: Any, message: str) -> None:
        """vLLM answers 400 to this error; its own check isn't reached."""
        with pytest.raises(ClientError, match=message) as raised:
            server.check(xargs)
        assert "vllm_xargs" == raised.value.parameter
        assert [] == server.seen

    def test_spans_by_message_are_for_chats(self, server: Server) -> None:
        """A completion has no messages; a chat has."""
        xargs = {"glassbox": "trace", "glassbox_spans": ["user=message:0"]}
        server.check(xargs, messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(ClientError, match="by message are for chat completions, got user=message:0"):
            server.check(xargs, prompt="Hi")

    def test_switched_off(self) -> None:
        """With `enabled: false` nothing is looked at."""
        server = Server({"enabled": False})
        server.check({"glassbox": "nonsense"})
        assert 1 == len(server.seen)


class TestProcessInputs:
    def test_a_traced_request_is_remembered(self, server: Server) -> None:
        """Under the id that its client sees; others are not."""
        server.process("cmpl-1-0", {"glassbox": "trace"})
        server.process("cmpl-2-0", {"glassbox": "off"})
        server.process("cmpl-3-0", {"session_id": "x"})
        assert ["cmpl-1-0"] == [f"cmpl-{i}-0" for i in range(4) if f"cmpl-{i}-0" in server.intake.traced]

    def test_the_traceparent_is_added(self, server: Server) -> None:
        """To what the engine gets, not to the caller's parameters."""
        extra_args = {"glassbox": "trace", "other": 1}
        found = server.process("r1", extra_args, trace_headers={"traceparent": TRACEPARENT})
        assert {"glassbox": "trace", "other": 1, "glassbox_traceparent": TRACEPARENT} == found
        assert {"glassbox": "trace", "other": 1} == extra_args

    @pytest.mark.parametrize("extra_args", [None, {"other": 1}, {"glassbox": "off"}])
    def test_only_for_traced_requests(self, server: Server, extra_args: Any) -> None:
        """A request that isn't traced goes to the engine as it came."""
        assert extra_args == server.process("r1", extra_args, trace_headers={"traceparent": TRACEPARENT})

    def test_headers_that_vllm_drops(self, server: Server) -> None:
        """Without vLLM's tracing the traceparent arrives all the same; the next request doesn't get it."""
        traced = {"glassbox": "trace"}
        assert {**traced, "glassbox_traceparent": TRACEPARENT} == server.add(traced, {"traceparent": TRACEPARENT})
        assert traced == server.add(traced, None)
        assert {"other": 1} == server.add({"other": 1}, {"traceparent": TRACEPARENT})

    @pytest.mark.parametrize(
        ("headers", "added"),
        [
            ([(b"traceparent", TRACEPARENT.encode())], {"glassbox_traceparent": TRACEPARENT}),
            ([(b"traceparent", TRACEPARENT.encode()), (b"traceparent", b"00-0-0-01")], {}),
            ([], {}),
        ],
    )
    def test_of_a_request_that_the_rate_chooses(
        self, tmp_path: Path, headers: list[tuple[bytes, bytes]], added: dict[str, str]
    ) -> None:
        """Its client has said nothing to glassbox; its span is in the client's trace all the same."""
        request = http_request.HttpRequest({"headers": headers})
        for rate, expected in ((1, {"glassbox_sampled": True, **added}), (0, {})):
            server = Server({"requests": {"trace_rate": rate}}, run_dir=tmp_path)
            sent = SentRequest("r1", SimpleNamespace(sampling_params=Params(None)))
            assert expected == server.intake.asked_by(sent, request, traced=False)
            assert ("r1" in server.intake.traced) == bool(rate)

    @pytest.mark.parametrize(
        "extra_args",
        [
            {"glassbox": "nonsense"},
            {"glassbox": "trace", "glassbox_traceparent": TRACEPARENT},
            {"glassbox": "trace", "glassbox_spans": ["user=message:0"]},
            {"glassbox": "trace", "glassbox_layers": [30]},
            {"glassbox": "trace", "glassbox_signals": ["cyclic"], "glassbox_layers": [0, 1, 2, 3]},
        ],
    )
    def test_bad_options(self, server: Server, extra_args: Any) -> None:
        """Whatever came another way than through the API ends here, before the engine."""
        with pytest.raises(ClientError):
            server.process("r1", extra_args)
        assert [] == server.seen
        assert "r1" not in server.intake.traced

    def test_too_many_places(self, server: Server) -> None:
        """Signals on demand are for 32 layers x heads, here 4 x 9; the error says how to choose."""
        asked = {"glassbox": "trace", "glassbox_signals": ["cyclic"], "glassbox_layers": [0, 1, 2, 3]}
        with pytest.raises(ClientError, match="at most 32 layers x heads for signals on demand, got 36; choose some"):
            server.process("r1", asked)
        chosen = {**asked, "glassbox_heads": [0, 1, 2, 3, 4, 5, 6, 7]}
        assert chosen == server.process("r1", chosen)

    def test_switched_off(self) -> None:
        """With `enabled: false` nothing is checked, added or remembered."""
        server = Server({"enabled": False})
        extra_args = {"glassbox": "trace"}
        assert extra_args == server.process("r1", extra_args, trace_headers={"traceparent": TRACEPARENT})
        assert "r1" not in server.intake.traced


@dataclass
class EngineRequest:
    """vLLM's EngineCoreRequest."""

    request_id: str
    sampling_params: Any
    cache_salt: str | None = None


class Outputs:
    """vLLM's OutputProcessor: `seen` is what it was given of each token, by request."""

    def __init__(self, server: Server, logprobs_mode: str = "raw_logprobs") -> None:
        self.request_states: dict[str, Any] = {}
        self.seen: list[Any] = []
        server.wrappers._logprobs_mode = logprobs_mode
        self._add = server.wrappers.add_to_outputs(Outputs.original_add)
        self._process = server.wrappers.process_outputs(Outputs.original_process)

    def original_add(self, request: EngineRequest) -> None:
        logprobs = SimpleNamespace(num_logprobs=request.sampling_params.logprobs)
        self.request_states[request.request_id] = SimpleNamespace(logprobs_processor=logprobs)

    def original_process(self, outputs: list[Any]) -> None:
        self.seen += [output.new_logprobs for output in outputs]
        for output in outputs:
            if output.finished:
                self.request_states.pop(output.request_id, None)

    def add(self, request_id: str, extra_args: Any, logprobs: int | None = None, salt: str | None = None) -> Any:
        params = SimpleNamespace(extra_args=extra_args, logprobs=logprobs)
        request = EngineRequest(request_id, params, salt)
        self._add(self, request)
        assert params.logprobs == logprobs, "the answers of one prompt share their parameters"
        return request

    def process(self, request_id: str, logprobs: Any, *, finished: bool = False) -> None:
        found = None if logprobs is None else SimpleNamespace(logprobs=np.array(logprobs))
        self._process(self, [SimpleNamespace(request_id=request_id, new_logprobs=found, finished=finished)])


RAUQ = {"glassbox": "trace", "glassbox_signals": ["rauq"]}


class TestLogprobs:
    """Log-probabilities are asked of the engine for traces, and the client sees those that it asked for."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Server:
        return Server(run_dir=tmp_path)

    def read(self, server: Server, internal_id: str, count: int, client: str | None = None) -> list[float]:
        return read_logprobs(traces_path(server.run_dir), internal_id, client, count).tolist()

    def test_not_asked_by_the_client(self, server: Server) -> None:
        """The engine is asked, and what it gives goes no further; it is there when the request has ended."""
        outputs = Outputs(server)
        assert 0 == outputs.add("a", {**RAUQ, "glassbox_client": "c"}).sampling_params.logprobs
        outputs.process("a", [[-1.0]])
        outputs.process("a", [[-2.0], [-0.5]])  # speculation accepts several
        assert np.isnan(self.read(server, "a", 3, "c")).all()
        outputs.process("a", [[-0.25]], finished=True)
        assert [None, None, None] == outputs.seen
        assert [-1.0, -2.0, -0.5, -0.25] == self.read(server, "a", 4, "c")
        assert not server.intake.logprobs.any

    def test_asked_by_the_client(self, server: Server) -> None:
        """It gets its own; the sampled token's stands first."""
        outputs = Outputs(server)
        assert 3 == outputs.add("a", RAUQ, logprobs=3).sampling_params.logprobs
        outputs.process("a", [[-1.0, -0.1, -2.0, -3.0]], finished=True)
        assert [[-1.0, -0.1, -2.0, -3.0]] == outputs.seen[0].logprobs.tolist()
        found = self.read(server, "a", 2)
        assert (-1.0, True) == (found[0], np.isnan(found[1]))

    @pytest.mark.parametrize(
        ("extra_args", "requests"),
        [
            (None, {}),
            ({"other": 1}, {}),
            ({"glassbox": "off"}, {}),
            ({"glassbox": "trace"}, {}),
            ({"glassbox": "trace", "glassbox_signals": ["spectral"]}, {}),
            (RAUQ, {"opt_in": False}),
            ({"glassbox_sampled": False}, {}),
            ({"glassbox": "trace", "glassbox_signals": {"x": "rauq"}}, {}),
            ({"glassbox": "trace", "glassbox_signals": ["unknown", 3]}, {}),
        ],
    )
    def test_not_wanted(self, extra_args: Any, requests: Any, tmp_path: Path) -> None:
        """Nobody else's output is looked at."""
        server = Server({"requests": requests}, run_dir=tmp_path)
        outputs = Outputs(server)
        assert outputs.add("a", extra_args).sampling_params.logprobs is None
        assert not server.intake.logprobs.any
        outputs.process("a", None, finished=True)
        assert not traces_path(tmp_path).exists()

    def test_aborted(self, server: Server) -> None:
        """What is known of it lies there with the next output of another."""
        outputs = Outputs(server)
        outputs.add("a", RAUQ)
        outputs.add("b", RAUQ)
        outputs.process("a", [[-1.0]])
        del outputs.request_states["a"]
        outputs.process("b", [[-2.0]])
        assert [-1.0] == self.read(server, "a", 1)

    def test_switched_off(self, tmp_path: Path) -> None:
        """With `enabled: false` nothing is asked."""
        server = Server({"enabled": False}, run_dir=tmp_path)
        assert Outputs(server).add("a", RAUQ).sampling_params.logprobs is None

    def test_a_release_that_gives_something_else(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """The answer goes on without them."""
        outputs = Outputs(server)
        outputs.add("a", RAUQ)
        strange = SimpleNamespace(request_id="a", new_logprobs=object(), finished=False)
        outputs._process(outputs, [strange])
        assert [None] == outputs.seen
        assert "Log-probabilities of traced requests are lost: AttributeError" in caplog.text

    def test_logits(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """They are no log-probabilities: nothing is asked, and the log says so."""
        outputs = Outputs(server, "raw_logits")
        assert outputs.add("a", RAUQ).sampling_params.logprobs is None
        assert "Signals have no log-probabilities of tokens: vLLM runs with --logprobs-mode raw_logits" in caplog.text

    def test_old_ones_go(self, tmp_path: Path) -> None:
        """About as many are kept as there are traces."""
        files = LogprobsFiles(tmp_path)
        for i in range(128):
            files.write(str(i), None, [float(-i)], keep=10)
        assert 10 == len(list(tmp_path.iterdir()))
        assert [-127.0] == read_logprobs(tmp_path, "127", None, 1).tolist()


class TestCacheSalt:
    def salted(self, server: Server, extra_args: Any, salt: str | None = None, tokens: int = 5) -> str | None:
        """What the engine gets."""

        def process_inputs(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(
                sampling_params=Params(extra_args), cache_salt=salt, prompt_token_ids=list(range(tokens))
            )

        wrapped = server.wrappers.process_inputs(process_inputs)
        request = wrapped(SimpleNamespace(vllm_config=VLLM_CONFIG), "r1", {}, Params(extra_args))
        return str(request.cache_salt) if request.cache_salt else None

    def test_of_its_own(self, server: Server) -> None:
        """Each request that wants all rows of its prompt has another, beside the one that its client gave."""
        asked = {"glassbox": "trace", "glassbox_prompt": "all"}
        found = [self.salted(server, asked, salt) for salt in (None, None, "tenant")]
        assert 3 == len({one.rpartition("-")[2] for one in found if one})
        assert ["glassbox", "glassbox", "tenantglassbox"] == [one.partition("-")[0] for one in found if one]

    @pytest.mark.parametrize(
        "extra_args",
        [
            None,
            {"glassbox": "trace"},
            {"glassbox": "trace", "glassbox_prompt": "new"},
            {"glassbox": "trace", "glassbox_signals": ["rauq"]},
        ],
    )
    def test_others_keep_theirs(self, server: Server, extra_args: Any) -> None:
        """The prefix cache serves them as ever."""
        assert "tenant" == self.salted(server, extra_args, "tenant")

    def test_where_the_prompt_is_not_measured(self) -> None:
        """It costs its client nothing then."""
        asked = {"glassbox": "trace", "glassbox_prompt": "all"}
        assert self.salted(Server({"requests": {"opt_in": False}}), asked) is None
        assert self.salted(Server({"requests": {"max_prompt_rows": 4}}), asked) is None

    def test_of_requests_that_the_rate_chooses(self, tmp_path: Path) -> None:
        """As the configuration's signals, and its probes, need it: every row, and log-probabilities."""
        chosen, other = {"glassbox_sampled": True}, {"glassbox_sampled": False}
        for signals, salted, asked in ((["spectral"], True, False), (["rauq"], False, True), ([], False, False)):
            intake = Server({"requests": {"trace_rate": 1, "opt_in": False, "signals": signals}}).intake
            assert (salted, asked) == (intake.salt(chosen, 5) is not None, intake.logprobs.wants(chosen))
            assert not intake.logprobs.wants(other)
        probe = probe_samples.write(tmp_path)
        intake = Server({"requests": {"trace_rate": 1}, "probes": [{"file": str(probe)}]}).intake
        assert (None, False) == (intake.salt(chosen, 5), intake.logprobs.wants(chosen))

    def test_of_each_answer(self, server: Server) -> None:
        """The answers of one prompt would find each other's tokens in the cache."""
        outputs = Outputs(server)
        found = [outputs.add(f"{i}_a", {"glassbox": "trace"}, salt="glassbox-1").cache_salt for i in range(2)]
        assert ["glassbox-1-0_a", "glassbox-1-1_a"] == found
        assert "tenant" == outputs.add("b", {"glassbox": "trace"}, salt="tenant").cache_salt


class Anthropic:
    """As vLLM's AnthropicServingMessages: a `system` comes first, a list of blocks becomes a message of each."""

    _merge_inline_system = False

    def _convert_system_message(self, request: Any, messages: list[Any], *, merge_inline_system: bool) -> None:
        messages += [request.system] if request.system else []

    def _convert_messages(self, given: list[Any], messages: list[Any], *, merge_inline_system: bool) -> None:
        for one in given:
            messages += one if isinstance(one, list) else [one]


class TestMessagesApi:
    def create(self, server: Server, spans: Any, messages: list[Any], system: str | None) -> Any:
        """The options of the request as vLLM's own method gets them."""

        async def original(_: Any, request: Any, raw_request: Any = None) -> Any:
            return request.vllm_xargs

        xargs = {"glassbox": "trace", "glassbox_spans": spans} if spans else None
        request = SimpleNamespace(vllm_xargs=xargs, messages=messages, system=system)
        return asyncio.run(server.wrappers.create_messages(original)(Anthropic(), request, None))

    @pytest.mark.parametrize(("system", "first"), [("Be brief.", 1), (None, 0)])
    def test_messages_are_the_clients(self, server: Server, system: str | None, first: int) -> None:
        """The client's first message is not its system prompt; its last one comes after the results of tools."""
        spans = ["first=message:0", "last=message:-1", "own=2:4"]
        found = self.create(server, spans, ["hi", ["a result", "another"], "and now"], system)
        assert found["glassbox_spans"] == ["own=2:4", f"first=message:{first}", f"last=message:{first + 3}"]

    @pytest.mark.parametrize(
        ("span", "message"),
        [
            ("x=message:1", "x must name a message that is one message of the chat too, got 1"),
            ("x=message:3", "x must name one of the 3 messages, 0 to 2, got 3"),
        ],
    )
    def test_messages_without_a_place(self, server: Server, span: str, message: str) -> None:
        """What became several messages, and what is none of the client's."""
        with pytest.raises(ClientError, match=message):
            self.create(server, [span], ["hi", ["a result", "another"], "and now"], "Be brief.")

    @pytest.mark.parametrize("spans", [None, ["own=2:4"]])
    def test_nothing_to_do(self, server: Server, spans: Any) -> None:
        """Without a span by message the request goes on as it came."""
        found = self.create(server, spans, ["hi"], None)
        assert (found or {}).get("glassbox_spans") == spans


class TestNames:
    def ask(self, server: Server, model: str | None, xargs: dict[str, Any] | None) -> Any:
        """What a request's keys are when the API goes on with it."""
        server.check(xargs, model=model)
        return server.seen[-1].vllm_xargs

    def test_as_the_client_called_it(self, server: Server) -> None:
        """A traced request has the name with it; one that gives none, and one that isn't traced, has not."""
        traced = {"glassbox": "trace"}
        assert {**traced, "glassbox_model": "small"} == self.ask(server, "small", traced)
        assert traced == self.ask(server, None, traced)
        assert {"glassbox": "off"} == self.ask(server, "small", {"glassbox": "off"})
        assert self.ask(server, "small", None) is None

    def test_of_a_request_that_the_rate_may_choose(self) -> None:
        """It says nothing to glassbox itself, and may have keys of others."""
        server = Server({"requests": {"trace_rate": 0.5}})
        assert {"glassbox_model": "small"} == self.ask(server, "small", None)
        assert {"other": 1, "glassbox_model": "small"} == self.ask(server, "small", {"other": 1})
        assert {"glassbox": "off"} == self.ask(server, "small", {"glassbox": "off"})

    def test_of_an_api_without_keys(self) -> None:
        """A request that has no place for them is left as it is."""
        server = Server({"requests": {"trace_rate": 0.5}})
        request = SimpleNamespace(model="small")
        asyncio.run(server._check(server, request))
        assert vars(request) == {"model": "small"}

    def test_looked_at_twice(self, server: Server) -> None:
        """An API that hands a request to another one checks it again."""
        named = self.ask(server, "small", {"glassbox": "trace"})
        assert named == self.ask(server, "small", named)
        assert named == server.process("r1", named)

    def test_not_a_clients_to_give(self, server: Server) -> None:
        """It would be taken for what glassbox found."""
        with pytest.raises(ClientError, match="'glassbox_model' must be one of glassbox, "):
            server.check({"glassbox": "trace", "glassbox_model": "other"}, model="small")

    def test_switched_off(self) -> None:
        """With `enabled: false` nothing is added."""
        traced = {"glassbox": "trace"}
        assert traced == self.ask(Server({"enabled": False}), "small", traced)


class Beam:
    """As vLLM's BeamSearchSequence."""

    def __init__(self, orig_prompt: dict[str, Any], tokens: list[int]) -> None:
        self.orig_prompt, self.tokens = orig_prompt, tokens

    def get_prompt(self) -> dict[str, Any]:
        return {"type": "token", "prompt_token_ids": self.tokens}


class TestBeams:
    @pytest.fixture
    def beams(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
        monkeypatch.setattr(Beam, "get_prompt", server.wrappers.get_prompt(Beam.get_prompt))
        return server

    @pytest.mark.parametrize("encoder", [False, True])
    def test_where_the_clients_prompt_ends(self, beams: Server, encoder: bool) -> None:
        """Each request of a search says it, also of an encoder-decoder's."""
        own: dict[str, Any] = {"type": "token", "prompt_token_ids": [1, 2, 3]}
        prompt = {"type": "enc_dec", "decoder_prompt": own} if encoder else own
        found = beams.process("r-beam-0", None, prompt=Beam(prompt, [1, 2, 3]).get_prompt())
        assert {"glassbox_beam_prompt": 3} == found
        found = beams.process("r-beam-0", {"other": 1}, prompt=Beam(prompt, [1, 2, 3, 8, 9]).get_prompt())
        assert {"other": 1, "glassbox_beam_prompt": 3} == found

    def test_not_a_clients_to_give(self, server: Server) -> None:
        """It would move the client's own prompt."""
        with pytest.raises(ClientError, match="'glassbox_beam_prompt' must be one of glassbox, "):
            server.process("r1", {"glassbox_beam_prompt": 1})

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With `enabled: false` the engine gets what it would get without glassbox."""
        server = Server({"enabled": False})
        monkeypatch.setattr(Beam, "get_prompt", server.wrappers.get_prompt(Beam.get_prompt))
        prompt = Beam({"type": "token", "prompt_token_ids": [1]}, [1, 2]).get_prompt()
        assert server.process("r-beam-0", None, prompt=prompt) is None


class TestRenderChatRequest:
    def render(self, server: Server, monkeypatch: pytest.MonkeyPatch, spans: Any, result: Any = None) -> Any:
        """The request after the wrapped method; prompts are the texts' characters, one token each."""

        class Chat:
            def __init__(self, _serving: Any, request: Any, _rendered: Any) -> None:
                self.prompt_token_ids = [ord(c) for c in "".join(f"[{m['content']}]" for m in request.messages)]

            async def render(self, messages: list[Any]) -> str:
                return "".join(f"[{m['content']}]" for m in messages)

            async def tokenize(self, text: str) -> Any:
                return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]

        monkeypatch.setattr(vllm_server, "Chat", Chat)
        messages = [{"role": "user", "content": "abc"}, {"role": "user", "content": "de"}]
        # As `_check_model` leaves them.
        xargs = {"glassbox": "trace", "glassbox_model": "small"} | ({"glassbox_spans": spans} if spans else {})
        request = SimpleNamespace(vllm_xargs=xargs, messages=messages, model="small")

        async def original(_: Any, request: Any) -> Any:
            return ([], []) if result is None else result

        answer = asyncio.run(server.wrappers.render_chat_request(original)(server, request))
        assert answer == (([], []) if result is None else result)
        return request

    def test_messages_become_ranges(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """`[abc][de]`: the second message is 6:8; a span of positions stays."""
        request = self.render(server, monkeypatch, ["last=message:-1", "start=0:2", "first=message:0"])
        assert ["start=0:2", "last=6:8", "first=1:4"] == request.vllm_xargs["glassbox_spans"]
        assert "small" == request.vllm_xargs["glassbox_model"]

    def test_an_error_is_the_clients(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """An index out of range."""
        with pytest.raises(ClientError, match="must name one of the 2 messages, 0 to 1, got 2"):
            self.render(server, monkeypatch, ["x=message:2"])

    @pytest.mark.parametrize("spans", [None, ["a=1:2"]])
    def test_nothing_to_do(self, server: Server, monkeypatch: pytest.MonkeyPatch, spans: Any) -> None:
        """Without a span by message the keys stay as they are."""
        assert spans == self.render(server, monkeypatch, spans).vllm_xargs.get("glassbox_spans")

    def test_vllms_own_error(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is the answer."""
        self.render(server, monkeypatch, ["x=message:0"], result="an ErrorResponse")


class Client:
    """Of an engine."""


class TestFrontEnds:
    """Those behind which nothing shows at /metrics."""

    WARNING = "shows nowhere. Set export.http.port in glassbox.yaml"

    def warnings(self, server: Server, caplog: pytest.LogCaptureFixture, rust: bool = False) -> list[str]:
        """What is said when the client of an engine is made twice in this process."""

        def original(engine: Any) -> None:
            engine.observability_config = SimpleNamespace(otlp_traces_endpoint=None)

        wrapper = server.wrappers.rust_front_end if rust else server.wrappers.engine_init
        logger = logging.getLogger("glassbox")
        logging.getLogger(intake_module.__name__).__dict__.pop("_glassbox_logged_once", None)
        logger.addHandler(caplog.handler)
        try:
            for _ in range(2):
                wrapper(original)(Client())
        finally:
            logger.removeHandler(caplog.handler)
        # Records, since a logger that propagates tells two handlers of one.
        records = {id(record): record.getMessage() for record in caplog.records}
        return [message for message in records.values() if self.WARNING in message]

    @pytest.mark.parametrize(
        ("module", "said"),
        [
            ("vllm.entrypoints.launchers.grpc_server", "vLLM's gRPC server has no /metrics"),
            ("vllm.entrypoints.grpc_server", "vLLM's gRPC server has no /metrics"),
            ("dynamo.vllm", "Dynamo hands on vLLM's own metrics alone"),
        ],
    )
    def test_of_python(
        self,
        server: Server,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        module: str,
        said: str,
    ) -> None:
        """One warning names the key that helps."""
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        (warning,) = self.warnings(server, caplog)
        assert warning.startswith(f"{said}: what glassbox measures")

    def test_rust(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """It is started by a process that makes no client of an engine."""
        (warning,) = self.warnings(server, caplog, rust=True)
        assert warning.startswith("vLLM's Rust front end answers /metrics without what Python processes measure")

    def test_vllms_own(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """Its /metrics shows everything: nothing is said."""
        assert [] == self.warnings(server, caplog)

    @pytest.mark.parametrize(
        "config",
        [
            {"enabled": False},
            {"export": {"prometheus": {"port": 9464}}},
            {"export": {"otel": {"enabled": True}}},
            {"export": {"jsonl": {"path": "somewhere"}}},
        ],
    )
    def test_shown_elsewhere(self, caplog: pytest.LogCaptureFixture, config: dict[str, Any]) -> None:
        """Or switched off."""
        assert [] == self.warnings(Server(config), caplog, rust=True)

    @pytest.mark.parametrize(
        "config",
        [
            {"export": {"otel": {"enabled": True, "metrics": False}}},
            {"export": {"prometheus": {"port": 9464, "enabled": False}}},
        ],
    )
    def test_not_shown_elsewhere(self, caplog: pytest.LogCaptureFixture, config: dict[str, Any]) -> None:
        """A port that is switched off is none, and spans are no metrics."""
        assert self.warnings(Server(config), caplog, rust=True)


class TestTracedRequests:
    def test_it_is_bounded(self) -> None:
        """The oldest id is forgotten first."""
        traced = TracedRequests()
        for number in range(MAX_REMEMBERED + 1):
            traced.add(str(number))
        assert "0" not in traced
        assert "1" in traced
        assert str(MAX_REMEMBERED) in traced


class TestServes:
    """Which engines an API server sends its requests to."""

    class Engine:
        """As much of AsyncLLM as is needed."""

        observability_config = SimpleNamespace(otlp_traces_endpoint=None)

        def __init__(self, ranks: list[int] | None) -> None:
            self.engine_core = SimpleNamespace() if ranks is None else SimpleNamespace(engine_ranks_managed=ranks)

    def told(self, monkeypatch: pytest.MonkeyPatch, ranks: list[int] | None) -> tuple[Any, EngineLabels]:
        found: list[EngineLabels] = []
        started: list[int] = []
        intake = Intake(GlassboxConfig, Path("unused"), lambda: started.append(len(found)), found.append)
        monkeypatch.setattr(self.Engine, "__init__", Wrappers(intake).engine_init(self.Engine.__init__))
        engine = self.Engine(ranks)
        (labels,) = found
        assert started == [0], "before there are engines to tell of"
        return engine, labels

    def test_those_of_vllms_own_metrics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As labels, and as they are now: elastic scaling changes them."""
        engine, labels = self.told(monkeypatch, [2, 3])
        assert labels() == {"2", "3"}
        engine.engine_core.engine_ranks_managed = [2]
        assert labels() == {"2"}

    def test_an_engine_in_the_same_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has no number there, and is the only one."""
        engine, labels = self.told(monkeypatch, None)
        assert labels() is None
        assert engine

    def test_an_engine_that_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is not kept alive to be asked."""
        engine, labels = self.told(monkeypatch, [0])
        del engine
        gc.collect()
        assert labels() is None


class TestInstall:
    def test_undo(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """The methods are wrapped, and afterwards the very objects of before."""
        processor = ModuleType("glassbox_test_processor")

        class InputProcessor:
            def process_inputs(self) -> None: ...

        processor.InputProcessor = InputProcessor  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, processor.__name__, processor)
        patch = Patch(processor.__name__, "InputProcessor", "process_inputs", "process_inputs")
        monkeypatch.setattr(vllm_server, "INTAKE_PATCHES", (patch,))
        before = InputProcessor.__dict__["process_inputs"]
        undo = intake_module.install(GlassboxConfig, tmp_path, lambda: None, lambda _: None)
        assert before is not InputProcessor.__dict__["process_inputs"]
        undo()
        assert before is InputProcessor.__dict__["process_inputs"]
