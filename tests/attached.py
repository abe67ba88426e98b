"""What glassbox has in this process, for tests that run vLLM in it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from glassbox.adapter.seat import SEAT
from glassbox.processes.worker.hook import StepHook
from glassbox.processes.worker.observer import Observer


def attached_hook() -> StepHook:
    """The hook of this process, in which an observed layer has been built."""
    found = SEAT.hook
    assert isinstance(found, StepHook), "no hook: the plugin did not attach"
    return found


def running_observer() -> Observer:
    """The observer of this process's worker."""
    worker = attached_hook().worker
    assert worker is not None, "no observer: the plugin did not attach"
    return worker.observer


@contextmanager
def plugin(folder: Path, config: str) -> Iterator[pytest.MonkeyPatch]:
    """glassbox, attached to this process, for vLLMs in it, which are shut down at the end.

    vLLM would shut an engine down when the garbage collector finds it, and takes the process's parallel groups away
    with it: from the next test's engine, if that is being built just then.

    Args:
        folder: for its files.
        config: its YAML.

    Yields:
        What changed the environment, and changes it back at the end.
    """
    from glassbox.plugin import register
    from glassbox.processes.registration import unregister

    (folder / "glassbox.yaml").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSBOX_CONFIG", str(folder / "glassbox.yaml"))
        patch.setenv("GLASSBOX_RUN_DIR", str(folder / "run"))
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        unregister()
        register()
        with _engines_shut_down(patch):
            yield patch
        unregister()


def start_quickly(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the start of a tiny model, and of its end.

    vLLM looks at a model's class in a process of its own, which takes as long as all the rest; and for every engine it
    looks at all objects a dozen times, which takes as long again.
    """
    from vllm.model_executor.models import registry

    patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    patch.setattr(gc, "collect", lambda generation=2: 0)


@contextmanager
def _engines_shut_down(patch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.v1.engine.core_client import InprocClient

    collect, built = gc.collect, []
    start_quickly(patch)
    original = InprocClient.__init__

    def remembering(client: InprocClient, *args: Any, **kwargs: Any) -> None:
        original(client, *args, **kwargs)
        built.append(client)

    patch.setattr(InprocClient, "__init__", remembering)
    try:
        yield
    finally:
        for client in built:
            client.shutdown()
        if built:
            collect()  # once for all of them: their weights and caches lie in cycles
