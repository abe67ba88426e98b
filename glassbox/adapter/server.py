"""What glassbox touches of vLLM's API server: `runner.py`'s counterpart for that process.

Owns the names of the wrapped methods and how a chat is rendered and tokenized as the server does it. Read and run
against vLLM 0.32. All imports are inside functions: importing this module loads no vLLM.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from glassbox.core.trace_options import OptionError


@dataclass(frozen=True)
class Patch:
    """A method of vLLM and the method of `intake.Intake` that makes its wrapper."""

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
    Patch("vllm.v1.engine.async_llm", "AsyncLLM", "add_request", "add_request"),
    Patch("vllm.v1.engine.async_llm", "AsyncLLM", "__init__", "engine_init"),
    Patch("vllm.v1.engine.llm_engine", "LLMEngine", "__init__", "engine_init"),
    Patch("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", "process_inputs"),
)


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


def config_of(serving: Any) -> Any:
    """The VllmConfig behind a serving class; None if it has no engine (rendering servers)."""
    return getattr(getattr(serving, "engine_client", None), "vllm_config", None)


def model_shape(vllm_config: Any) -> tuple[int, int] | None:
    """Numbers of attention layers and of query heads of the whole model; None if they can't be told."""
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
