"""Program of the tests: everything of a vLLM process that a plugin could touch, before and after some actions, as JSON.

    python tests/e2e/plugin_state.py ACTION...

Actions: `load` (vLLM's own load_general_plugins), `register` and `unregister` (glassbox's). The result is a list
of states: one after importing vLLM's modules, one after each action.
"""

import asyncio
import atexit
import hashlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

MODULES: Final = (
    "vllm.v1.attention.backends.registry",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.selector",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.plugins",
    "vllm.logger",
)
# Too much, or with addresses in it.
UNSTABLE: Final = frozenset({"__builtins__", "__pydantic_core_schema__"})
# What differs between the runs by construction.
VARIED: Final = frozenset({"GLASSBOX_DISABLE", "VLLM_PLUGINS"})


def describe(value: Any) -> str:  # noqa: PLR0911 (a table of types)
    """A text that is the same in two processes if and only if the value is, as far as a patch is concerned."""
    if isinstance(value, staticmethod | classmethod):
        return f"{type(value).__name__} {describe(value.__func__)}"
    if isinstance(value, types.FunctionType):
        wrapped = getattr(value, "__wrapped__", None)
        code = hashlib.sha256(value.__code__.co_code).hexdigest()[:12]
        return f"function {value.__module__}.{value.__qualname__} {code} {wrapped and describe(wrapped)}"
    if isinstance(value, type):
        return f"class {value.__module__}.{value.__qualname__}"
    if isinstance(value, Enum):
        return f"member {type(value).__qualname__}.{value.name}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    if isinstance(value, dict):
        return repr(sorted((describe(key), describe(item)) for key, item in value.items()))
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def of_namespace(namespace: Mapping[str, Any]) -> dict[str, str]:
    """A module's or class's attributes."""
    return {name: describe(value) for name, value in namespace.items() if name not in UNSTABLE}


def state() -> dict[str, Any]:
    """This process, as JSON."""
    from prometheus_client import REGISTRY

    modules = {name: sys.modules[name] for name in MODULES}
    classes = {
        f"{name}.{attribute}": value
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if isinstance(value, type) and value.__module__.startswith("vllm.")
    }
    return {
        "modules": {name: of_namespace(vars(module)) for name, module in modules.items()},
        "classes": {name: of_namespace(vars(cls)) for name, cls in classes.items()},
        "collectors": sorted(type(collector).__qualname__ for collector in REGISTRY._collector_to_names),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": {name: value for name, value in os.environ.items() if name not in VARIED},
        "exit_functions": atexit._ncallbacks(),  # type: ignore[attr-defined]
        "signals": {name.name: repr(signal.getsignal(name)) for name in (signal.SIGTERM, signal.SIGINT)},
        "import_hooks": [len(sys.meta_path), len(sys.path_hooks), sys.path],
        "event_loop_policy": describe(type(asyncio.get_event_loop_policy())),
        "open_files": sorted(os.readlink(entry) for entry in open_files() if os.path.exists(entry)),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "files": sorted(str(path) for path in Path.cwd().rglob("*")),
        "vllm_loggers": {
            name: [logger.level, logger.propagate, [type(handler).__name__ for handler in logger.handlers]]
            for name, logger in sorted(logging.root.manager.loggerDict.items())
            if isinstance(logger, logging.Logger) and name.startswith("vllm")
        },
    }


def open_files() -> list[str]:
    """Links to the files that this process has open; pipes and sockets have numbers of their own."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.lexists(link) and os.readlink(link).startswith("/")]


def main(actions: list[str]) -> None:
    """Do the actions and print the states."""
    for name in MODULES:
        importlib.import_module(name)
    states = [state()]
    for action in actions:
        if action == "load":
            from vllm.plugins import load_general_plugins

            load_general_plugins()
        else:
            from glassbox import plugin
            from glassbox.processes import registration

            {"register": plugin.register, "unregister": registration.unregister}[action]()
        states.append(state())
    loaded = sorted(name for name in sys.modules if name.split(".")[0] == "glassbox")
    sys.stdout.write(f"RESULT {json.dumps({'states': states, 'loaded': loaded})}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
