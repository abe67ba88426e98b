"""What glassbox has in this process: the one place of its state.

vLLM calls a plugin's entry point, a backend's class methods and an attention impl's `forward` without giving them an
object to hang state on, so something has to be global. This is all of it; whoever needs more is handed it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from glassbox.adapter.attention.listening import Listening
from glassbox.config.settings import Settings
from glassbox.core.logs import get_logger
from glassbox.core.start_parts import StartParts

if TYPE_CHECKING:  # every process of a server has a seat, and only workers need torch
    from torch import Tensor

    from glassbox.adapter.protocols import (
        AttentionLayer,
        AttentionMetadata,
        CommonMetadata,
        LatentLayer,
        VllmWorker,
    )


logger = get_logger(__name__)


class Closable(Protocol):
    """What has to be taken back."""

    def close(self) -> None: ...


class Hook(Protocol):
    """What glassbox does to a worker process."""

    def prepare(self, vllm_worker: "VllmWorker") -> None:
        """The worker is about to warm up."""

    def arm(self) -> None:
        """Its warm-up is over: what follows are real steps and dummies."""

    def remove(self) -> None:
        """Put every patched method back and stop what was started."""


class Listener(Protocol):
    """Who is told by observed backends."""

    def on_build(
        self, layer_names: list[str], common_attn_metadata: "CommonMetadata", absorbed: int | None = None
    ) -> None:
        """vLLM built the metadata of these layers.

        Args:
            absorbed: of layers with latent attention, how many of the step's tokens, the first ones, attend over the
                latent cache.
        """

    def on_block_table(self, layer_names: list[str], block_table: "Tensor") -> None:
        """These layers have the metadata that was built last, with a block table of their own."""

    def after_attention(
        self,
        impl: Any,
        layer: "AttentionLayer",
        query: "Tensor",
        key: "Tensor | None",
        value: "Tensor | None",
        kv_cache: "Tensor",
        attn_metadata: "AttentionMetadata",
        output: object,
    ) -> None:
        """A layer's attention was computed, or queued; `output` is what it returned."""

    def after_latent_attention(
        self, impl: Any, layer: "LatentLayer", kv_cache: "Tensor", absorbed: Any, output: object, plain: "Tensor | None"
    ) -> None:
        """A layer's latent attention was computed, or queued, in one part or in two; see `mla_forward.latent_forward`.

        Args:
            absorbed: queries that `forward_mqa` was given, None if it was not called; output: what it returned.
            plain: queries that `forward_mha` was given, None if it was not called.
        """


class Seat:
    """State of one process.

    Attributes:
        registration: what `register()` changed; None if nothing.
        settings: live, as long as glassbox is registered.
        hook: of this process, once a worker warms up in it.
        listener: of this worker, while there is one.
        listening: which forward methods the observed impls have.
        start: what glassbox has taken of this process's start.
        inner_name: what CUSTOM stands for, between `validate_configuration` and `full_cls_name`, which vLLM calls one
            after the other for one layer.
    """

    def __init__(self) -> None:
        self.registration: Closable | None = None
        self.settings: Settings | None = None
        self.hook: Hook | None = None
        self.listener: Listener | None = None
        self.listening: Final = Listening()
        self.start = StartParts()
        self.inner_name: str | None = None
        self._make_hook: Callable[[], Hook] | None = None

    @property
    def attach(self) -> str:
        """`attach` as the server started with it: changing it needs a restart."""
        return self.settings.started_with.attach if self.settings else "auto"

    @property
    def inner_backend(self) -> str:
        """`inner_backend` as the server started with it."""
        return self.settings.started_with.inner_backend if self.settings else "auto"

    @property
    def enabled(self) -> bool:
        """`enabled` as the server started with it: what was not attached then needs a restart."""
        return self.settings is None or self.settings.started_with.enabled

    def take(self, settings: Settings, make_hook: Callable[[], Hook]) -> None:
        """glassbox is registered.

        Args:
            settings: of this process.
            make_hook: makes the hook if this process turns out to be a worker.
        """
        self.settings, self._make_hook = settings, make_hook

    def warm_up_begins(self, vllm_worker: "VllmWorker") -> None:
        """A worker of vLLM in this process has loaded its model. Never raises: vLLM's warm-up follows."""
        make, self._make_hook = self._make_hook, None
        try:
            if make is not None:
                with self.start.timed("import"):
                    self.hook = make()
            if self.hook is not None:
                with self.start.timed("prepare"):
                    self.hook.prepare(vllm_worker)
        except Exception:
            logger.exception("glassbox could not observe this worker; the server runs unobserved")

    def warm_up_ended(self) -> None:
        """It is ready for real steps."""
        if self.hook is not None:
            self.hook.arm()

    def leave(self) -> None:
        """glassbox is registered no more; patches are put back."""
        hook, self.hook = self.hook, None
        self.settings = self._make_hook = None
        if hook is not None:
            hook.remove()


SEAT: Final = Seat()
