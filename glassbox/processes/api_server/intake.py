"""What the API server does with a request's `glassbox` keys, before the request reaches the engine.

Owns the checks that give a client HTTP 400, the resolving of spans by message, what is added to a traced request for
the worker, and telling the exporter of its `llm_request` span. The rules of the keys are `core/trace_options.py`'s;
which methods of vLLM are wrapped, `adapter/server.py`'s. A request without such keys passes through untouched.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from glassbox.adapter import server
from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.patch import patch_method
from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger
from glassbox.core.trace_options import (
    HEADS_KEY,
    LAYERS_KEY,
    PREFIX,
    SPANS_KEY,
    TRACEPARENT_KEY,
    ClientChoice,
    OptionError,
    Span,
    parse_options,
)
from glassbox.measure.sampling import is_sampled_request
from glassbox.processes.api_server import message_spans
from glassbox.processes.api_server.llm_span_watcher import LlmSpanWatcher, watch

logger = get_logger(__name__)

# The traceparent of the request that is being added, by a task of its own: vLLM drops the headers if it does not trace.
_traceparent: ContextVar[str | None] = ContextVar("glassbox_traceparent", default=None)
# Traced requests that may not have ended yet: enough for any server, and bounded if their ends are never told.
MAX_REMEMBERED: Final = 4096


def has_keys(extra_args: object) -> bool:
    """True if a request says anything to glassbox."""
    return isinstance(extra_args, Mapping) and any(str(key).startswith(PREFIX) for key in extra_args)


class TracedRequests:
    """External ids of the requests that asked for a trace, the newest `MAX_REMEMBERED`; not thread-safe."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, request_id: str) -> None:
        self._ids[request_id] = None
        if len(self._ids) > MAX_REMEMBERED:
            self._ids.popitem(last=False)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._ids


class Intake:
    """The wrappers of vLLM's methods.

    Attributes:
        traced: requests that asked for a trace.

    Args:
        config: returns the configuration of the moment; nothing is done while it says `enabled: false`.
        run_dir: of the server.
    """

    def __init__(self, config: Callable[[], GlassboxConfig], run_dir: Path) -> None:
        self._config = config
        self._run_dir = run_dir
        self._unwatch: list[Callable[[], None]] = []
        self.traced = TracedRequests()

    def _is_for_us(self, extra_args: object) -> bool:
        return bool(extra_args) and has_keys(extra_args) and self._config().enabled

    def check_model(self, original: Any) -> Any:
        """Around `BaseServing._check_model`, the first that every API does with a request: bad options end here.

        Later would be too late for a streamed answer, whose status is sent before the engine is asked.
        """

        @functools.wraps(original)
        def _check_model(serving: Any, request: Any) -> Any:
            extra_args = getattr(request, "vllm_xargs", None)
            if self._is_for_us(extra_args):
                with server.client_errors():
                    choice = parse_options(extra_args, from_client=True)
                    check_model_has(choice, server.model_shape(server.config_of(serving)))
                    if choice.message_spans and not isinstance(getattr(request, "messages", None), list):
                        raise OptionError(
                            f"{SPANS_KEY} by message are for chat completions, got "
                            f"{choice.message_spans[0].name}=message:{choice.message_spans[0].message}; give token "
                            "positions (name=start:end) instead"
                        )
            return original(serving, request)

        return _check_model

    def render_chat_request(self, original: Any) -> Any:
        """Around `OpenAIServingChat.render_chat_request`: spans by message become token ranges in the request."""

        @functools.wraps(original)
        def render_chat_request(serving: Any, request: Any) -> Any:
            if self._is_for_us(request.vllm_xargs) and SPANS_KEY in request.vllm_xargs:
                return self._render(original, serving, request)
            return original(serving, request)

        return render_chat_request

    async def _render(self, original: Any, serving: Any, request: Any) -> Any:
        result = await original(serving, request)
        if not isinstance(result, tuple):  # an error, which is the answer
            return result
        with server.client_errors():
            choice = parse_options(request.vllm_xargs, from_client=True)
            if choice.message_spans:
                chat = server.Chat(serving, request, result)
                found = await message_spans.resolve(
                    choice.message_spans, request.messages, chat.prompt_token_ids, chat.render, chat.tokenize
                )
                spans: list[Span] = [*choice.options.spans, *found]
                request.vllm_xargs = {**request.vllm_xargs, SPANS_KEY: [str(span) for span in spans]}
                logger.debug("spans by message: %s", ", ".join(map(str, found)))
        return result

    def add_request(self, original: Any) -> Any:
        """Around `AsyncLLM.add_request`: remembers the trace headers that vLLM drops if it does not trace itself."""

        @functools.wraps(original)
        def add_request(engine: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            if has_keys(getattr(params, "extra_args", None)):
                _traceparent.set((kwargs.get("trace_headers") or {}).get("traceparent"))
            return original(engine, request_id, prompt, params, *args, **kwargs)

        return add_request

    def process_inputs(self, original: Any) -> Any:
        """Around `InputProcessor.process_inputs`, through which every request passes, also those of `LLM`.

        Here the worker gets what only the API server knows. The caller's parameters are left as they are.
        """

        @functools.wraps(original)
        def process_inputs(processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            extra_args: Any = getattr(params, "extra_args", None)
            if not self._is_for_us(extra_args):
                return original(processor, request_id, prompt, params, *args, **kwargs)
            with server.client_errors():
                if TRACEPARENT_KEY in extra_args:
                    parse_options(extra_args, from_client=True)  # says that it must not be given
                choice = parse_options(extra_args)
                check_model_has(choice, server.model_shape(processor.vllm_config))
            request = original(processor, request_id, prompt, params, *args, **kwargs)
            if choice.choice == "trace":
                self.traced.add(request_id)
                headers = kwargs.get("trace_headers") or {}
                traceparent = headers.get("traceparent") or _traceparent.get()
                if traceparent and request.sampling_params is not None:
                    request.sampling_params.extra_args = {**extra_args, TRACEPARENT_KEY: str(traceparent)}
            return request

        return process_inputs

    def engine_init(self, original: Any) -> Any:
        """Around the engine's `__init__`, in which vLLM's tracer provider is made."""

        @functools.wraps(original)
        def __init__(engine: Any, *args: Any, **kwargs: Any) -> None:
            original(engine, *args, **kwargs)
            endpoint = engine.observability_config.otlp_traces_endpoint
            if endpoint is not None:
                try:
                    watcher = LlmSpanWatcher(self._run_dir, self._wants_span, endpoint)
                    self._unwatch.append(watch(server.tracer_provider(), watcher))
                except Exception as error:
                    logger.warning(
                        "glassbox.attention spans can't be children of vLLM's: %s: %s", type(error).__name__, error
                    )

        return __init__

    def _wants_span(self, request_id: str) -> bool:
        config = self._config()
        return config.enabled and (
            request_id in self.traced or is_sampled_request(request_id, config.requests.trace_rate)
        )

    def close(self) -> None:
        """Take the watchers out of the tracer providers."""
        while self._unwatch:
            self._unwatch.pop()()


def check_model_has(choice: ClientChoice, shape: tuple[int, int] | None) -> None:
    """Raise if a request names layers or heads that the model lacks.

    Args:
        shape: numbers of layers and of heads, None if they are not known.

    Raises:
        OptionError: it does.
    """
    if shape is None:
        return
    for key, named, count in (
        (LAYERS_KEY, choice.options.layers, shape[0]),
        (HEADS_KEY, choice.options.heads, shape[1]),
    ):
        if named and named[-1] >= count:
            raise OptionError(
                f"{key} must be from 0 to {count - 1}, because this model has {count}, got {named[-1]}; leave it out "
                "for all"
            )


def _wrap(patch: server.Patch, make: Callable[[Any], Any], module: ModuleType) -> Callable[[], None]:
    return patch_method(getattr(module, patch.cls), patch.method, make)


def install(config: Callable[[], GlassboxConfig], run_dir: Path) -> Callable[[], None]:
    """Wrap vLLM's methods in this process, as soon as their modules are imported; starts no thread.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server; it need not exist yet.

    Returns:
        The undo.
    """
    intake = Intake(config, run_dir)
    patches = LatePatches()
    for patch in server.INTAKE_PATCHES:
        patches.add(patch.module, functools.partial(_wrap, patch, getattr(intake, patch.wrapper)))

    def undo() -> None:
        patches.remove()
        intake.close()

    return undo
