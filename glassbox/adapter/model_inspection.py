"""Which attention layers of a model vLLM would build, and which of them would be observed, without its weights.

Owns the look at a model that isn't served: vLLM itself builds it, on torch's meta device, in a process of its own (it
sets up process groups and global state, and may fail in any way). So layers, heads and backends are those of the vLLM
and the machine that this runs on, for every model that this vLLM knows.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from glassbox.adapter.layers import (
    Bypass,
    ObservedLayers,
    attention_layers,
    bypass_of_all,
    find_layers,
    has_open_images,
)

# Importing vLLM and torch, mostly; large models take no longer.
_TIMEOUT_S: Final = 300


class InspectionError(RuntimeError):
    """vLLM could not build the model here; the message is its own, in one line."""


def inspect_model(model: Path, config_file: Path) -> ObservedLayers:
    """Build a model in another process.

    Args:
        model: its folder.
        config_file: glassbox's YAML, whose `attach` says what is observed.

    Raises:
        InspectionError: vLLM is not there, or could not build it.
    """
    with tempfile.TemporaryDirectory(prefix="glassbox-") as folder:
        answer = Path(folder) / "layers.json"
        # The plugin would start a run directory, and needs none here: what it overrides is overridden below.
        env = {**os.environ, "GLASSBOX_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", __name__, str(model), str(config_file), str(answer)]
        try:
            done = subprocess.run(
                command,
                check=False,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise InspectionError(f"it took more than {_TIMEOUT_S} s") from None
        if done.returncode == 0 and answer.exists():
            return _decoded(json.loads(answer.read_text(encoding="utf-8")))
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        raise InspectionError(last.strip())


def _decoded(fields: dict[str, Any]) -> ObservedLayers:
    of_kind: dict[str, Any] = {
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()},
        "bypassed": {name: Bypass(*why) for name, why in fields["bypassed"].items()},
    }
    return ObservedLayers(**of_kind)


class _AnyCache:
    """There are no caches to look at."""

    def find(self, layer: Any) -> None:
        """Every cache may be readable: which are is known when they are written."""


def _main(model: str, config_file: str, answer: str) -> None:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from glassbox.adapter import overrides
    from glassbox.config.load import load_config

    config = load_config(Path(config_file))
    overrides.override(config)
    vllm_config: Any = EngineArgs(
        model=model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True
    ).create_engine_config()
    with tempfile.TemporaryDirectory(prefix="glassbox-") as folder, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(vllm_config.model_config.dtype)
        try:
            with torch.device("meta"):
                built = initialize_model(vllm_config=vllm_config)
        finally:
            torch.set_default_dtype(before)
        finder: Any = _AnyCache()
        found = find_layers(
            attention_layers(vllm_config, built, None),
            finder,
            model=built,
            of_all=bypass_of_all(vllm_config),
            attach=config.attach,
            open_images=has_open_images(vllm_config),
        )
        fields = {**vars(found), "bypassed": {name: list(asdict(why).values()) for name, why in found.bypassed.items()}}
        Path(answer).write_text(json.dumps(fields), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
