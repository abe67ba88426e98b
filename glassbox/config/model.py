"""The settings: one frozen model with unit, bound and reason of each.

Owns what may stand in the YAML file. Where the file is found, how it is loaded and watched is
`glassbox.config`, from which everything here is imported.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictStr,
    ValidationInfo,
    field_validator,
)

from glassbox.core.adapter_slots import MAX_ADAPTERS

# Of multi-head latent attention, and the first release that has each of those that older ones lack.
MLA_BACKENDS: Final = {
    "CPU_MLA": "0.28",
    "AMX_MLA": "0.29",
    "TRITON_MLA": "",
    "FLASH_ATTN_MLA": "",
    "FLASHMLA": "",
    "CUTLASS_MLA": "",
    "FLASHINFER_MLA": "",
}
SUPPORTED_INNER_BACKENDS: Final = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", *MLA_BACKENDS)
CPU_BACKENDS: Final = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")

# The row list lives on the device at an address that captured graphs hold, so it is allocated
# once, for the largest value that a live edit may set: 4096 rows x 5 int32 are 80 KiB.
MAX_ROWS_PER_STEP: Final = 4096
MAX_TRACED_REQUESTS: Final = 1024


class _Section(BaseModel):
    # Strict: "0.1" is not a number and true is not 1. A setting that is silently reinterpreted hides a
    # mistake.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _field(default: Any, description: str, rule: str, remedy: str, **bounds: Any) -> Any:
    """A setting. `rule` and `remedy` are what its error says (`<key> <rule>, got <value>; <remedy>`)."""
    return Field(default, description=description, json_schema_extra={"rule": rule, "remedy": remedy}, **bounds)


def _section(model: type[_Section]) -> Any:
    return Field(
        default_factory=model,
        description=f"Section of {', '.join(model.model_fields)}.",
        json_schema_extra={
            "rule": "must be a mapping",
            "remedy": "indent its keys below it, or delete the line to use the defaults",
        },
    )


def _switch(default: bool, description: str) -> Any:
    return _field(default, description, "must be true or false", "write true or false without quotes")


@dataclass(frozen=True)
class LayerSelection:
    """Which of the observed layers are measured: all, every k-th, or a list of indices.

    Attributes:
        indices: global layer indices, ascending and unique; None leaves the choice to `every`.
        every: the first observed layer, and every k-th after it; 1 is all.
    """

    indices: tuple[int, ...] | None = None
    every: int = 1

    def select(self, observed: Sequence[int]) -> tuple[int, ...]:
        """Global indices of the measured layers, ascending.

        Args:
            observed: global indices of the observed layers, ascending; in a hybrid model they have gaps.
        """
        if self.indices is None:
            return tuple(observed[:: self.every])
        return tuple(index for index in observed if index in self.indices)

    def missing(self, observed: Sequence[int]) -> tuple[int, ...]:
        """Indices that the file names and no observed layer has, for a warning."""
        return tuple(index for index in self.indices or () if index not in observed)


def _parse_layers(value: object) -> LayerSelection:
    remedy = "use all, a list such as [0, 5, 11], or {every: 4}"
    if isinstance(value, LayerSelection):
        return value
    if value == "all" and isinstance(value, str):
        return LayerSelection()
    if isinstance(value, list | tuple):
        if not value or not all(type(item) is int and item >= 0 for item in value):
            raise ValueError(f"must list layer indices, whole numbers from 0; {remedy}")
        if len(set(value)) < len(value):
            raise ValueError("must name each layer once; delete the repeated one")
        return LayerSelection(indices=tuple(sorted(value)))
    if isinstance(value, dict) and set(value) == {"every"}:
        if type(value["every"]) is not int or value["every"] < 1:
            raise ValueError("must have a whole number of at least 1 for every; 1 is all layers")
        return LayerSelection(every=value["every"])
    raise ValueError(f"must be all, a list or {{every: k}}; {remedy}")


def _dump_layers(value: LayerSelection) -> str | list[int] | dict[str, int]:
    if value.indices is not None:
        return list(value.indices)
    return "all" if value.every == 1 else {"every": value.every}


_Layers = Annotated[LayerSelection, PlainValidator(_parse_layers), PlainSerializer(_dump_layers)]


def _check_inner_backend(value: str) -> str:
    if value != "auto" and value not in SUPPORTED_INNER_BACKENDS:
        raise ValueError(f"must be auto or one of {', '.join(SUPPORTED_INNER_BACKENDS)}; use auto if in doubt")
    return value


class SamplingConfig(_Section):
    """Which layers and rows of a sampled step are measured, and what that may cost."""

    layers: _Layers = _field(
        LayerSelection(),
        "Measured layers; cost grows with their number. all, a list of indices, or {every: k}.",
        "must be all, a list or {every: k}",
        "use all, a list such as [0, 5, 11], or {every: 4}",
    )
    max_rows_per_step: int = _field(
        256,
        f"Rows of a sampled step, 1 to {MAX_ROWS_PER_STEP} (the row list on the device has a fixed size); "
        "more candidates than that take turns.",
        f"must be between 1 and {MAX_ROWS_PER_STEP}",
        "use sample_rate: 0 to stop sampling",
        ge=1,
        le=MAX_ROWS_PER_STEP,
    )
    prefill_rows_per_request: int = _field(
        8,
        f"Prompt positions measured per request, 0 to {MAX_ROWS_PER_STEP}, evenly spaced, the last "
        "one included: a prompt has thousands of rows and a few tell the same.",
        f"must be between 0 and {MAX_ROWS_PER_STEP}",
        "use 0 to measure decode rows only",
        ge=0,
        le=MAX_ROWS_PER_STEP,
    )
    overhead_budget: float | None = _field(
        None,
        "Largest share of step time that measuring may cost, above 0 and up to 1; the sample rate is "
        "lowered to keep it. null: no limit.",
        "must be above 0 and at most 1, or null",
        "use null for no budget",
        gt=0,
        le=1,
    )


class StatisticsConfig(_Section):
    """Parameters of the statistics; compiled into the kernels, so they need a restart."""

    sink_tokens: int = _field(
        4,
        "Tokens, 1 to 1024: first positions of a sequence that count as attention sink.",
        "must be between 1 and 1024",
        "use 4, the usual number of sink tokens",
        ge=1,
        le=1024,
    )
    local_window: int = _field(
        128,
        "Tokens, 1 to 1048576: last visible positions, the row's own included, that count as local.",
        "must be between 1 and 1048576",
        "use 128",
        ge=1,
        le=1_048_576,
    )


class RecordsConfig(_Section):
    """Traced requests that have ended, as records in a file."""

    path: Annotated[StrictStr, Field(min_length=1)] | None = _field(
        None,
        "File (jsonl) or directory (parquet) of records; a leading ~ is the home directory. null: none are written.",
        "must be a path or null",
        "use null to write none",
    )
    format: Literal["jsonl", "parquet"] = _field(
        "jsonl",
        "jsonl: one line per request; parquet: files of one table, one row per request (needs the extra `tables`).",
        "must be jsonl or parquet",
        "use jsonl if in doubt",
    )
    max_mb: int = _field(
        256,
        "MB, 1 to 1048576: size at which the file is rotated; four times as much is kept, as of parquet files.",
        "must be between 1 and 1048576",
        "use path: null to write none",
        ge=1,
        le=1_048_576,
    )

    @property
    def expanded_path(self) -> Path | None:
        """`path` with ~ replaced, None if nothing is to be written."""
        return None if self.path is None else Path(self.path).expanduser()


class RequestsConfig(_Section):
    """Traced requests: those of which every measured row is kept."""

    trace_rate: float = _field(
        0.0,
        "Share of requests that are traced without asking, 0 to 1.",
        "must be between 0 and 1",
        "use 0 to trace only requests that ask for it",
        ge=0,
        le=1,
    )
    max_active: int = _field(
        64,
        f"Requests traced at the same time, 1 to {MAX_TRACED_REQUESTS} (each takes time in every step, and memory); "
        "more are refused.",
        f"must be between 1 and {MAX_TRACED_REQUESTS}",
        "use trace_rate: 0 and opt_in: false to trace nothing",
        ge=1,
        le=MAX_TRACED_REQUESTS,
    )
    opt_in: bool = _switch(True, "Whether a client may ask for a trace of its own request.")
    max_trace_mb: int = _field(
        16,
        "MB, 1 to 4096: memory that one traced request may take in a worker; what would go beyond is left out.",
        "must be between 1 and 4096",
        "use 16",
        ge=1,
        le=4096,
    )
    max_active_mb: int = _field(
        256,
        "MB, 1 to 65536: memory that all traced requests together may take in a worker.",
        "must be between 1 and 65536",
        "use 256",
        ge=1,
        le=65_536,
    )
    include_text: bool = _switch(
        False, "Whether traces hold the tokens of the prompt and the answer; prompts are private."
    )
    keep: int = _field(
        200,
        "Traces kept in the run directory, 1 to 100000; the oldest go first.",
        "must be between 1 and 100000",
        "use trace_rate: 0 and opt_in: false to trace nothing",
        ge=1,
        le=100_000,
    )
    keep_mb: int = _field(
        64,
        "MB, 1 to 65536: size of the traces that a worker keeps in the run directory.",
        "must be between 1 and 65536",
        "use 64",
        ge=1,
        le=65_536,
    )
    records: RecordsConfig = _section(RecordsConfig)


class PrometheusConfig(_Section):
    """Metrics to be scraped."""

    enabled: bool = _switch(True, "Whether metrics are shown at vLLM's /metrics (and at `port`).")
    port: int | None = _field(
        None,
        "TCP port of glassbox's own /metrics and live page, 1 to 65535; null: only vLLM's.",
        "must be between 1 and 65535, or null",
        "use null to serve only at vLLM's own /metrics",
        ge=1,
        le=65535,
    )
    detail: Literal["model", "layer", "head"] = _field(
        "layer",
        "Labels of the attention metrics: model (none), layer, or layer and head.",
        "must be model, layer or head",
        "use layer if in doubt",
    )
    max_series: int = _field(
        # 80 layers at detail layer are 19,760 series, with a baseline 22,160.
        25_000,
        "Time series of a server, 1 to 10000000; a detail that would make more falls back one level, "
        "because series are what Prometheus pays for.",
        "must be between 1 and 10000000",
        "use detail: model for few series",
        ge=1,
        le=10_000_000,
    )


class OtelConfig(_Section):
    """Metrics and spans sent by OTLP. Unset values follow the OTEL_* environment variables."""

    enabled: bool = _switch(False, "Whether anything is sent by OTLP.")
    # Before endpoint, whose rule depends on it.
    protocol: Literal["grpc", "http"] = _field(
        "grpc",
        "OTLP over gRPC or over HTTP (protobuf).",
        "must be grpc or http",
        "use grpc for port 4317, http for port 4318",
    )
    endpoint: str | None = _field(
        None,
        "URL of the collector, http or https; with grpc also host:port. null: OTEL_EXPORTER_OTLP_ENDPOINT.",
        "must be a URL or null",
        "use a URL such as http://collector:4317",
    )
    metrics: bool = _switch(True, "Whether metrics are sent.")
    traces: bool = _switch(True, "Whether spans of traced requests are sent.")
    headers: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # may hold an authorization token
        description="Headers of each OTLP request, text to text, such as an authorization.",
        json_schema_extra={
            "rule": "must be a mapping of header names to strings",
            "remedy": 'write {name: "value"}',
        },
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or _is_url(value):
            return value
        if info.data.get("protocol", "grpc") == "grpc":
            if not _is_host_port(value):
                raise ValueError("must be a URL or host:port; use a URL such as http://collector:4317")
            return value
        raise ValueError("must be an http or https URL; use a URL such as http://collector:4318")

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\t\x20-\x7e]*", text):
                raise ValueError("must be header names and printable ASCII values; remove blanks and line breaks")
        return value


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        # .port raises if it is not a number in range.
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and " " not in value
    except ValueError:
        return False


def _is_host_port(value: str) -> bool:
    return "/" not in value and ":" in value and _is_url(f"http://{value}") and urlsplit(f"//{value}").port is not None


class JsonlConfig(_Section):
    """Summaries of each export interval as lines of JSON in a file."""

    path: Annotated[StrictStr, Field(min_length=1)] | None = _field(
        None,
        "File that is appended to; a leading ~ is the home directory. null: none is written.",
        "must be a file's path or null",
        "use null to write none",
    )
    max_mb: int = _field(
        256,
        "MB, 1 to 1048576: size at which the file is rotated, so that it can't fill the disk.",
        "must be between 1 and 1048576",
        "use path: null to write none",
        ge=1,
        le=1_048_576,
    )

    @property
    def expanded_path(self) -> Path | None:
        """`path` with ~ replaced, None if nothing is to be written."""
        return None if self.path is None else Path(self.path).expanduser()


class BaselineConfig(_Section):
    """The run that the drift metrics compare with (`glassbox baseline save` writes its file)."""

    path: Annotated[StrictStr, Field(min_length=1)] | None = _field(
        None,
        "File of `glassbox baseline save`; a leading ~ is the home directory. null: nothing is compared.",
        "must be a file's path or null",
        "use null to compare with nothing",
    )
    min_rows: int = _field(
        # A healthy model under mixed traffic: indices up to 0.58 with 150 rows of a head, 0.39 with 300, 0.28 with 700
        # (docs/incidents.md); the alert fires above 0.5.
        500,
        "Rows, 1 to 1000000000, that a head must have on either side: few rows, above all of few requests, differ "
        "without any change.",
        "must be between 1 and 1000000000",
        "use 500",
        ge=1,
        le=1_000_000_000,
    )
    window_s: float = _field(
        600.0,
        "Seconds, 1 to 86400, of most recent rows that are compared; up to a quarter more, because only a few older "
        "states are kept.",
        "must be between 1 and 86400 seconds",
        "use 600",
        ge=1,
        le=86_400,
    )

    @property
    def expanded_path(self) -> Path | None:
        """`path` with ~ replaced, None if nothing is compared."""
        return None if self.path is None else Path(self.path).expanduser()


class CanaryConfig(_Section):
    """How often served outputs are reproduced while serving."""

    interval_s: float = _field(
        30.0,
        "Seconds, 1 to 86400, between two checks that a few rows of each layer were served as glassbox computes them "
        "from the KV cache; 0 checks each layer at its first prefill and decode alone.",
        "must be 0, or between 1 and 86400 seconds",
        "use 30",
        ge=0,
        le=86_400,
    )

    @field_validator("interval_s")
    @classmethod
    def _not_all_the_time(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 0, or between 1 and 86400 seconds; use 30")
        return value


class AdaptersConfig(_Section):
    """Statistics by LoRA adapter."""

    max: int = _field(
        0,
        f"LoRA adapters, 0 to {MAX_ADAPTERS}, whose statistics are shown apart: the first ones that a worker serves. "
        "The others share one place; 0 tells none apart. Needs a restart.",
        f"must be between 0 and {MAX_ADAPTERS}",
        "use 0 to tell none apart",
        ge=0,
        le=MAX_ADAPTERS,
    )


class ExportConfig(_Section):
    """Where the numbers go."""

    interval_s: float = _field(
        5.0,
        "Seconds between snapshots, 0.1 to 3600: the age of what is shown against copies from the device.",
        "must be between 0.1 and 3600 seconds",
        "use 5",
        ge=0.1,
        le=3600,
    )
    prometheus: PrometheusConfig = _section(PrometheusConfig)
    otel: OtelConfig = _section(OtelConfig)
    jsonl: JsonlConfig = _section(JsonlConfig)


class GlassboxConfig(_Section):
    """The whole file. Every key may be left out."""

    enabled: bool = _switch(True, "Whether glassbox observes at all. false to true needs a restart.")
    log_level: Literal["debug", "info", "warning", "error"] = _field(
        "info",
        "Least severe message that glassbox logs; vLLM's own level is not touched.",
        "must be debug, info, warning or error",
        "use info if in doubt",
    )
    sample_rate: float = _field(
        0.01,
        "Share of engine steps that are measured, 0 to 1.",
        "must be between 0 and 1",
        "use 0 to stop sampling",
        ge=0,
        le=1,
    )
    attach: Literal["auto", "custom"] = _field(
        "auto",
        "auto: observe whatever backend vLLM picks; custom: only with --attention-backend CUSTOM. Needs a restart.",
        "must be auto or custom",
        "use auto to observe whatever backend vLLM picks",
    )
    inner_backend: Annotated[str, AfterValidator(_check_inner_backend)] = _field(
        "auto",
        f"What CUSTOM wraps: auto, or one of {', '.join(SUPPORTED_INNER_BACKENDS)}. Needs a restart.",
        f"must be auto or one of {', '.join(SUPPORTED_INNER_BACKENDS)}",
        "use auto if in doubt",
    )
    compat: Literal["auto", "tested"] = _field(
        "auto",
        "auto: on a vLLM newer than the tested ones layers are observed once their output was reproduced; tested: the "
        "server runs unobserved there. Needs a restart.",
        "must be auto or tested",
        "use auto if in doubt",
    )
    sampling: SamplingConfig = _section(SamplingConfig)
    statistics: StatisticsConfig = _section(StatisticsConfig)
    adapters: AdaptersConfig = _section(AdaptersConfig)
    requests: RequestsConfig = _section(RequestsConfig)
    canary: CanaryConfig = _section(CanaryConfig)
    baseline: BaselineConfig = _section(BaselineConfig)
    export: ExportConfig = _section(ExportConfig)
