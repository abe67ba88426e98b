"""glassbox's routes inside vLLM's API server: the entry point `glassbox` of `vllm.endpoint_plugins`.

Owns the joining. vLLM loads it in API servers if VLLM_PLUGINS names it (routes are opt-in there); what a plugin
has to be is in vllm/plugins/endpoint_plugins/interface.py. Two API servers are two processes with their own routes;
both read the one run directory.

Whoever needs a key for vLLM's /v1 needs it here, too: vLLM's own guard knows vLLM's paths alone.
"""

import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from glassbox.export.family_source import FamilySource
    from glassbox.web.guard import Rules

_NEEDS: Final = "send Authorization: Bearer with vLLM's API key"
_TEXT_REMEDY: Final = (
    "vLLM's port shows traces without text until vllm serve has an --api-key or listens on --host 127.0.0.1"
)


class GlassboxEndpoint:
    """The live page, snapshots and the stream on vLLM's own port.

    Attributes:
        name: by which VLLM_PLUGINS allows it.
        required_tasks: none, attention is everywhere.
    """

    name = "glassbox"
    required_tasks = None

    def __init__(self) -> None:
        self._rules: Rules | None = None  # unknown: nobody gets in
        self._loopback = False

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's FastAPI application; adds none if glassbox doesn't observe this server."""
        try:
            self._attach(app)
        except Exception:
            # vLLM would end, and an observer must not be the reason.
            logging.getLogger("glassbox").exception("glassbox's routes could not be added; the server goes on without")

    def _attach(self, app: Any) -> None:
        from glassbox.core.kill_switch import is_disabled
        from glassbox.processes import registration

        if not is_disabled():
            registration.register()  # has been called, unless VLLM_PLUGINS was meant for this process alone
        registered = registration.registered()
        if registered is None or registered.shown is None:  # disabled, or another vLLM: register() said why
            return
        from glassbox.web.app import make_routes

        source = registered.shown.source

        def shows_text() -> bool:
            return self._may_show_text(source)

        app.router.routes.extend(make_routes(source, rules=lambda: self._rules, shows_text=shows_text))
        self._learn(getattr(getattr(app, "state", None), "args", None))
        if self._rules is not None:
            shows_text()  # says so now if it may not

    def _learn(self, args: Any) -> None:
        """Ask for the keys that vLLM asks for."""
        if args is None:
            return
        from glassbox.adapter.server import served_to
        from glassbox.web.address import is_loopback
        from glassbox.web.credentials import Tokens
        from glassbox.web.guard import Rules

        served = served_to(args)
        self._loopback = is_loopback(served.host)
        self._rules = Rules([Tokens(served.api_keys)] if served.api_keys else [], _NEEDS, open_metrics=True)

    def _may_show_text(self, source: "FamilySource") -> bool:
        from glassbox.core.logs import get_logger, log_once
        from glassbox.web.doors import text_refusal

        keyed = self._rules is not None and bool(self._rules.proofs)
        refused = text_refusal(source.config, loopback=self._loopback, authenticates=keyed, remedy=_TEXT_REMEDY)
        if refused is not None and log_once(get_logger(__name__), logging.WARNING, refused, "%s", refused):
            source.count_error("access")
        return refused is None

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learn the keys if they were not known before; the engine is not asked."""
        try:
            self._learn(args)
        except Exception:
            logging.getLogger("glassbox").exception("vLLM's API keys are unknown; glassbox's routes answer 503")
