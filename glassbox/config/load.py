"""The configuration: where the YAML file is found, how it is loaded and compared.

Owns the way from a file to a `GlassboxConfig`. The settings themselves are in `model.py`, YAML in `yaml.py`, the
wording of errors in `wording.py`, whether what is valid works here in `usable.py`, following the file in `follow.py`.
A configuration is a frozen object that is passed in; nobody keeps it global.
"""

import contextlib
import os
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

import glassbox
from glassbox.config.model import (
    CPU_BACKENDS,
    LOOPBACK,
    MAX_ROWS_PER_STEP,
    MAX_TRACED_REQUESTS,
    MLA_BACKENDS,
    SUPPORTED_INNER_BACKENDS,
    ActionsConfig,
    BaselineConfig,
    ExportConfig,
    GlassboxConfig,
    HttpConfig,
    JsonlConfig,
    LayerSelection,
    OtelConfig,
    PerClientConfig,
    PrometheusConfig,
    RecordsConfig,
    RequestsConfig,
    RuleConfig,
    SamplingConfig,
    StatisticsConfig,
)
from glassbox.config.wording import all_keys, is_secret, shown, validation_error
from glassbox.config.yaml import MAX_CONFIG_BYTES, ConfigError, parse_mapping, read_bytes
from glassbox.core.files import ForeignFileError, require_own

__all__ = [
    "CONFIG_ENV",
    "CPU_BACKENDS",
    "MAX_CONFIG_BYTES",
    "MAX_ROWS_PER_STEP",
    "MAX_TRACED_REQUESTS",
    "MLA_BACKENDS",
    "RESTART_FIELDS",
    "SUPPORTED_INNER_BACKENDS",
    "ActionsConfig",
    "BaselineConfig",
    "ConfigError",
    "ExportConfig",
    "GlassboxConfig",
    "HttpConfig",
    "JsonlConfig",
    "LayerSelection",
    "OtelConfig",
    "PerClientConfig",
    "PrometheusConfig",
    "RecordsConfig",
    "RequestsConfig",
    "RuleConfig",
    "SamplingConfig",
    "StatisticsConfig",
    "changes",
    "find_config",
    "hide_secrets",
    "load_config",
    "packaged_config",
    "parse_config",
    "read_bytes",
    "replaced_keys",
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

    Raises:
        ConfigError: the variable's ~ has no home directory, or the path no working directory to begin at; or nobody
            has named the file and it could be another user's, who would say where text and events are sent.
    """
    if named := environ.get(CONFIG_ENV):
        try:
            return Path(named).expanduser().absolute()
        except (RuntimeError, OSError) as error:
            reason = "there is no such home directory" if isinstance(error, RuntimeError) else error.strerror
            raise ConfigError(
                named, f"{CONFIG_ENV} must lead to a file ({reason}); name it by its whole path"
            ) from None
    try:
        local = Path.cwd() / _LOCAL_NAME
    except OSError:  # the directory was removed since
        return packaged_config()
    if not os.path.lexists(local) or local.is_dir():
        return packaged_config()
    with contextlib.suppress(OSError):  # for its reader to tell
        try:
            require_own(local, local.stat())
        except ForeignFileError as error:
            problem, _, remedy = str(error).partition("; ")
            raise ConfigError(
                local,
                f"{problem}, to be used without being named; set {CONFIG_ENV}={local} if it is meant, or {remedy}",
            ) from None
    return local


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
    except ConfigError:
        raise
    except Exception as error:  # no file may end a server, or a thread that follows it, but by a ConfigError
        raise ConfigError(
            path, f"can't be understood ({type(error).__name__}: {error}); write plain keys and values"
        ) from None


def changes(old: GlassboxConfig, new: GlassboxConfig) -> list[str]:
    """What an edit changed, one text for each setting: `sampling.layers all -> [0, 5]`. Secrets are not shown."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    found = []
    for key in all_keys(GlassboxConfig):
        path = key.split(".")
        values = [reduce(getitem, path, dump) for dump in (before, after)]
        if values[0] != values[1]:
            hidden = any(is_secret(path, value, GlassboxConfig) for value in values)
            # What changed in a list of mappings doesn't fit a line.
            told = (
                " changed" if any(_holds_mappings(value) for value in values) else f" {' -> '.join(map(shown, values))}"
            )
            found.append(f"{key} (not shown)" if hidden else f"{key}{told}")
    return found


def _holds_mappings(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def hide_secrets(dump: dict[str, Any]) -> dict[str, Any]:
    """The settings of `model_dump`, with `(not shown)` for the texts of those that may be secrets."""

    def hidden(value: Any, path: tuple[int | str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: hidden(inner, (*path, name)) for name, inner in value.items()}
        if isinstance(value, list):
            return [hidden(inner, (*path, index)) for index, inner in enumerate(value)]
        return "(not shown)" if isinstance(value, str) and is_secret(path, value, GlassboxConfig) else value

    return {name: hidden(value, (name,)) for name, value in dump.items()}


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


def replaced_keys(config: GlassboxConfig) -> list[str]:
    """One message for each key of the file that still works and has been replaced."""
    old = config.export.prometheus.port
    if old is None:
        return []
    message = "export.prometheus.port is replaced by export.http.port"
    if config.export.http.host == LOOPBACK:
        opened = f"{{port: {old}, host: 0.0.0.0, token_file: PATH}}"
        message += (
            f"; it listens on {LOOPBACK} alone, no longer on every interface: to be reached from elsewhere, write "
            f"export.http: {opened} (docs/http.md)"
        )
    return [message]


def _get(config: GlassboxConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
