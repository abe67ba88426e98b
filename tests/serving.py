"""Servers for the end-to-end tests: `vllm serve` with glassbox, its YAML at hand, its metrics as numbers."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from glassbox.cli.demo.vllm_server import HOST, VllmServer
from glassbox.core.cpu import serving_dtype
from glassbox.view.measured import Measured
from glassbox.view.scrape import read_families
from tests.ports import free_port
from tests.waiting import wait_for

MODEL_NAME: Final = "smollm2"
# The other name by which clients may ask for it.
ALIAS: Final = "smollm2-latest"
# Everything is measured and exported each second, so that tests wait for no more than that.
BASE_CONFIG: Final[dict[str, Any]] = {"sample_rate": 1.0, "export": {"interval_s": 1}}
# No torch.compile: it would add 40 s to each start on two cores.
BASE_ARGS: Final = ("--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", serving_dtype())
# An edited configuration is in force by then, in every process.
EFFECT_S: Final = 2.0
REQUIRE_TOOLS_ENV: Final = "GLASSBOX_REQUIRE_TOOLS"


def require_tool(name: str, package: str) -> str:
    """Path of a program of the operating system; skips the test where it is missing, fails it under CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"needs the program {name} (Debian package {package})"
        if os.environ.get(REQUIRE_TOOLS_ENV) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def unprivileged() -> tuple[str, ...]:
    """Words before a command that take from root the right to read any file; empty for other users."""
    if os.geteuid() != 0:
        return ()
    drop = "-dac_override,-dac_read_search"
    return (require_tool("setpriv", "util-linux"), f"--bounding-set={drop}", "--inh-caps=-all")


def own_cache(folder: Path, compiler: str) -> dict[str, str]:
    """Environment of a server with a cache of glassbox's own, whose kernel a shell script compiles; vLLM's is the usual
    one."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    script = folder / "c++"
    script.write_text(f"#!/bin/sh\n{compiler}\n")
    script.chmod(0o755)
    return {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or str(usual / "vllm"),
        "CXX": str(script),
    }


class GlassboxServer(VllmServer):
    """`vllm serve` of the demo's model with glassbox in it.

    Attributes:
        folder: of this server alone; log, YAML and (unless `env` says otherwise) run directory are in it.
        config_path: the YAML it watches.
        run_dir: GLASSBOX_RUN_DIR.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        config: Mapping[str, Any] | str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        base_args: Sequence[str] = BASE_ARGS,
        start_timeout_s: float = 600.0,
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.config_path = folder / "glassbox.yaml"
        self.run_dir = folder / "run"
        self.initial_config: Mapping[str, Any] | str = BASE_CONFIG if config is None else config
        self.write_config(self.initial_config)
        clean = {name: None for name in os.environ if name.startswith(("GLASSBOX_", "OTEL_", "VLLM_PLUGINS"))}
        super().__init__(
            model,
            args=("--served-model-name", MODEL_NAME, ALIAS, *base_args, *args),
            env={
                **clean,
                "GLASSBOX_CONFIG": str(self.config_path),
                "GLASSBOX_RUN_DIR": str(self.run_dir),
                "GLASSBOX_HTTP_ADDR": HOST,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **(env or {}),
            },
            log_path=folder / "server.log",
            port=free_port(),
            start_timeout_s=start_timeout_s,
            # Not the repository's root: a glassbox.yaml or a package lying there must play no part.
            cwd=folder,
            prefix=prefix,
        )

    def write_config(self, config: Mapping[str, Any] | str) -> None:
        """Replace the YAML (atomically, as editors do); a text is written as it is."""
        text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False)
        if self.config_path.is_file() and self.config_path.read_text(encoding="utf-8", errors="replace") == text:
            return
        fresh = self.config_path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.config_path)

    def edit_config(self, **changes: Any) -> None:
        """Write the configuration of the start with some top-level keys replaced."""
        if isinstance(self.initial_config, str):
            raise TypeError("edit_config needs a server that was started with a mapping; use write_config")
        self.write_config({**self.initial_config, **changes})

    def restore_config(self) -> None:
        """Write the configuration of the start again, whatever a test put in its place."""
        if self.config_path.is_dir() and not self.config_path.is_symlink():
            shutil.rmtree(self.config_path)
        elif self.config_path.is_file():
            self.config_path.chmod(0o600)
        self.write_config(self.initial_config)

    def post(self, path: str, timeout_s: float = 120.0, **body: Any) -> dict[str, Any]:
        """POST to the OpenAI API (`model` is filled in) and return the answer; an HTTP error raises."""
        reply = httpx.post(f"{self.url}{path}", json={"model": MODEL_NAME, **body}, timeout=timeout_s)
        return dict(reply.raise_for_status().json())

    def complete(self, prompt: str | list[int], max_tokens: int = 8, **body: Any) -> str:
        """Greedy text after `prompt`."""
        answer = self.post("/v1/completions", **{"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body})
        return str(answer["choices"][0]["text"])

    def metric(self, name: str, **labels: str) -> float | None:
        """Sum of the samples called `name` that have all these labels; None if there is none."""
        # To parse all of the page takes a third of a second.
        lines = "".join(f"{line}\n" for line in self.metrics_text().split("\n") if name in line)
        values = [
            sample.value
            for family in text_string_to_metric_families(lines)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def measured(self) -> Measured:
        """Glassbox's metrics as arrays."""
        return read_families(self.metrics(), self.url, time.time())

    def wait_metric(
        self, name: str, accept: Callable[[float | None], bool], timeout_s: float = 30.0, **labels: str
    ) -> float | None:
        """Wait until `metric(name, **labels)` is accepted and return it."""
        return wait_for(lambda: self.metric(name, **labels), accept, timeout_s, f"{name}{labels or ''}")

    def settled_rows(self, timeout_s: float = 60.0) -> float:
        """`rows_total` over all labels, once it has stood still for more than two export intervals."""
        last, since = -1.0, time.monotonic()

        def still(value: float) -> bool:
            nonlocal last, since
            if value != last:
                last, since = value, time.monotonic()
            return time.monotonic() - since > 2.5

        return wait_for(lambda: self.metric("glassbox_attention_rows_total") or 0.0, still, timeout_s, "rows to settle")
