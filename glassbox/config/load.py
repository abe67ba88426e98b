"""The configuration: where the YAML file is found, how it is loaded and compared.

Owns the way from a file to a `GlassboxConfig`. The settings themselves are in `model.py`, YAML and the wording of
errors in `yaml.py`, following the file in `follow.py`. A configuration is a frozen object that is passed in; nobody
keeps it global.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import ValidationError

import glassbox
from glassbox.config.model import (
    CPU_BACKENDS,
    MAX_ROWS_PER_STEP,
    MAX_TRACED_REQUESTS,
    MLA_BACKENDS,
    SUPPORTED_INNER_BACKENDS,
    BaselineConfig,
    ExportConfig,
    GlassboxConfig,
    JsonlConfig,
    LayerSelection,
    OtelConfig,
    PrometheusConfig,
    RecordsConfig,
    RequestsConfig,
    SamplingConfig,
    StatisticsConfig,
)
from glassbox.config.yaml import MAX_CONFIG_BYTES, ConfigError, parse_mapping, read_bytes, validation_error

__all__ = [
    "CONFIG_ENV",
    "CPU_BACKENDS",
    "MAX_CONFIG_BYTES",
    "MAX_ROWS_PER_STEP",
    "MAX_TRACED_REQUESTS",
    "MLA_BACKENDS",
    "RESTART_FIELDS",
    "SUPPORTED_INNER_BACKENDS",
    "BaselineConfig",
    "ConfigError",
    "ExportConfig",
    "GlassboxConfig",
    "JsonlConfig",
    "LayerSelection",
    "OtelConfig",
    "PrometheusConfig",
    "RecordsConfig",
    "RequestsConfig",
    "SamplingConfig",
    "StatisticsConfig",
    "find_config",
    "load_config",
    "packaged_config",
    "parse_config",
    "read_bytes",
    "restart_needed",
]

CONFIG_ENV: Final = "GLASSBOX_CONFIG"
_LOCAL_NAME: Final = "glassbox.yaml"

# A change of these is noticed but waits for a restart: they are built into the backend classes and compiled
# kernels. `enabled` is among them in one direction only: what was never attached can't be switched on.
RESTART_FIELDS: Final = (
    "attach",
    "inner_backend",
    "compat",
    "statistics.sink_tokens",
    "statistics.local_window",
    "adapters.max",
    "enabled",
)


def packaged_config() -> Path:
    """The default configuration that comes with the package."""
    return Path(glassbox.__file__).parent / "configs" / "glassbox.yaml"


def find_config(environ: Mapping[str, str] = os.environ) -> Path:
    """The configuration file: $GLASSBOX_CONFIG, else ./glassbox.yaml, else the packaged default.

    Returns:
        an absolute path, since a worker may run in another directory. It need not be readable: a file that is
        named but broken must be an error when it is loaded, not a reason to take another one.
    """
    if named := environ.get(CONFIG_ENV):
        return Path(named).expanduser().absolute()
    local = Path.cwd() / _LOCAL_NAME
    if os.path.lexists(local) and not local.is_dir():
        return local
    return packaged_config()


def load_config(path: Path | str) -> GlassboxConfig:
    """Load and check the YAML file at `path`.

    Raises:
        ConfigError: one line that names file, key, rule, value and remedy.
    """
    path = Path(path)
    return parse_config(path, read_bytes(path))


def parse_config(path: Path, data: bytes) -> GlassboxConfig:
    """Check `data`, the content of the YAML file at `path`.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return GlassboxConfig.model_validate(parse_mapping(path, data))
    except ValidationError as error:
        raise validation_error(path, error, GlassboxConfig) from None


def restart_needed(old: GlassboxConfig, new: GlassboxConfig) -> list[str]:
    """What of an edit does not take effect before a restart.

    Args:
        old: the configuration that the process started with.
        new: the configuration just loaded.

    Returns:
        one message for each such setting, none if all of the edit is live.
    """
    messages = []
    for key in RESTART_FIELDS:
        before, after = _get(old, key), _get(new, key)
        if before == after or (key == "enabled" and not after):
            continue
        before, after = (str(value).lower() if isinstance(value, bool) else value for value in (before, after))
        messages.append(
            f"{key} changed from {before} to {after}, which takes effect after a restart of vllm serve; "
            f"until then {before} stays in use"
        )
    return messages


def _get(config: GlassboxConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
