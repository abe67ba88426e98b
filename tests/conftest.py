"""Fixtures of all tests: the demo's model, one shared server, servers of a test's own; and who is skipped."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.serving import GlassboxServer


# The same examples each time, whatever time they take: a change is judged by what it changes.
settings.register_profile("glassbox", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("glassbox")


def pytest_configure() -> None:
    """SIGTERM ends the session as Ctrl-C does, so that fixtures stop their servers."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        # Only once: make passes on what the whole process group has had already.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16 (30 layers, 9 heads, 3 KV heads, head size 64)."""
    from glassbox.cli.demo.demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def _shared_server(
    demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], "GlassboxServer"]]:
    """Gives the running shared server: starts it on the first call, and anew after a test has broken it."""
    from tests.serving import GlassboxServer, unprivileged

    # It may not read every file, as in production; where root's right can't be dropped, who needs that skips.
    prefix = unprivileged() if shutil.which("setpriv") else ()
    with contextlib.ExitStack() as stack:
        current: list[GlassboxServer] = []

        def get() -> GlassboxServer:
            if current and current[-1].running:
                return current[-1]
            stack.close()
            # Named, because vLLM takes routes only from plugins that are; for everything else it makes no difference.
            routes = {"VLLM_PLUGINS": "glassbox"}
            server = GlassboxServer(demo_model_path, tmp_path_factory.mktemp("server"), env=routes, prefix=prefix)
            current.append(stack.enter_context(server))
            return server

        yield get


@pytest.fixture
def server(_shared_server: Callable[[], "GlassboxServer"]) -> Iterator["GlassboxServer"]:
    """One `vllm serve` for all tests, at sample rate 1 and an export each second.

    Its counters go on from test to test: compare differences. A test may write its YAML; afterwards that of
    the start is written again.
    """
    running = _shared_server()
    yield running
    running.restore_config()


@pytest.fixture
def start_server(demo_model_path: Path, tmp_path: Path) -> Iterator[Callable[..., "GlassboxServer"]]:
    """Starts servers of the test's own, with the arguments of `GlassboxServer` (`folder` is optional)."""
    from tests.serving import GlassboxServer

    with contextlib.ExitStack() as stack:
        number = 0

        def start(**kwargs: Any) -> GlassboxServer:
            nonlocal number
            number += 1
            folder = kwargs.pop("folder", None)
            if folder is None:
                folder = tmp_path / f"server-{number}"
                folder.mkdir()
            return stack.enter_context(GlassboxServer(demo_model_path, folder, **kwargs))

        yield start
