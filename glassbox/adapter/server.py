"""What glassbox touches of vLLM's API server: `runner.py`'s counterpart for that process.

Owns the wrappers of vLLM's methods, which hand what they are given to an `Intake` in its own words, and how a chat is
rendered and tokenized as the server does it. All imports are inside functions: importing this module loads no vLLM.
"""

import asyncio
import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Protocol, TypeGuard

from glassbox.adapter import http_request
from glassbox.adapter.front_end import RUST, FrontEnd, front_end_of_process
from glassbox.adapter.http_reply import Reply
from glassbox.adapter.http_request import HttpRequest
from glassbox.adapter.internals import Feature, feature_of, lacks, line
from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.patch import patch_method
from glassbox.adapter.protocols import VllmConfig
from glassbox.adapter.release import vllm_version
from glassbox.adapter.running_requests import RunningRequests
from glassbox.core.logs import get_logger, log_once
from glassbox.core.trace_options import (
    BEAM_PROMPT_KEY,
    CHOICE_KEY,
    CLIENT_KEY,
    MODEL_KEY,
    SAMPLED_KEY,
    OptionError,
)

logger = get_logger(__name__)

ExtraArgs = Mapping[str, Any]
# Returns the values of the label `engine` of some engines; None is all.
EngineLabels = Callable[[], frozenset[str] | None]


@dataclass(frozen=True)
class Patch:
    """A method of vLLM and the method of `Wrappers` that wraps it."""

    module: str
    cls: str
    method: str
    wrapper: str


INTAKE_PATCHES: Final = (
    Patch("vllm.entrypoints.serve.engine.serving", "BaseServing", "_check_model", "check_model"),
    Patch(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat",
        "render_chat_request",
        "render_chat_request",
    ),
    Patch("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages", "create_messages"),
    Patch("vllm.entrypoints.generate.beam_search.utils", "BeamSearchSequence", "get_prompt", "get_prompt"),
    Patch("vllm.v1.engine.async_llm", "AsyncLLM", "add_request", "add_request"),
    Patch("vllm.v1.engine.async_llm", "AsyncLLM", "__init__", "engine_init"),
    Patch("vllm.v1.engine.llm_engine", "LLMEngine", "__init__", "engine_init"),
    Patch("vllm.v1.utils", "RustFrontendProcessManager", "__init__", "rust_front_end"),
    Patch("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", "process_inputs"),
    Patch("vllm.v1.engine.output_processor", "OutputProcessor", "add_request", "add_to_outputs"),
    Patch("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs", "process_outputs"),
)

# Of vLLM's logprobs_mode, those that are log-probabilities.
_LOGPROBS: Final = ("raw_logprobs", "processed_logprobs")
# Begins what glassbox adds to a request's cache salt.
_SALT: Final = "glassbox-"


@dataclass(frozen=True)
class ServedTo:
    """Who reaches vLLM's API server.

    Attributes:
        api_keys: any of which lets in; empty: everybody gets in.
        host: it listens on.
    """

    api_keys: tuple[str, ...]
    host: str


def served_to(args: Any) -> ServedTo:
    """What the arguments of `vllm serve` say, as vLLM reads them (`init_entrypoints_middleware`)."""
    named = args.api_key or [os.environ.get("VLLM_API_KEY")]
    keys = [named] if isinstance(named, str) else named
    # A socket in the file system is guarded by its mode.
    host = "localhost" if getattr(args, "uds", None) else args.host or "0.0.0.0"
    return ServedTo(tuple(key for key in keys if key), host)


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Turns an `OptionError` into vLLM's error for HTTP 400.

    Not any ValueError will do: `AsyncLLM.generate` makes HTTP 500 of those that are no VLLMClientError.
    """
    try:
        yield
    except OptionError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def config_of(serving: Any) -> VllmConfig | None:
    """The VllmConfig behind a serving class; None if it has no engine (rendering servers)."""
    return getattr(getattr(serving, "engine_client", None), "vllm_config", None)


def model_shape(vllm_config: VllmConfig | None) -> tuple[int, int] | None:
    """Numbers of attention layers and of query heads of the whole model; None if they can't be told."""
    if vllm_config is None:
        return None
    try:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads = model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size
        return int(model.get_total_num_hidden_layers()), int(heads)
    except AttributeError:
        return None


def tracer_provider() -> Any:
    """The tracer provider of this process, as `init_tracer` (vllm/tracing/otel.py) has set it."""
    from opentelemetry import trace

    return trace.get_tracer_provider()


def engines_of(engine: Any) -> EngineLabels:
    """What tells the labels `engine` of those that an AsyncLLM or LLMEngine sends requests to.

    They are those of vLLM's own metrics in this process, and may change (elastic scaling). None if it can't be told, as
    when the engine runs in this process: it is the only one then.
    """
    client = weakref.ref(engine)

    def read() -> frozenset[str] | None:
        ranks = getattr(getattr(client(), "engine_core", None), "engine_ranks_managed", None)
        return None if ranks is None else frozenset(map(str, ranks))

    return read


class Chat:
    """A chat request as the server renders it.

    Attributes:
        prompt_token_ids: that the engine gets, None if the prompt isn't (only) tokens.

    Args:
        serving: the OpenAIServingChat.
        request: the ChatCompletionRequest.
        rendered: what `render_chat_request` returned: the conversation, and the engine's inputs.
    """

    def __init__(self, serving: Any, request: Any, rendered: tuple[Any, Any]) -> None:
        self._online = serving.online_renderer
        self._request = request
        inputs = rendered[1]
        only = inputs[0] if len(inputs) == 1 else {}
        self.prompt_token_ids: Sequence[int] | None = only["prompt_token_ids"] if only.get("type") == "token" else None

    async def render(self, messages: list[Any]) -> str | None:
        """The text that the chat template makes of messages; None for models that get tokens without a text."""
        online, request = self._online, self._request
        if online.use_harmony:
            return None
        hidden = request.tool_choice == "none" and online.exclude_tools_when_tool_choice_none
        tools = None if request.tools is None or hidden else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(online.chat_template, online.chat_template_content_format).with_defaults(
            {**online.default_chat_template_kwargs, "tools": tools, "tokenize": False}
        )
        _, prompt = await online.renderer.render_messages_async(messages, params)
        text = prompt.get("prompt")
        return text if isinstance(text, str) else None

    async def tokenize(self, text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]] | None:
        """Tokens of a text and their ranges of characters; None if the tokenizer can't tell them."""
        tokenizer = self._online.renderer.get_tokenizer()
        if not getattr(tokenizer, "is_fast", False):
            return None
        encoding = await asyncio.to_thread(
            tokenizer,
            text,
            truncation=False,
            add_special_tokens=self._request.add_special_tokens,
            return_offsets_mapping=True,
        )
        return encoding["input_ids"], encoding["offset_mapping"]


class SentRequest:
    """A request that goes to the engine, which gives it its id only then.

    Attributes:
        request_id: the external one.
        client: who sent it, None if that isn't known, or not yet.

    Args:
        request: the EngineCoreRequest.
    """

    def __init__(self, request_id: str, request: Any, client: str | None = None) -> None:
        self.request_id, self.client = request_id, client
        # Noted now: the last sample is made of the request itself.
        self._request, self._samples = request, int(request.sampling_params.n)

    def internal_ids(self) -> list[str]:
        """vLLM's own ids, one of each sample; empty if it has none yet, or they can't be told."""
        known: str = getattr(self._request, "request_id", "")
        if self._samples == 1:
            return [known] if known else []
        last = f"{self._samples - 1}_"
        whole = known.removeprefix(last)
        return [f"{number}_{whole}" for number in range(self._samples)] if known.startswith(last) else []


class Intake(Protocol):
    """Who decides what becomes of a request; all methods that take one are called in the API server's event loop."""

    def is_for_us(self, extra_args: object) -> TypeGuard[ExtraArgs]:
        """Whether a request says anything to glassbox."""

    def check(self, extra_args: ExtraArgs, shape: tuple[int, int] | None, *, is_chat: bool) -> None:
        """Look at the options of a request as its client gave them.

        Args:
            extra_args: the client's `vllm_xargs`.
            shape: numbers of layers and of heads of the model, None if they are not known.
            is_chat: whether the request has messages.

        Raises:
            OptionError: they are bad.
        """

    def with_model(self, extra_args: object, name: str) -> ExtraArgs | None:
        """A request's keys and the name by which it asks for its model, for the worker; None if it needn't know."""

    def wants_chat(self, extra_args: ExtraArgs) -> bool:
        """Whether `resolve` is to be asked: some of its spans are messages."""

    def place(self, extra_args: ExtraArgs, places: Sequence[int | None]) -> ExtraArgs:
        """The options with spans by message as a chat counts them, of a request that an API has made a chat of.

        Args:
            extra_args: spans by message as the client counts its messages.
            places: of each of these its index in the chat; None if it is not one message there.

        Raises:
            OptionError: they are bad, or one can't be placed.
        """

    async def resolve(self, extra_args: ExtraArgs, messages: Sequence[Any], chat: Chat) -> ExtraArgs:
        """The options with spans by message turned into ranges of tokens.

        Raises:
            OptionError: one can't be found.
        """

    def note_traceparent(self, traceparent: str | None) -> None:
        """Remember the trace context of the request that this task adds, which vLLM drops if it does not trace."""

    def admit(self, extra_args: ExtraArgs, shape: tuple[int, int] | None) -> bool:
        """Whether a request that goes to the engine is to be traced.

        Raises:
            OptionError: its options are bad.
        """

    def begin(self, request_id: str, traceparent: str | None) -> ExtraArgs:
        """A request that `admit` let in has an id; returns what its worker gets besides its options."""

    def asked_by(self, sent: SentRequest, request: HttpRequest | None, traced: bool) -> ExtraArgs:
        """What the worker gets to know of who asked for a request, and whether the trace rate chose it; empty if it
        needn't know.

        Args:
            sent: the request.
            request: over HTTP by which it came, None if by none.
            traced: whether `admit` said so.
        """

    def wants_answer(self, extra_args: ExtraArgs) -> bool:
        """Whether a request that `admit` let in is to be told of its attention with its answer."""

    def sent(self, request: SentRequest, reply: Reply) -> None:
        """Such a request goes to the engine; `reply` answers who asked for it."""

    def salt(self, extra_args: ExtraArgs, prompt_len: int | None) -> str | None:
        """What is added to the cache salt of a request that is traced, so that nothing of its prompt comes from the
        prefix cache; None if that may.

        Args:
            extra_args: as the worker gets them.
            prompt_len: tokens; None if they are not known.
        """

    @property
    def logprobs(self) -> "Logprobs":
        """Where the log-probabilities of tokens go."""

    def begin_beam(self, prompt_len: int) -> ExtraArgs:
        """What the worker gets with a request of a beam search, whose client sent a prompt of that length."""

    def tell_front_end(self, front_end: FrontEnd) -> None:
        """The server's requests come through a front end that shows no metrics of glassbox's."""

    def watch_spans(self, endpoint: str) -> None:
        """vLLM's tracer provider is there, and sends to this endpoint."""

    def starts(self) -> None:
        """This process is about to start, or to wait for, engines that it will send requests to."""

    def serves(self, engines: EngineLabels) -> None:
        """This process sends requests to these engines (see `engines_of`)."""

    def works_at(self, requests: RunningRequests) -> None:
        """Requests of this process may be ended here."""


class Logprobs(Protocol):
    """See processes/api_server/logprobs.py."""

    @property
    def any(self) -> bool: ...

    def wants(self, extra_args: object) -> bool: ...

    def begin(self, internal_id: str, extra_args: Mapping[str, Any]) -> None: ...

    def __contains__(self, internal_id: object) -> bool: ...

    def add(self, internal_id: str, logprobs: Sequence[float]) -> None: ...

    def end_all_but(self, running: Callable[[str], bool]) -> None: ...


class Wrappers:
    """Makes the wrapper of each method; which one is named by its patch.

    Args:
        intake: is asked.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        # What the engines of this process say of their log-probabilities; None until one is known.
        self._logprobs_mode: str | None = None

    def check_model(self, original: Any) -> Any:
        """Around `BaseServing._check_model`, the first that every API does with a request: bad options end here.

        Later would be too late for a streamed answer, whose status is sent before the engine is asked. Nor does the
        engine hear of the name that the client gave the model.
        """

        @functools.wraps(original)
        def _check_model(serving: Any, request: Any) -> Any:
            extra_args, model = getattr(request, "vllm_xargs", None), getattr(request, "model", None)
            if self._intake.is_for_us(extra_args):
                is_chat = isinstance(getattr(request, "messages", None), list)
                with client_errors():
                    self._intake.check(
                        without_model(extra_args, model), model_shape(config_of(serving)), is_chat=is_chat
                    )
            if isinstance(model, str) and hasattr(request, "vllm_xargs"):
                named = self._intake.with_model(extra_args, model)
                if named is not None:
                    request.vllm_xargs = named
            return original(serving, request)

        return _check_model

    def render_chat_request(self, original: Any) -> Any:
        """Around `OpenAIServingChat.render_chat_request`: spans by message become token ranges in the request."""

        @functools.wraps(original)
        def render_chat_request(serving: Any, request: Any) -> Any:
            if self._intake.is_for_us(request.vllm_xargs) and self._intake.wants_chat(request.vllm_xargs):
                return self._render(original, serving, request)
            return original(serving, request)

        return render_chat_request

    async def _render(self, original: Any, serving: Any, request: Any) -> Any:
        result = await original(serving, request)
        if not isinstance(result, tuple):  # an error, which is the answer
            return result
        with client_errors():
            chat = Chat(serving, request, result)
            given = without_model(request.vllm_xargs, request.model)
            request.vllm_xargs |= await self._intake.resolve(given, request.messages, chat)
        return result

    def create_messages(self, original: Any) -> Any:
        """Around `AnthropicServingMessages.create_messages`, which makes a chat of what it is given.

        Its `system` becomes the first message there, and tool results become messages of their own.
        """

        @functools.wraps(original)
        async def create_messages(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            xargs = getattr(request, "vllm_xargs", None)
            if self._intake.is_for_us(xargs) and self._intake.wants_chat(xargs):
                with client_errors():
                    request.vllm_xargs = self._intake.place(xargs, chat_places(serving, request))
            return await original(serving, request, *args, **kwargs)

        return create_messages

    def get_prompt(self, original: Any) -> Any:
        """Around `BeamSearchSequence.get_prompt`: beam search makes a request of each beam's every token.

        Its prompt holds what was generated so far, which nothing else tells from the client's own tokens.
        """

        @functools.wraps(original)
        def get_prompt(beam: Any) -> Any:
            prompt = original(beam)
            # A prompt of another kind (embeddings) is served as it is; its rows are then those of a prompt.
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                own = beam.orig_prompt
                prompt[BEAM_PROMPT_KEY] = len(own.get("decoder_prompt", own)["prompt_token_ids"])
            return prompt

        return get_prompt

    def add_request(self, original: Any) -> Any:
        """Around `AsyncLLM.add_request`, which is given the trace headers."""

        @functools.wraps(original)
        def add_request(engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            if self._intake.is_for_us(getattr(params, "extra_args", None)):
                self._intake.note_traceparent(_traceparent(kwargs))
            return original(engine, request_id, prompt, params, *args, **kwargs)

        return add_request

    def process_inputs(self, original: Any) -> Any:
        """Around `InputProcessor.process_inputs`, through which every request passes, also those of `LLM`.

        Here the worker gets what only the API server knows. The caller's parameters are left as they are.
        """

        @functools.wraps(original)
        def process_inputs(processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra_args: Any = getattr(params, "extra_args", None)
            traced = False
            if self._intake.is_for_us(extra_args):
                with client_errors():
                    traced = self._intake.admit(extra_args, model_shape(processor.vllm_config))
            request = original(processor, request_id, prompt, params, *args, **kwargs)
            beam_prompt = prompt.get(BEAM_PROMPT_KEY) if isinstance(prompt, dict) else None
            added: ExtraArgs = {}
            http = http_request.current()
            if beam_prompt is not None:
                added = self._intake.begin_beam(beam_prompt)
            elif traced:
                added = self._intake.begin(request_id, _traceparent(kwargs))
            if beam_prompt is None and request.sampling_params is not None and not _says_off(extra_args):
                sent = SentRequest(request_id, request)
                added = {**added, **self._intake.asked_by(sent, http, traced)}
                sent.client = added.get(CLIENT_KEY)
                reply = None if http is None else http.reply
                if traced and reply is not None and self._intake.wants_answer(extra_args) and _has(Feature.ANSWERS):
                    self._intake.sent(sent, reply)
            if added and request.sampling_params is not None:
                request.sampling_params.extra_args = {**(extra_args or {}), **added}
            if (traced or added.get(SAMPLED_KEY)) and beam_prompt is None:
                tokens = getattr(request, "prompt_token_ids", None)
                told = request.sampling_params.extra_args if added else extra_args
                salt = self._intake.salt(told, None if tokens is None else len(tokens))
                if salt is not None:
                    request.cache_salt = f"{request.cache_salt or ''}{_SALT}{salt}"
            model_config = getattr(processor.vllm_config, "model_config", None)
            self._logprobs_mode = getattr(model_config, "logprobs_mode", None)
            return request

        return process_inputs

    def add_to_outputs(self, original: Any) -> Any:
        """Around `OutputProcessor.add_request`, after which the request goes to the engine.

        What is asked of the engine from here on is no part of what this process tells the client. The answers of one
        prompt (n > 1) are requests of their own here, and each gets a salt of its own.
        """

        @functools.wraps(original)
        def add_request(processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(processor, request, *args, **kwargs)
            params, salt = request.sampling_params, request.cache_salt
            extra_args = getattr(params, "extra_args", None)
            if not extra_args:
                return result
            if salt and _SALT in salt:
                request.cache_salt = f"{salt}-{request.request_id}"
            wanted = self._intake.logprobs
            if wanted.wants(extra_args):
                if self._logprobs_mode in _LOGPROBS:
                    wanted.begin(request.request_id, extra_args)
                    if params.logprobs is None:
                        request.sampling_params = copy(params)  # the answers of one prompt share them
                        request.sampling_params.logprobs = 0
                else:
                    log_once(
                        logger,
                        logging.WARNING,
                        "logprobs_mode",
                        "Signals have no log-probabilities of tokens: vLLM runs with --logprobs-mode %s, which gives "
                        "logits. Start it with raw_logprobs",
                        self._logprobs_mode,
                    )
            return result

        return add_request

    def process_outputs(self, original: Any) -> Any:
        """Around `OutputProcessor.process_outputs`: what was asked of the engine for traces is taken out."""

        @functools.wraps(original)
        def process_outputs(processor: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            wanted = self._intake.logprobs
            if not wanted.any:
                return original(processor, engine_core_outputs, *args, **kwargs)
            taken = []
            for output in engine_core_outputs:
                found, state = output.new_logprobs, processor.request_states.get(output.request_id)
                if found is None or state is None or output.request_id not in wanted:
                    continue
                taken.append((output.request_id, found))
                if state.logprobs_processor.num_logprobs is None:  # the client asked for none
                    output.new_logprobs = None
            result = original(processor, engine_core_outputs, *args, **kwargs)
            try:
                for request_id, found in taken:
                    # Of each token the sampled one's stands first.
                    wanted.add(request_id, found.logprobs[:, 0].tolist())
                wanted.end_all_but(processor.request_states.__contains__)
            except Exception as error:  # what is served goes on
                log_once(
                    logger,
                    logging.ERROR,
                    "logprobs",
                    "Log-probabilities of traced requests are lost: %s: %s",
                    type(error).__name__,
                    error,
                )
            return result

        return process_outputs

    def engine_init(self, original: Any) -> Any:
        """Around the `__init__` of an engine's client: a tracer provider is made in it, and its engines are found."""

        @functools.wraps(original)
        def __init__(engine: Any, *args: Any, **kwargs: Any) -> None:
            self._intake.starts()
            original(engine, *args, **kwargs)
            self._intake.serves(engines_of(engine))
            # Not of LLM, whose caller alone could end its requests.
            if not lacks(Feature.ABORTS) and hasattr(engine, "output_handler"):
                self._intake.works_at(RunningRequests(engine))
            front_end = front_end_of_process()
            if front_end is not None:
                self._intake.tell_front_end(front_end)
            endpoint = engine.observability_config.otlp_traces_endpoint
            if endpoint is not None:
                self._intake.watch_spans(endpoint)

        return __init__

    def rust_front_end(self, original: Any) -> Any:
        """Around `RustFrontendProcessManager.__init__`, which starts vLLM's Rust front end beside the engines."""

        @functools.wraps(original)
        def __init__(manager: Any, *args: Any, **kwargs: Any) -> None:
            original(manager, *args, **kwargs)
            self._intake.tell_front_end(RUST)

        return __init__


def chat_places(serving: Any, request: Any) -> list[int | None]:
    """Where the messages of an AnthropicMessagesRequest stand in its chat; None for one that is not one there."""
    merge = {"merge_inline_system": serving._merge_inline_system}
    before: list[Any] = []
    serving._convert_system_message(request, before, **merge)
    at, places = len(before), list[int | None]()
    for message in request.messages:
        converted: list[Any] = []
        serving._convert_messages([message], converted, **merge)
        places.append(at if len(converted) == 1 else None)
        at += len(converted)
    return places


def without_model(extra_args: ExtraArgs, model: object) -> ExtraArgs:
    """A client's keys: without the model's name, if it was added when an API looked at the request before."""
    added = extra_args.get(MODEL_KEY)
    return extra_args if added is None or added != model else {k: v for k, v in extra_args.items() if k != MODEL_KEY}


def _says_off(extra_args: object) -> bool:
    return isinstance(extra_args, Mapping) and extra_args.get(CHOICE_KEY) == "off"


def _traceparent(kwargs: Mapping[str, Any]) -> str | None:
    traceparent: str | None = (kwargs.get("trace_headers") or {}).get("traceparent")
    return traceparent


def wrap_intake(intake: Intake) -> Callable[[], None]:
    """Wrap vLLM's methods in this process, as soon as their modules are imported; returns the undo."""
    wrappers, patches = Wrappers(intake), LatePatches()
    for patch in INTAKE_PATCHES:
        patches.add(patch.module, functools.partial(_wrap, patch, getattr(wrappers, patch.wrapper)))
    return patches.remove


def _wrap(patch: Patch, make: Callable[[Any], Any], module: ModuleType) -> Callable[[], None]:
    feature = feature_of(f"{patch.module}.{patch.cls}.{patch.method}")
    if feature is not None and not _has(feature):
        return lambda: None
    return patch_method(getattr(module, patch.cls), patch.method, make)


def _has(feature: Feature) -> bool:
    """Whether this vLLM has what a feature needs; says so once if it hasn't."""
    if lacks(feature):
        log_once(logger, logging.WARNING, feature.name, "%s", line(feature, vllm_version()))
        return False
    return True
