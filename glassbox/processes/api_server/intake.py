"""What the API server does with a request's `glassbox` keys, before the request reaches the engine.

Owns the checks that give a client HTTP 400, the resolving of spans by message, what is added to a traced request for
the worker, and telling the exporter of its `llm_request` span. The rules of the keys are `core/trace_options.py`'s;
which methods of vLLM are wrapped, `adapter/server.py`'s. A request without such keys passes through untouched.
"""

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, TypeGuard

from glassbox.adapter import server
from glassbox.adapter.front_end import FrontEnd
from glassbox.adapter.http_reply import Reply
from glassbox.adapter.http_request import HttpRequest, note_requests
from glassbox.adapter.running_requests import RunningRequests
from glassbox.adapter.server import EngineLabels, ExtraArgs, SentRequest
from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger, log_once
from glassbox.core.signal_table import MAX_KEPT_PLACES
from glassbox.core.trace_options import (
    ADDED_KEYS,
    ANONYMOUS,
    BEAM_PROMPT_KEY,
    CHOICE_KEY,
    CLIENT_KEY,
    HEADS_KEY,
    LAYERS_KEY,
    MODEL_KEY,
    PREFIX,
    RESPOND_KEY,
    SAMPLED_KEY,
    SIGNALS_KEY,
    SPANS_KEY,
    TRACEPARENT_KEY,
    ClientChoice,
    OptionError,
    Span,
    TraceOptions,
    parse_options,
)
from glassbox.measure.sampling import is_sampled_request
from glassbox.processes.api_server import message_spans
from glassbox.processes.api_server.llm_span_watcher import LlmSpanWatcher, watch
from glassbox.processes.api_server.logprobs import RequestLogprobs
from glassbox.processes.api_server.measured_shape import MeasuredShape
from glassbox.processes.api_server.order_taker import OrderTaker
from glassbox.processes.api_server.responding import Answers
from glassbox.signals.needs import sampled_options
from glassbox.signals.probe_files import ProbeFiles
from glassbox.store.client_names import ClientNames

logger = get_logger(__name__)

# The traceparent of the request that is being added, by a task of its own: vLLM drops the headers if it does not trace.
_traceparent: ContextVar[str | None] = ContextVar("glassbox_traceparent", default=None)
# Traced requests that may not have ended yet: enough for any server, and bounded if their ends are never told.
MAX_REMEMBERED: Final = 4096


def has_keys(extra_args: object) -> bool:
    """True if a request says anything to glassbox."""
    return isinstance(extra_args, Mapping) and any(str(key).startswith(PREFIX) for key in extra_args)


class TracedRequests:
    """External ids of the requests that are to be traced, the newest `MAX_REMEMBERED`; not thread-safe."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, request_id: str) -> None:
        self._ids[request_id] = None
        if len(self._ids) > MAX_REMEMBERED:
            self._ids.popitem(last=False)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._ids


class Intake:
    """What becomes of requests; see `adapter/server.py` for the methods that wrappers of vLLM's call.

    Attributes:
        traced: requests that asked for a trace, or were chosen for one.

    Args:
        config: returns the configuration of the moment; nothing is done while it says `enabled: false`.
        run_dir: of the server.
        starts: is called before this process has engines.
        serves: is told which engines this process sends requests to (`server.engines_of`).
    """

    def __init__(
        self,
        config: Callable[[], GlassboxConfig],
        run_dir: Path,
        starts: Callable[[], None] = lambda: None,
        serves: Callable[[EngineLabels], None] = lambda _: None,
    ) -> None:
        self._config = config
        self.starts, self.serves = starts, serves
        self._run_dir = run_dir
        self._clients = ClientNames(run_dir)
        self._unwatch: list[Callable[[], None]] = []
        self.traced = TracedRequests()
        self._measured = MeasuredShape(run_dir)
        self._answers = Answers(config, run_dir)
        self._probes = ProbeFiles(config)
        self.logprobs = RequestLogprobs(config, run_dir, self._sampled)
        self._orders = OrderTaker(config, run_dir)

    def is_for_us(self, extra_args: object) -> TypeGuard[ExtraArgs]:
        """See server.Intake."""
        return bool(extra_args) and has_keys(extra_args) and self._config().enabled

    def check(self, extra_args: ExtraArgs, shape: tuple[int, int] | None, *, is_chat: bool) -> None:
        """See server.Intake."""
        choice = parse_options(extra_args, from_client=True)
        check_model_has(choice, shape, self._measured)
        if choice.message_spans and not is_chat:
            raise OptionError(
                f"{SPANS_KEY} by message are for chat completions, got "
                f"{choice.message_spans[0].name}=message:{choice.message_spans[0].message}; give token "
                "positions (name=start:end) instead"
            )

    def with_model(self, extra_args: object, name: str) -> ExtraArgs | None:
        """See server.Intake."""
        config = self._config()
        given = extra_args if isinstance(extra_args, Mapping) else {}
        choice = given.get(CHOICE_KEY)
        # Which requests the rate chooses is known only when they have their ids.
        wanted = choice == "trace" or (choice is None and config.requests.trace_rate > 0)
        return {**given, MODEL_KEY: name} if name and wanted and config.enabled else None

    def wants_chat(self, extra_args: ExtraArgs) -> bool:
        """See server.Intake."""
        # Bad ones are for `resolve` to refuse, where a client's error is known as one.
        spans = extra_args.get(SPANS_KEY, ())
        return not isinstance(spans, list | tuple) or any("=message:" in str(span) for span in spans)

    def place(self, extra_args: ExtraArgs, places: Sequence[int | None]) -> ExtraArgs:
        """See server.Intake."""
        choice = parse_options(extra_args, from_client=True)
        placed = [message_spans.placed(span, places) for span in choice.message_spans]
        return {**extra_args, SPANS_KEY: [str(span) for span in (*choice.options.spans, *placed)]}

    async def resolve(self, extra_args: ExtraArgs, messages: Sequence[Any], chat: server.Chat) -> ExtraArgs:
        """See server.Intake."""
        choice = parse_options(extra_args, from_client=True)
        if not choice.message_spans:
            return extra_args
        found = await message_spans.resolve(
            choice.message_spans, messages, chat.prompt_token_ids, chat.render, chat.tokenize
        )
        logger.debug("spans by message: %s", ", ".join(map(str, found)))
        spans: list[Span] = [*choice.options.spans, *found]
        return {**extra_args, SPANS_KEY: [str(span) for span in spans]}

    def note_traceparent(self, traceparent: str | None) -> None:
        """See server.Intake."""
        _traceparent.set(traceparent)

    def admit(self, extra_args: ExtraArgs, shape: tuple[int, int] | None) -> bool:
        """See server.Intake."""
        if any(key in extra_args for key in ADDED_KEYS):
            parse_options(extra_args, from_client=True)  # says that they must not be given
        choice = parse_options(extra_args)
        check_model_has(choice, shape, self._measured)
        return choice.choice == "trace"

    def salt(self, extra_args: ExtraArgs, prompt_len: int | None) -> str | None:
        """See server.Intake."""
        requests = self._config().requests
        if extra_args.get(SAMPLED_KEY) is True:
            whole = self._sampled().prompt == "all"
        else:
            whole = parse_options(extra_args).options.prompt == "all" and requests.opt_in
        # Of a longer prompt the worker doesn't measure every row.
        return secrets.token_hex(16) if whole and (prompt_len or 0) <= requests.max_prompt_rows else None

    def _sampled(self) -> TraceOptions:
        """What workers keep of a request that the trace rate chooses."""
        return sampled_options(self._probes.current(), self._config().sampled_signals)

    def begin(self, request_id: str, traceparent: str | None) -> ExtraArgs:
        """See server.Intake."""
        self.traced.add(request_id)
        traceparent = traceparent or _traceparent.get()
        return {TRACEPARENT_KEY: str(traceparent)} if traceparent else {}

    def asked_by(self, sent: SentRequest, request: HttpRequest | None, traced: bool) -> ExtraArgs:
        """See server.Intake."""
        config = self._config()
        rate = config.requests.trace_rate
        if request is None or not config.enabled or not (traced or rate > 0):
            return {}
        if traced:
            self._orders.asked(sent, request)
            return self._client(request, config)
        # By chance, not by its id: a client could choose one that is always traced, though it may not ask for it.
        if not is_sampled_request(secrets.token_hex(8), rate):
            return {SAMPLED_KEY: False}
        self.traced.add(sent.request_id)
        self._orders.asked(sent, request)
        # Its span belongs to the client's trace, too. Several are none (W3C Trace Context).
        contexts = request.values("traceparent")
        traceparent = {TRACEPARENT_KEY: contexts[0]} if len(contexts) == 1 else {}
        return {SAMPLED_KEY: True, **traceparent, **self._client(request, config)}

    def _client(self, request: HttpRequest, config: GlassboxConfig) -> ExtraArgs:
        header, keys = config.requests.client_header, request.api_keys
        try:
            client = self._clients.of(request.values, header, keys)
        except OSError as error:
            log_once(
                logger,
                logging.ERROR,
                "clients",
                "Clients can't be told apart, so none is shown its traces if requests.isolate is on: %s",
                error,
            )
            return {}
        if client == ANONYMOUS and config.requests.isolate:
            log_once(
                logger,
                logging.WARNING,
                "anonymous",
                "requests.isolate: true, but a traced request came without %s: its trace is shown to no client. "
                "Start vLLM with --api-key, or set requests.client_header to a header that your gateway sets",
                header or "a key that vLLM checks",
            )
        # Where nobody says who it is, what one client may have is not meant for all of them together.
        return {} if header is None and keys == () else {CLIENT_KEY: client}

    def wants_answer(self, extra_args: ExtraArgs) -> bool:
        """See server.Intake."""
        return RESPOND_KEY in extra_args and parse_options(extra_args).options.respond

    def sent(self, request: SentRequest, reply: Reply) -> None:
        """See server.Intake."""
        self._answers.sent(request, reply)

    def begin_beam(self, prompt_len: int) -> ExtraArgs:
        """See server.Intake."""
        return {BEAM_PROMPT_KEY: prompt_len} if self._config().enabled else {}

    def tell_front_end(self, front_end: FrontEnd) -> None:
        """See server.Intake."""
        config = self._config()
        export = config.export
        pushed = (export.otel.enabled and export.otel.metrics) or export.jsonl.path is not None
        if config.enabled and not pushed and export.own_port is None:
            log_once(
                logger,
                logging.WARNING,
                front_end.name,
                "%s %s: what glassbox measures shows nowhere. Set export.http.port in glassbox.yaml, for a port "
                "of glassbox's own, or export.otel.enabled",
                front_end.name,
                front_end.shows,
            )

    def works_at(self, requests: RunningRequests) -> None:
        """See server.Intake."""
        self._orders.serves(requests)

    def watch_spans(self, endpoint: str) -> None:
        """See server.Intake."""
        try:
            watcher = LlmSpanWatcher(self._run_dir, self._wants_span, endpoint)
            self._unwatch.append(watch(server.tracer_provider(), watcher))
        except Exception as error:
            logger.warning("glassbox.attention spans can't be children of vLLM's: %s: %s", type(error).__name__, error)

    def _wants_span(self, request_id: str) -> bool:
        config = self._config()
        return config.enabled and (
            request_id in self.traced or is_sampled_request(request_id, config.requests.trace_rate)
        )

    def close(self) -> None:
        """Take the watchers out of the tracer providers, and end the threads that answers and orders have started."""
        self._orders.close()
        while self._unwatch:
            self._unwatch.pop()()
        self._answers.close()


def check_model_has(
    choice: ClientChoice, shape: tuple[int, int] | None, measured: Callable[[], tuple[int, int]]
) -> None:
    """Raise if a request names layers or heads that the model lacks, or too many of them for what it asks.

    Args:
        shape: numbers of layers and of heads by the model's configuration, None if they are not known.
        measured: returns what the workers have found; it is asked if the configuration says too few.

    Raises:
        OptionError: it does.
    """
    if shape is None:
        return
    for at, (key, named) in enumerate(((LAYERS_KEY, choice.options.layers), (HEADS_KEY, choice.options.heads))):
        if not named or named[-1] < shape[at]:
            continue
        count = max(shape[at], measured()[at])
        if named[-1] >= count:
            raise OptionError(
                f"{key} must be from 0 to {count - 1}, because this model has {count}, got {named[-1]}; leave it out "
                "for all"
            )
    layers, heads = choice.options.layers, choice.options.heads
    places = (shape[0] if layers is None else len(layers)) * (shape[1] if heads is None else len(heads))
    if "keys" in choice.options.arrays and places > MAX_KEPT_PLACES:
        raise OptionError(
            f"{SIGNALS_KEY} must have at most {MAX_KEPT_PLACES} layers x heads for signals on demand, got {places}; "
            f"choose some with {LAYERS_KEY} and {HEADS_KEY}"
        )


def install(
    config: Callable[[], GlassboxConfig],
    run_dir: Path,
    starts: Callable[[], None],
    serves: Callable[[EngineLabels], None],
) -> Callable[[], None]:
    """Wrap vLLM's methods in this process, as soon as their modules are imported; starts no thread.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server; it need not exist yet.
        starts, serves: see Intake.

    Returns:
        The undo.
    """
    intake = Intake(config, run_dir, starts, serves)
    unwrap = server.wrap_intake(intake)
    forget_requests = note_requests()

    def undo() -> None:
        forget_requests()
        unwrap()
        intake.close()

    return undo
