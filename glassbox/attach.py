"""Naming the observed backends in vLLM's registry, the collector in prometheus_client's, and wrapping the intake."""

from collections.abc import Callable

from glassbox import intake, rundir
from glassbox.backends.observed import observed_path
from glassbox.config import SUPPORTED_INNER_BACKENDS, GlassboxConfig, restart_needed
from glassbox.export import prometheus
from glassbox.export.source import ConfigFile, FamilySource
from glassbox.logs import get_logger, set_level
from glassbox.settings import Settings

logger = get_logger(__name__)

_undo: list[Callable[[], None]] = []


def attach(settings: Settings) -> None:
    """Override vLLM's members by their observed subclasses as `attach` says; install the collector.

    With `attach: custom` only CPU_ATTN is overridden: vLLM's CPU platform ignores `--attention-backend CUSTOM` and
    would never ask the router.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    config = settings.started_with
    if config.enabled:
        names = SUPPORTED_INNER_BACKENDS if config.attach == "auto" else ("CPU_ATTN",)
        for name in names:
            member = AttentionBackendEnum[name]
            if member.is_overridden():
                # Deriving from vLLM's class would change what is served, from theirs may change it as well.
                logger.warning(
                    "%s is overridden by %s already; glassbox leaves it alone and does not observe it",
                    name,
                    member.get_path(),
                )
                continue
            register_backend(member, observed_path(name))
            _undo.append(member.clear_override)
        _forget_selection()

    def on_change(edited: GlassboxConfig) -> None:
        set_level(edited.log_level)
        if not config.enabled:  # then there is no worker of glassbox that would say it
            for message in restart_needed(config, edited):
                logger.warning("%s: %s", settings.path.name, message)

    live = ConfigFile(settings.path, config, on_change)
    _undo.append(prometheus.install(live))
    if config.enabled:
        _undo.append(intake.install(live, rundir.run_dir()))


def shown_source() -> FamilySource | None:
    """What this process's collector shows, for others who show it in another way; None if glassbox isn't attached."""
    return next((undo.source for undo in _undo if isinstance(undo, prometheus.Handle)), None)


def detach() -> None:
    """Undo `attach()`: vLLM selects its own classes again."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    while _undo:
        _undo.pop()()
    AttentionBackendEnum.CUSTOM.clear_override()
    _forget_selection()


def _forget_selection() -> None:
    """vLLM caches which class a configuration resolves to."""
    import sys

    selector = sys.modules.get("vllm.v1.attention.selector")
    if selector is not None:
        selector._cached_get_attn_backend.cache_clear()
