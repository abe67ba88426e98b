"""An engine in a command's own process, by which samples are measured: `extract` without --url, and `heads`.

Owns its option, its folder and environment, and what is said if vLLM can't run the model.
"""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassbox.cli.commands.common import fail

if TYPE_CHECKING:
    from glassbox import Extractor
    from glassbox.view.samples.samples_file import Sample

EngineArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg",
        metavar="NAME=VALUE",
        help="Of vllm.LLM, such as max_model_len=4096 or dtype=float16; may be repeated.",
        show_default=False,
    ),
]


def engine_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Of `vllm.LLM`, as --engine-arg gives them.

    Raises:
        typer.Exit: one of them is none.
    """
    import yaml

    arguments: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise fail(f"--engine-arg must be NAME=VALUE, got {one[:80]!r}; write such as max_model_len=4096")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise fail(f"--engine-arg {name} must have a plain value, got {value[:80]!r}; write such as 4096") from None
    return arguments


def load_extractor(
    model: str, arguments: Mapping[str, Any], samples: Sequence["Sample"], config: Path | None = None, **asked: Any
) -> "Extractor":
    """An extractor with an engine in this process: however this ends, no other one stays behind.

    Args:
        model: name or folder.
        arguments: of `engine_arguments`.
        samples: that it will be given.
        config: glassbox's YAML; None is the one with which these samples are best measured.
        asked: of `Extractor`.

    Raises:
        ViewError: vLLM can't run the model.
    """
    from glassbox import Extractor

    # As Ctrl-C does: what was done is told, and nothing stays behind.
    signal.signal(signal.SIGTERM, _interrupt)
    # Removed at the very end: the engine follows the file as long as it lives.
    folder = Path(tempfile.mkdtemp(prefix="glassbox-engine-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if config is None:
        config = folder / "glassbox.yaml"
        config.write_text(Extractor.config(samples), encoding="utf-8")
    # Before vLLM is imported, which reads its variables then.
    os.environ |= {"GLASSBOX_CONFIG": str(config.absolute()), "GLASSBOX_RUN_DIR": str(folder / "run")}
    os.environ.pop("GLASSBOX_DISABLE", None)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with engine_errors(model):
        return Extractor(Extractor.load_engine(model, arguments), **asked)


@contextmanager
def engine_errors(model: str) -> Iterator[None]:
    """Whatever vLLM, torch or transformers raise becomes one line.

    Raises:
        ViewError: they did; it is passed on if it was raised already.
    """
    from glassbox.view.measured import ViewError

    try:
        yield
    except ViewError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"[:600]
        raise ViewError(
            f"vLLM can't run {model} ({what}); VLLM_LOGGING_LEVEL=INFO says more, --engine-arg helps with memory"
        ) from None


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
