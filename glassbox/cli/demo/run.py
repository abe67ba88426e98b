"""The demo from end to end: model, server, traffic, table. Owns the order, what is shown, the clean end."""

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glassbox.cli.demo.demo_model import MODEL_NAME, DemoModelError, demo_model
from glassbox.cli.demo.table import missing_samples, report
from glassbox.cli.demo.traffic import Answer, TrafficError, demo_traffic, send_traffic
from glassbox.cli.demo.vllm_server import ServerError, VllmServer
from glassbox.core.cpu import serving_dtype
from glassbox.view.measured import Measured
from glassbox.view.scrape import read_families

SERVED_NAME: Final = MODEL_NAME.lower()
_INTERVAL_S: Final = 1
_SETTLE_S: Final = 30.0
# Every step and more rows than by default: quick, telling numbers matter here, overhead doesn't.
_CONFIG: Final = f"""\
# Of `glassbox demo`. Edit and save it while the demo runs: it takes effect within two seconds.
sample_rate: 1.0
sampling:
  prefill_rows_per_request: 16
export:
  interval_s: {_INTERVAL_S}
  prometheus:
    detail: layer
"""
# torch.compile would cost the start 40 s on two cores, each time, and change nothing of what is shown.
SERVER_ARGS: Final = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16", "--dtype", serving_dtype())
_WIDTH_WITHOUT_TERMINAL: Final = 100


class DemoError(RuntimeError):
    """The demo can't go on; the message says why."""


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chose: stop after the table, and the port (None: a free one)."""

    once: bool = False
    port: int | None = None


def make_console() -> Console:
    """A console that is wide enough for the table where no terminal says otherwise (a pipe, CI)."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def run_demo(options: DemoOptions, console: Console) -> int:
    """Run it.

    Returns:
        The exit status: 0 if every exported statistic had samples, or after Ctrl-C (without `once`); else 1.

    Raises:
        DemoError: something needed can't be had; what was started is stopped.
    """
    begin = time.monotonic()
    with interruptible(), tempfile.TemporaryDirectory(prefix="glassbox-demo-") as temporary:
        folder = Path(temporary)
        config = folder / "glassbox.yaml"
        config.write_text(_CONFIG, encoding="utf-8")
        try:
            with contextlib.ExitStack() as stack:
                server = _start(stack, folder, config, options, console)
                measured = _measure(server, console)
                console.print(report(measured))
                _print_where(server, config, options, time.monotonic() - begin, console)
                if not options.once:
                    _keep(server, console)
        except KeyboardInterrupt:
            if options.once:
                raise DemoError("interrupted") from None
            console.print("Stopped.")
            return 0
        except (DemoModelError, ServerError, TrafficError, httpx.HTTPError) as error:
            raise DemoError(str(error)) from error
    return 1 if missing_samples(measured) else 0


def _start(
    stack: contextlib.ExitStack, folder: Path, config: Path, options: DemoOptions, console: Console
) -> VllmServer:
    """Get the model and start the server; `stack` stops it."""
    log_path = folder / "server.log"
    with make_progress(console) as progress:
        task = progress.add_task(f"model {MODEL_NAME}", total=None)
        model = demo_model(report=lambda text: progress.update(task, description=text))
        progress.update(task, description=f"model {MODEL_NAME}", total=1, completed=1)
        task = progress.add_task(f"vllm serve (log: {log_path})", total=None)
        server = VllmServer(
            model,
            args=("--served-model-name", SERVED_NAME, *SERVER_ARGS),
            env={
                "GLASSBOX_CONFIG": str(config),
                # Inside the demo's own folder, so that it goes when the demo goes, however the server ends.
                "GLASSBOX_RUN_DIR": str(folder / "run"),
                "GLASSBOX_DISABLE": None,
                "VLLM_PLUGINS": "glassbox",  # for the live page; without it the rest works as well
                "VLLM_CPU_KVCACHE_SPACE": "2",
            },
            log_path=log_path,
            port=options.port,
        )
        stack.enter_context(server)
        progress.update(task, total=1, completed=1)
    return server


def _measure(server: VllmServer, console: Console) -> Measured:
    """Send the traffic, wait until its rows have reached `/metrics`, and read them."""
    batches = demo_traffic()
    with make_progress(console) as progress:
        task = progress.add_task("requests", total=sum(len(batch) for batch in batches))

        def show(answer: Answer) -> None:
            progress.console.print(
                f"  [dim]{answer.request.name}: {answer.prompt_tokens:,} tokens in, "
                f"{answer.completion_tokens} out, {answer.seconds:.1f} s[/dim]  "
                f"{escape(_shorten(answer.text))}"
            )
            progress.advance(task)

        send_traffic(server.url, SERVED_NAME, batches, show)
        task = progress.add_task("waiting for the last snapshot", total=None)
        measured = _settled(server)
        progress.update(task, total=1, completed=1)
    return measured


def _settled(server: VllmServer) -> Measured:
    """The metrics once they have stood still for two export intervals."""
    deadline = time.monotonic() + _SETTLE_S
    last, since = -1.0, time.monotonic()
    while True:
        measured = read_families(server.metrics(), server.url, time.time())
        now = time.monotonic()
        if measured.rows.sum() != last:
            last, since = measured.rows.sum(), now
        settled = last > 0 and now - since > 2 * _INTERVAL_S + 0.5
        if settled or now > deadline:
            return measured
        time.sleep(0.25)


def _print_where(server: VllmServer, config: Path, options: DemoOptions, seconds: float, console: Console) -> None:
    console.print(f"Took {seconds:.0f} s.", highlight=False)
    if options.once:
        return
    console.print(
        f"\nThe server goes on. Look at [bold]{server.url}/glassbox/[/bold] (the live page)\n"
        f"and at [bold]{server.url}/metrics[/bold] (lines that begin with glassbox_)\n"
        f"Talk to it:  curl {server.url}/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{SERVED_NAME}", "prompt": "The sea is"}}\'\n'
        f"Edit its configuration while it runs: {config}\n"
        f"Its log: {server.log_path}\nCtrl-C stops it.",
        highlight=False,
        soft_wrap=True,
    )


def _keep(server: VllmServer, console: Console) -> None:
    """Return only by KeyboardInterrupt, or with an error when the server ends by itself."""
    while server.running:
        time.sleep(0.5)
    raise ServerError(f"the server ended; its log:\n{server.log_tail()}")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: `timeout`, make and process managers leave no server behind.

    Only the first signal counts. A second one (make passes on what the whole group has had already) would break
    off the stopping of the server, which takes a bounded time.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def make_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/green]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console,
    )


def _shorten(text: str, width: int = 40) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"
