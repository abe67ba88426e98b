"""glassbox's routes inside vLLM's API server: the entry point `glassbox` of `vllm.endpoint_plugins`.

Owns only the joining. vLLM loads it in API servers if VLLM_PLUGINS names it (routes are opt-in there); what a plugin
has to be is in vllm/plugins/endpoint_plugins/interface.py. Two API servers are two processes with their own routes;
both read the one run directory.
"""

import logging
from typing import Any


class GlassboxEndpoint:
    """The live page, snapshots and the stream on vLLM's own port.

    Attributes:
        name: by which VLLM_PLUGINS allows it.
        required_tasks: none, attention is everywhere.
    """

    name = "glassbox"
    required_tasks = None

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

        app.router.routes.extend(make_routes(registered.shown.source))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing to set up: what is shown lies in the run directory, the engine is not asked."""
