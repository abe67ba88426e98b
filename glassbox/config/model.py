"""The settings: one frozen model with unit, bound and reason of each.

Owns what may stand in the YAML file. Where the file is found, how it is loaded and watched is
`glassbox.config`, from which everything here is imported.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from glassbox.core.adapter_slots import MAX_ADAPTERS
from glassbox.core.printable import printable
from glassbox.core.signal_table import SIGNAL_NAMES, is_on_demand, signal_row

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
MAX_SERIES: Final = 10_000_000
# Each is a label of the metrics, and time for every traced request.
MAX_PROBES: Final = 16
# Each is a value of a metric's label, and each with a webhook a thread and a queue.
MAX_RULES: Final = 32
_HEADER_NAME: Final = r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"


# A name of DNS, or nearly: underscores occur in names of containers.
_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
    r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?\Z"
)
LOOPBACK: Final = "127.0.0.1"


def is_host(text: str) -> bool:
    """True for a host name, an IPv4 address, or an IPv6 address with or without brackets."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return ip_address(bare.partition("%")[0]).version == 6 or bare == text
    except ValueError:
        # What looks like an address and is none (256.1.1.1, 127.1) is no name: resolvers guess what it means.
        return bool(_HOST_NAME.match(text)) and not re.fullmatch(r"[\d.]+", text)


class _Section(BaseModel):
    # Strict: "0.1" is not a number and true is not 1. A setting that is silently reinterpreted hides a
    # mistake.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _field(default: Any, description: str, rule: str, remedy: str, **bounds: Any) -> Any:
    """A setting. `rule` and `remedy` are what its error says (`<key> <rule>, got <value>; <remedy>`).

    What the remedy says to write stands between backquotes: a value, or `key: value` of the same section or from the
    top. They aren't shown; by them a test reads the advice and tries it.
    """
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
    return _field(default, description, "must be true or false", "write `true` or `false` without quotes")


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
    remedy = "use `all`, a list such as `[0, 5, 11]`, or `{every: 4}`"
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
            raise ValueError("must have a whole number of at least 1 for every; `{every: 1}` is all layers")
        return LayerSelection(every=value["every"])
    raise ValueError(f"must be all, a list or {{every: k}}; {remedy}")


def _dump_layers(value: LayerSelection) -> str | list[int] | dict[str, int]:
    if value.indices is not None:
        return list(value.indices)
    return "all" if value.every == 1 else {"every": value.every}


_Layers = Annotated[LayerSelection, PlainValidator(_parse_layers), PlainSerializer(_dump_layers)]


def _parse_layers_per_step(value: object) -> int | None:
    if isinstance(value, str) and value == "all":
        return None
    if type(value) is not int or value < 1:
        raise ValueError("must be all or a whole number of at least 1; use `all` to measure all layers of a step")
    return value


_LayersPerStep = Annotated[
    int | None, PlainValidator(_parse_layers_per_step), PlainSerializer(lambda value: "all" if value is None else value)
]


def _as_level(value: object) -> object:
    """A level as other programs write it, too: DEBUG, Info, and Python's own alias warn."""
    lowered = value.lower() if isinstance(value, str) else value
    return "warning" if lowered == "warn" else lowered


_VARIABLE: Final = re.compile(r"(?:^|/)(\$(?:\w+|\{\w+\}))(?:/|$)")


def _check_path(value: str) -> str:
    if "\0" in value:
        raise ValueError("must be a path, which has no NUL in it; delete that character")
    if "://" in value:
        raise ValueError("must be a path, not a URL; take away all up to ://, or name a folder where it is mounted")
    # A folder of that name would be made; one that is meant so can be named by its whole path and a link.
    if (variable := _VARIABLE.search(value)) is not None:
        raise ValueError(
            f"must be a path without variables, for {printable(variable[1])} is not replaced; spell it out, or begin "
            "with ~ for the home directory"
        )
    return value


# A path as it is written: whether it can be used is `usable.py`'s.
_Path = Annotated[StrictStr, Field(min_length=1), AfterValidator(_check_path)]


class _FileSection(_Section):
    path: _Path | None

    @property
    def expanded_path(self) -> Path | None:
        """`path` with ~ replaced, None if there is none."""
        return None if self.path is None else Path(self.path).expanduser()


def _check_inner_backend(value: str) -> str:
    if value != "auto" and value not in SUPPORTED_INNER_BACKENDS:
        raise ValueError(f"must be auto or one of {', '.join(SUPPORTED_INNER_BACKENDS)}; use `auto` if in doubt")
    return value


class SamplingConfig(_Section):
    """Which layers and rows of a sampled step are measured, and what that may cost."""

    layers: _Layers = _field(
        LayerSelection(),
        "Measured layers; cost grows with their number. all, a list of indices, or {every: k}.",
        "must be all, a list or {every: k}",
        "use `all`, a list such as `[0, 5, 11]`, or `{every: 4}`",
    )
    layers_per_step: _LayersPerStep = _field(
        None,
        "How many of these layers a sampled step measures, of each pipeline stage, in turn; more steps are sampled "
        "instead, so that every layer keeps the rate. all, or a whole number from 1.",
        "must be all or a whole number of at least 1",
        "use `all` to measure all layers of a step",
    )
    max_rows_per_step: int = _field(
        256,
        f"Rows of a sampled step, 1 to {MAX_ROWS_PER_STEP} (the row list on the device has a fixed size); "
        "more candidates than that take turns.",
        f"must be between 1 and {MAX_ROWS_PER_STEP}",
        "use `sample_rate: 0` to stop sampling",
        ge=1,
        le=MAX_ROWS_PER_STEP,
    )
    prefill_rows_per_request: int = _field(
        8,
        f"Prompt positions measured per request, 0 to {MAX_ROWS_PER_STEP}, evenly spaced, the last "
        "one included: a prompt has thousands of rows and a few tell the same.",
        f"must be between 0 and {MAX_ROWS_PER_STEP}",
        "use `0` to measure decode rows only",
        ge=0,
        le=MAX_ROWS_PER_STEP,
    )
    overhead_budget: float | None = _field(
        None,
        "Largest share of step time that measuring may cost, above 0 and up to 1; to keep it the sample rate is "
        "lowered, traced requests lose rows, and further ones are refused. null: no limit.",
        "must be above 0 and at most 1, or null",
        "use `null` for no budget",
        gt=0,
        le=1,
    )

    def layers_at_once(self, num_layers: int) -> int:
        """How many of so many measured layers a sampled step measures."""
        return num_layers if self.layers_per_step is None else min(self.layers_per_step, num_layers)


class StatisticsConfig(_Section):
    """Parameters of the statistics; compiled into the kernels, so they need a restart."""

    sink_tokens: int = _field(
        4,
        "Tokens, 1 to 1024: first positions of a sequence that count as attention sink.",
        "must be between 1 and 1024",
        "use `4`, the usual number of sink tokens",
        ge=1,
        le=1024,
    )
    local_window: int = _field(
        128,
        "Tokens, 1 to 1048576: last visible positions, the row's own included, that count as local.",
        "must be between 1 and 1048576",
        "use `128`",
        ge=1,
        le=1_048_576,
    )


class RecordsConfig(_FileSection):
    """Traced requests that have ended, as records in a file."""

    path: _Path | None = _field(
        None,
        "File (jsonl) or directory (parquet) of records; a leading ~ is the home directory. null: none are written.",
        "must be a path or null",
        "use `null` to write none",
    )
    format: Literal["jsonl", "parquet"] = _field(
        "jsonl",
        "jsonl: one line per request; parquet: files of one table, one row per request (needs the extra `tables`).",
        "must be jsonl or parquet",
        "use `jsonl` if in doubt",
    )
    max_mb: int = _field(
        256,
        "MB, 1 to 1048576: size at which the file is rotated; four times as much is kept, as of parquet files.",
        "must be between 1 and 1048576",
        "use `path: null` to write none",
        ge=1,
        le=1_048_576,
    )


class PerClientConfig(_Section):
    """What one client may have of the traces; clients that say nothing are one (`anonymous`)."""

    max_active: int = _field(
        32,
        f"Requests of one client traced at the same time, 1 to {MAX_TRACED_REQUESTS}; more are refused.",
        f"must be between 1 and {MAX_TRACED_REQUESTS}",
        "use `32`, or as many as requests.max_active for no limit of its own",
        ge=1,
        le=MAX_TRACED_REQUESTS,
    )
    keep: int = _field(
        100,
        "Traces of one client kept in the run directory, 1 to 100000; its own oldest go first.",
        "must be between 1 and 100000",
        "use `100`, or as many as requests.keep for no limit of its own",
        ge=1,
        le=100_000,
    )
    rows_per_second: int | None = _field(
        # A row of 32 layers and 32 heads is 40 KB: 200 MB/s.
        5000,
        "Rows (tokens) of traces that one client may have measured, 1 to 1000000 a second; ten seconds' worth at once. "
        "Beyond it traces are truncated and further ones refused. null: no limit.",
        "must be between 1 and 1000000, or null",
        "use `5000`, or `null` for no limit",
        ge=1,
        le=1_000_000,
    )


class RequestsConfig(_Section):
    """Traced requests: those of which every measured row is kept."""

    trace_rate: float = _field(
        0.0,
        "Share of requests that are traced without asking, 0 to 1.",
        "must be between 0 and 1",
        "use `0` to trace only requests that ask for it",
        ge=0,
        le=1,
    )
    signals: tuple[str, ...] = _field(
        (),
        f"Signals of requests that trace_rate chooses, among {', '.join(SIGNAL_NAMES)}. Many need every row of the "
        "prompt, and on demand there are bounds (docs/scores.md).",
        "must be a list of signals",
        "use `[spectral]`, or `[]` for none",
        strict=False,
        max_length=len(SIGNAL_NAMES),
    )
    focus_heads: _Path | None = _field(
        None,
        "File of `glassbox heads`: over which heads the signal `focus` is taken; a leading ~ is the home directory. "
        "null: all.",
        "must be a file's path or null",
        "use `null` for all heads",
    )
    max_active: int = _field(
        64,
        f"Requests traced at the same time, 1 to {MAX_TRACED_REQUESTS} (each takes time in every step, and memory); "
        "more are refused.",
        f"must be between 1 and {MAX_TRACED_REQUESTS}",
        "use `trace_rate: 0` and `opt_in: false` to trace nothing",
        ge=1,
        le=MAX_TRACED_REQUESTS,
    )
    opt_in: bool = _switch(True, "Whether a client may ask for a trace of its own request.")
    max_trace_mb: int = _field(
        # All rows of a prompt of 1,500 tokens in 30 layers of 9 heads, with what singular values need, are 50 MB.
        64,
        "MB, 1 to 4096: memory that one traced request may take in a worker; what would go beyond is left out.",
        "must be between 1 and 4096",
        "use `64`",
        ge=1,
        le=4096,
    )
    max_active_mb: int = _field(
        256,
        "MB, 1 to 65536: memory that all traced requests together may take in a worker.",
        "must be between 1 and 65536",
        "use `256`",
        ge=1,
        le=65_536,
    )
    respond_wait_s: float = _field(
        1.0,
        "Seconds, 0 to 30: the end of an answer to a request with `glassbox_respond` waits at most so long for the "
        "trace; later ones are named in it, and no more.",
        "must be between 0 and 30",
        "use `1.0`",
        ge=0,
        le=30,
    )
    max_prompt_rows: int = _field(
        8192,
        "Tokens, 1 to 1000000: the longest prompt of which all rows are measured where a request asks for them; of a "
        "longer one those that the sampler takes are.",
        "must be between 1 and 1000000",
        "use `8192`",
        ge=1,
        le=1_000_000,
    )
    include_text: bool = _switch(
        False, "Whether traces hold the tokens of the prompt and the answer; prompts are private."
    )
    keep: int = _field(
        200,
        "Traces kept in the run directory, 1 to 100000; the oldest go first.",
        "must be between 1 and 100000",
        "use `trace_rate: 0` and `opt_in: false` to trace nothing",
        ge=1,
        le=100_000,
    )
    keep_mb: int = _field(
        256,
        "MB, 1 to 65536: size of the traces that a worker keeps in the run directory.",
        "must be between 1 and 65536",
        "use `256`",
        ge=1,
        le=65_536,
    )
    isolate: bool = _switch(
        False,
        "Whether each client sees its own traces only, told by its API key of vLLM's or by `client_header`.",
    )
    client_header: str | None = _field(
        None,
        "Header that tells the client, such as X-Tenant; a gateway must set or remove it in every request. null: the "
        "API key tells it, if vLLM asks for one.",
        "must be the name of a header or null",
        "use `null` for vLLM's API keys",
        pattern=_HEADER_NAME,
    )
    per_client: PerClientConfig = _section(PerClientConfig)
    records: RecordsConfig = _section(RecordsConfig)

    @field_validator("signals")
    @classmethod
    def _check_signals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not set(value) <= set(SIGNAL_NAMES):
            raise ValueError(f"must be among {', '.join(SIGNAL_NAMES)}; use `[spectral]`, or `[]` for none")
        if len(set(value)) < len(value):
            raise ValueError("must name each signal once; delete the repeated one")
        return value

    @property
    def expanded_focus_heads(self) -> Path | None:
        """`focus_heads` with ~ replaced, None for all heads."""
        return None if self.focus_heads is None else Path(self.focus_heads).expanduser()


def _file(description: str) -> Any:
    return _field(None, f"{description} A leading ~ is the home directory.", "must be a path or null", "use `null`")


# Settings of HttpConfig that name a file.
HTTP_FILES: Final = ("token_file", "users_file", "cert_file", "key_file", "client_ca_file")


class HttpConfig(_Section):
    """glassbox's own port: where it listens, and who gets in."""

    port: int | None = _field(
        None,
        "TCP port of glassbox's own /metrics, live page and traced requests, 1 to 65535; null: only vLLM's port.",
        "must be between 1 and 65535, or null",
        "use `null` to serve only at vLLM's own port",
        ge=1,
        le=65535,
    )
    host: str = _field(
        LOOPBACK,
        "Address or name of this host to listen on: 127.0.0.1 or ::1 for this host alone, 0.0.0.0 or :: for every "
        "interface.",
        "must be an address or a host name, without port",
        "use `127.0.0.1`, or `0.0.0.0` for every interface",
    )
    allowed_hosts: tuple[StrictStr, ...] = _field(
        (),
        "Names that the Host header of a request may have, beside localhost and addresses; with some named, others are "
        "refused on every address, without on loopback alone.",
        "must be a list of host names, without ports",
        "write `[glassbox.example.org]`, or `[]` for none",
        strict=False,
        max_length=64,
    )
    token_file: _Path | None = _file("File of bearer tokens, one a line; each of them lets in. null: none does.")
    users_file: _Path | None = _file(
        "File of users for basic authentication, lines name:bcrypt as htpasswd -B makes them."
    )
    cert_file: _Path | None = _file("TLS certificate and its chain, PEM; with key_file the port speaks HTTPS alone.")
    key_file: _Path | None = _file("TLS key of the certificate, PEM.")
    client_ca_file: _Path | None = _file(
        "PEM certificates of who signs clients' certificates: without one nobody connects."
    )
    open_metrics: bool = _switch(False, "Whether /metrics is served without token or password.")
    max_connections: int = _field(
        64,
        "Connections at the same time, 4 to 1024; beyond it the one that has waited longest for a request is closed.",
        "must be between 4 and 1024",
        "use `64`",
        ge=4,
        le=1024,
    )

    @field_validator("host")
    @classmethod
    def _check_host(cls, value: str) -> str:
        if not is_host(value):
            raise ValueError("must be an address or a host name, without port; use `127.0.0.1`, or `0.0.0.0` for all")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(is_host(name) for name in value):
            raise ValueError("must be a list of host names, without ports; write `[glassbox.example.org]`")
        return value

    @property
    def authenticates(self) -> bool:
        """True if only those get in who prove who they are."""
        return any((self.token_file, self.users_file, self.client_ca_file))


class PrometheusConfig(_Section):
    """Metrics to be scraped."""

    enabled: bool = _switch(True, "Whether metrics are shown at vLLM's /metrics (and at glassbox's own port).")
    on_vllm_port: bool = _switch(
        True, "Whether metrics are shown at vLLM's /metrics; false: at glassbox's own port only."
    )
    port: int | None = _field(
        None,
        "Replaced by export.http.port: TCP port of glassbox's own, 1 to 65535.",
        "must be between 1 and 65535, or null",
        "use `null` to serve only at vLLM's own /metrics",
        ge=1,
        le=65535,
    )
    detail: Literal["model", "layer", "head"] = _field(
        "layer",
        "Labels of the attention metrics: model (none), layer, or layer and head.",
        "must be model, layer or head",
        "use `layer` if in doubt",
    )
    max_series: int = _field(
        # 80 layers at detail layer are 19,600 series, with a baseline 22,000.
        25_000,
        f"Time series of a server, 1 to {MAX_SERIES}; a detail that would make more falls back one level, "
        "because series are what Prometheus pays for.",
        f"must be between 1 and {MAX_SERIES}",
        "use `detail: model` for few series",
        ge=1,
        le=MAX_SERIES,
    )

    @property
    def shown_at_vllm(self) -> bool:
        """Whether metrics are shown at vLLM's own /metrics."""
        return self.enabled and self.on_vllm_port


class OtelConfig(_Section):
    """Metrics and spans sent by OTLP. Unset values follow the OTEL_* environment variables."""

    enabled: bool = _switch(False, "Whether anything is sent by OTLP.")
    # Before endpoint, whose rule depends on it.
    protocol: Literal["grpc", "http"] | None = _field(
        None,
        "OTLP over gRPC or over HTTP (protobuf). null: OTEL_EXPORTER_OTLP_PROTOCOL, else grpc.",
        "must be grpc, http or null",
        "use `grpc` for port 4317, `http` for port 4318",
    )
    endpoint: str | None = _field(
        None,
        "URL of the collector, http or https; with grpc also host:port; with http the signals go to /v1/metrics, "
        "/v1/traces and /v1/logs below it. null: OTEL_EXPORTER_OTLP_ENDPOINT.",
        "must be a URL or null",
        "use a URL such as `http://collector:4317`",
    )
    metrics: bool = _switch(True, "Whether metrics are sent.")
    traces: bool = _switch(True, "Whether spans of traced requests are sent.")
    logs: bool = _switch(
        False,
        "Whether probes' results are log records, not events of these spans; for collectors with a pipeline of logs.",
    )
    headers: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # may hold an authorization token
        description="Headers of each OTLP request, text to text, such as an authorization.",
        json_schema_extra={
            "rule": "must be a mapping of header names to strings",
            "remedy": 'write `{name: "value"}`',
        },
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or _is_url(value):
            return value
        if info.data.get("protocol") != "http":
            if not _is_host_port(value):
                raise ValueError("must be a URL or host:port; use a URL such as `http://collector:4317`")
            return value
        raise ValueError("must be an http or https URL; use a URL such as `http://collector:4318`")

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        grpc = info.data.get("protocol") != "http"
        for name, text in value.items():
            # What gRPC can't send: its own library refuses each export with it.
            if grpc and (not re.fullmatch(r"[0-9A-Za-z_.-]+", name) or name.lower().endswith("-bin") or "\t" in text):
                raise ValueError(
                    "must be, for gRPC, names of letters, digits, _ . or -, not ending in -bin, and values without "
                    "tabs; correct them, or use `protocol: http`"
                )
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\t\x20-\x7e]*", text):
                raise ValueError("must be header names and printable ASCII values; remove blanks and line breaks")
        return value


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        # .port raises if it is not a number in range; the codec, if a label of the name is empty or too long.
        (parts.hostname or "").encode("idna")
        named = bool((parts.hostname or "").strip("."))
        return (
            parts.scheme in {"http", "https"} and named and parts.port != 0 and not parts.fragment and _is_seen(value)
        )
    except ValueError:
        return False


def _is_seen(value: str) -> bool:
    """Whether there are no blanks, line breaks and other characters that urlsplit drops or a server never sees."""
    return value.isprintable() and " " not in value


def _is_host_port(value: str) -> bool:
    return "/" not in value and ":" in value and _is_url(f"http://{value}") and urlsplit(f"//{value}").port is not None


class JsonlConfig(_FileSection):
    """Summaries of each export interval as lines of JSON in a file."""

    path: _Path | None = _field(
        None,
        "File that is appended to; a leading ~ is the home directory. null: none is written.",
        "must be a file's path or null",
        "use `null` to write none",
    )
    max_mb: int = _field(
        256,
        "MB, 1 to 1048576: size at which the file is rotated, so that it can't fill the disk.",
        "must be between 1 and 1048576",
        "use `path: null` to write none",
        ge=1,
        le=1_048_576,
    )


class BaselineConfig(_FileSection):
    """The run that the drift metrics compare with (`glassbox baseline save` writes its file)."""

    path: _Path | None = _field(
        None,
        "File of `glassbox baseline save`; a leading ~ is the home directory. null: nothing is compared.",
        "must be a file's path or null",
        "use `null` to compare with nothing",
    )
    min_rows: int = _field(
        # A healthy model under mixed traffic: indices up to 0.58 with 150 rows of a head, 0.39 with 300, 0.28 with 700
        # (docs/incidents.md); the alert fires above 0.5.
        500,
        "Rows, 1 to 1000000000, that a head must have on either side: few rows, above all of few requests, differ "
        "without any change.",
        "must be between 1 and 1000000000",
        "use `500`",
        ge=1,
        le=1_000_000_000,
    )
    window_s: float = _field(
        600.0,
        "Seconds, 1 to 86400, of most recent rows that are compared; up to a quarter more, because only a few older "
        "states are kept.",
        "must be between 1 and 86400 seconds",
        "use `600`",
        ge=1,
        le=86_400,
    )


class ProbeConfig(_Section):
    """One probe that scores traced requests."""

    file: _Path = _field(
        ...,
        "Probe file of `glassbox train`; a leading ~ is the home directory.",
        "must be the path of a probe's file",
        "write `probes: [{file: probe.json}]`",
    )
    threshold: float | None = _field(
        None,
        "Score, 0 to 1, from which on a request is flagged. null: the one in the probe's file.",
        "must be between 0 and 1, or null",
        "write `probes: [{file: probe.json, threshold: 0.5}]`, or leave it out for the one in the file",
        ge=0,
        le=1,
    )

    @property
    def expanded_path(self) -> Path:
        """`file` with ~ replaced."""
        return Path(self.file).expanduser()


class CanaryConfig(_Section):
    """How often served outputs are reproduced while serving."""

    interval_s: float = _field(
        30.0,
        "Seconds, 1 to 86400, between two checks that a few rows of each layer were served as glassbox computes them "
        "from the KV cache; 0 checks each layer at its first prefill and decode alone.",
        "must be 0, or between 1 and 86400 seconds",
        "use `30`",
        ge=0,
        le=86_400,
    )

    @field_validator("interval_s")
    @classmethod
    def _not_all_the_time(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 0, or between 1 and 86400 seconds; use `30`")
        return value


class AdaptersConfig(_Section):
    """Statistics by LoRA adapter."""

    max: int = _field(
        0,
        f"LoRA adapters, 0 to {MAX_ADAPTERS}, whose statistics are shown apart: the first ones that a worker serves. "
        "The others share one place; 0 tells none apart. Needs a restart.",
        f"must be between 0 and {MAX_ADAPTERS}",
        "use `0` to tell none apart",
        ge=0,
        le=MAX_ADAPTERS,
    )


class ExportConfig(_Section):
    """Where the numbers go."""

    interval_s: float = _field(
        5.0,
        "Seconds between snapshots, 0.1 to 3600: the age of what is shown against copies from the device.",
        "must be between 0.1 and 3600 seconds",
        "use `5`",
        ge=0.1,
        le=3600,
    )
    prometheus: PrometheusConfig = _section(PrometheusConfig)
    http: HttpConfig = _section(HttpConfig)
    otel: OtelConfig = _section(OtelConfig)
    jsonl: JsonlConfig = _section(JsonlConfig)

    @field_validator("http")
    @classmethod
    def _check_tls(cls, value: HttpConfig) -> HttpConfig:
        tls = {name: getattr(value, name) for name in ("cert_file", "key_file", "client_ca_file")}
        missing = [name for name in ("cert_file", "key_file") if tls[name] is None]
        if missing and any(tls.values()):
            raise ValueError(f"must have cert_file and key_file for TLS; set {' and '.join(missing)}")
        return value

    @field_validator("http")
    @classmethod
    def _check_one_port(cls, value: HttpConfig, info: ValidationInfo) -> HttpConfig:
        old = getattr(info.data.get("prometheus"), "port", None)
        if old is not None and value.port not in {None, old}:
            raise ValueError(
                f"must have the port of export.prometheus.port, {old}, which its own replaces; "
                "delete export.prometheus.port"
            )
        return value

    @property
    def own_port(self) -> int | None:
        """TCP port of glassbox's own; None: there is none."""
        if self.http.port is not None:
            return self.http.port
        return self.prometheus.port if self.prometheus.enabled else None


class AuditConfig(_FileSection):
    """What the rules did, as a file."""

    path: _Path | None = _field(
        None,
        "File of JSON lines, one for each thing that a rule did or would have done; a leading ~ is the home directory. "
        "null: none is written.",
        "must be a file's path or null",
        "use `null` to write none",
    )
    max_mb: int = _field(
        64,
        "MB, 1 to 1048576: size at which the file is rotated; four times as much is kept.",
        "must be between 1 and 1048576",
        "use `path: null` to write none",
        ge=1,
        le=1_048_576,
    )


class WebhookConfig(_Section):
    """Where a rule's events are sent."""

    url: str | None = _field(
        None,
        "URL that events are posted to: https, or http of this host.",
        "must be an https URL, or an http URL of this host, or null",
        "use a URL such as `https://example.org/hook`",
        repr=False,  # those of chat services hold their secret in the path
    )
    secret_file: _Path | None = _file("File with the secret that events are signed with; others may not read it.")

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None or (_is_url(value) and (value.startswith("https:") or _is_this_host(value))):
            return value
        raise ValueError(
            "must be an https URL, or an http URL of this host, or null; use a URL such as `https://example.org/hook`"
        )


def _which(one: object) -> str:
    """Of two keys of which exactly one is wanted, and isn't there."""
    return "neither" if one is None else "both"


def _is_this_host(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


ActionName = Literal["log", "tag", "abort", "webhook"]


class RuleConfig(_Section):
    """When something is done about a traced request, and what."""

    name: str = Field(
        description="Of the rule, in metrics and records: 1 to 64 letters, digits, _, . and -.",
        json_schema_extra={
            "rule": "must be 1 to 64 letters, digits, _, . or -",
            "remedy": "give it one such as `injection`",
        },
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
    )
    probe: str | None = _field(
        None,
        "Name of a probe of `probes`, whose score is looked at: a probability.",
        "must be a probe's name or null",
        "name one of `probes`",
        min_length=1,
        max_length=128,
    )
    signal: str | None = _field(
        None,
        "NAME.VALUE of a signal (docs/signals.md), which is looked at; of one with a number for each layer and head "
        "their mean.",
        "must be NAME.VALUE of a signal, or null",
        "write one such as `spectral.sv_ratio`",
        pattern=r"^[a-z_0-9]+\.[A-Za-z0-9_.-]{1,96}$",
    )
    above: float | None = _field(
        None,
        "The rule applies where the number is larger.",
        "must be a number or null",
        "give either above or below",
    )
    below: float | None = _field(
        None,
        "The rule applies where the number is smaller.",
        "must be a number or null",
        "give either above or below",
    )
    when: Literal["running", "ended"] | None = _field(
        None,
        "running: a request is looked at several times a second while it runs, and at its end; ended: once it has "
        "ended. null: running if the rule aborts, else ended.",
        "must be running, ended or null",
        "use `null` if in doubt",
    )
    min_generated: int = _field(
        0,
        "Tokens, 0 to 1048576, that a request must have generated: numbers of few rows scatter.",
        "must be between 0 and 1048576",
        "use `0` for no such bound",
        ge=0,
        le=1_048_576,
    )
    do: tuple[ActionName, ...] = _field(
        ("log",),
        "What is done: any of log, tag, abort and webhook.",
        "must be a list of log, tag, abort and webhook, each once",
        "write `[log]`",
        strict=False,
        min_length=1,
    )
    dry_run: bool = _switch(
        True, "Whether the rule only says what it would do: in the log, the counter and the audit file."
    )
    per_minute: int = _field(
        60,
        "Requests, 1 to 6000 a minute, for which the rule does something; for further ones it is only counted.",
        "must be between 1 and 6000",
        "use `60`",
        ge=1,
        le=6000,
    )
    webhook: WebhookConfig = _section(WebhookConfig)

    @field_validator("do")
    @classmethod
    def _check_do(cls, value: tuple[ActionName, ...]) -> tuple[ActionName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must be a list of log, tag, abort and webhook, each once; delete the repeated one")
        return value

    @field_validator("signal")
    @classmethod
    def _check_signal(cls, value: str | None) -> str | None:
        signal, _, name = (value or "").partition(".")
        if value is not None and signal not in SIGNAL_NAMES:
            raise ValueError(f"must be a value of one of the signals {', '.join(SIGNAL_NAMES)}; write one of these")
        if value is None:
            return None
        row = signal_row(signal)
        of_span = any(name.startswith(f"{one}_") and name != f"{one}_" for one in row.by_span)
        if name not in row.values and not of_span:
            known = [f"{signal}.{one}" for one in row.values] + [f"{signal}.{one}_SPAN" for one in row.by_span]
            raise ValueError(f"must be one of {', '.join(known)}; write one of these")
        return value

    @model_validator(mode="after")
    def _check_whole(self) -> "RuleConfig":
        if (self.probe is None) == (self.signal is None):
            raise ValueError(f"must have either probe or signal, got {_which(self.probe)}; give one of them")
        if (self.above is None) == (self.below is None):
            raise ValueError(f"must have either above or below, got {_which(self.above)}; give one of them")
        if "abort" in self.do and self.when == "ended":
            raise ValueError(
                "must look at requests that run, to abort them, got when: ended; write `when: running`, or remove abort"
            )
        if self.watches_running and self.signal and is_on_demand(self.signal.partition(".")[0]):
            raise ValueError(
                f"must look at {self.signal} once requests have ended, for it is made of all their queries and keys, "
                f"got {'abort' if 'abort' in self.do else 'when: running'}; write `when: ended`, without abort"
            )
        if "webhook" in self.do and (self.webhook.url is None or self.webhook.secret_file is None):
            given = [name for name in ("url", "secret_file") if getattr(self.webhook, name) is not None]
            raise ValueError(
                "must have webhook.url and webhook.secret_file to send webhooks, got "
                f"{given[0] if given else 'neither'}; give both, or remove webhook from do"
            )
        return self

    @property
    def watches_running(self) -> bool:
        """Whether requests are looked at while they run."""
        return self.when == "running" or (self.when is None and "abort" in self.do)

    @property
    def source(self) -> str:
        """What is looked at, in words."""
        return f"probe {self.probe}" if self.probe is not None else f"signal {self.signal}"

    @property
    def condition(self) -> str:
        """What is looked at and when it applies, in words."""
        return f"{self.source} {'above' if self.above is not None else 'below'} {self.threshold:g}"

    @property
    def threshold(self) -> float:
        """The number that is compared with."""
        threshold = self.above if self.above is not None else self.below
        assert threshold is not None
        return threshold

    def applies(self, value: float) -> bool:
        """Whether it applies to a number; never to NaN."""
        return value > self.threshold if self.above is not None else value < self.threshold

    @property
    def secret_path(self) -> Path | None:
        """`webhook.secret_file` with ~ replaced, None if no webhook is sent."""
        path = self.webhook.secret_file
        return Path(path).expanduser() if path is not None and "webhook" in self.do else None


class ActionsConfig(_Section):
    """What is done about traced requests whose attention tells something."""

    audit: AuditConfig = _section(AuditConfig)
    rules: tuple[RuleConfig, ...] = _field(
        (),
        f"Rules, at most {MAX_RULES}: a name, a probe or signal, a threshold, and what to do (docs/actions.md).",
        f"must be a list of at most {MAX_RULES} rules with different names",
        "use `[]` for none",
        strict=False,
        max_length=MAX_RULES,
    )

    @field_validator("rules")
    @classmethod
    def _check_names(cls, value: tuple[RuleConfig, ...]) -> tuple[RuleConfig, ...]:
        names = [rule.name for rule in value]
        if len(set(names)) < len(names):
            raise ValueError("must have different names, since metrics tell them apart by these; rename one")
        return value

    @property
    def watches_running(self) -> bool:
        """Whether requests are looked at while they run."""
        return any(rule.watches_running for rule in self.rules)

    @property
    def reaches_requests(self) -> bool:
        """Whether API servers have something to do for a rule: end a request, or tag a response."""
        return any(not rule.dry_run and {"abort", "tag"} & set(rule.do) for rule in self.rules)


class GlassboxConfig(_Section):
    """The whole file. Every key may be left out."""

    enabled: bool = _switch(True, "Whether glassbox observes at all. false to true needs a restart.")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_as_level)] = _field(
        "info",
        "Least severe message that glassbox logs, in any case; vLLM's own level is not touched.",
        "must be debug, info, warning or error",
        "use `info` if in doubt",
    )
    sample_rate: float = _field(
        0.01,
        "Share of engine steps in which a layer is measured, 0 to 1.",
        "must be between 0 and 1",
        "use `0` to stop sampling",
        ge=0,
        le=1,
    )
    attach: Literal["auto", "custom"] = _field(
        "auto",
        "auto: observe whatever backend vLLM picks; custom: only with --attention-backend CUSTOM. Needs a restart.",
        "must be auto or custom",
        "use `auto` to observe whatever backend vLLM picks",
    )
    inner_backend: Annotated[str, AfterValidator(_check_inner_backend)] = _field(
        "auto",
        f"What CUSTOM wraps: auto, or one of {', '.join(SUPPORTED_INNER_BACKENDS)}. Needs a restart.",
        f"must be auto or one of {', '.join(SUPPORTED_INNER_BACKENDS)}",
        "use `auto` if in doubt",
    )
    compat: Literal["auto", "tested"] = _field(
        "auto",
        "auto: on a vLLM newer than the tested ones layers are observed once their output was reproduced; tested: the "
        "server runs unobserved there. Needs a restart.",
        "must be auto or tested",
        "use `auto` if in doubt",
    )
    sampling: SamplingConfig = _section(SamplingConfig)
    statistics: StatisticsConfig = _section(StatisticsConfig)
    adapters: AdaptersConfig = _section(AdaptersConfig)
    requests: RequestsConfig = _section(RequestsConfig)
    probes: tuple[ProbeConfig, ...] = _field(
        (),
        f"Probes that score each traced request when it has ended, at most {MAX_PROBES}: mappings of file and, if it "
        "isn't the file's own, threshold.",
        f"must be a list of at most {MAX_PROBES} probes",
        "write `[{file: probe.json}]`, or `[]` for none",
        strict=False,
        max_length=MAX_PROBES,
    )
    canary: CanaryConfig = _section(CanaryConfig)
    baseline: BaselineConfig = _section(BaselineConfig)
    actions: ActionsConfig = _section(ActionsConfig)
    export: ExportConfig = _section(ExportConfig)

    @property
    def sampled_signals(self) -> tuple[str, ...]:
        """Signals of requests that the trace rate chooses: those of `requests`, and what rules look at."""
        of_rules = (rule.signal.partition(".")[0] for rule in self.actions.rules if rule.signal is not None)
        return tuple(dict.fromkeys([*self.requests.signals, *of_rules]))

    @field_validator("probes")
    @classmethod
    def _check_probes(cls, value: tuple[ProbeConfig, ...]) -> tuple[ProbeConfig, ...]:
        files = [probe.file for probe in value]
        if (repeated := next((file for i, file in enumerate(files) if file in files[:i]), None)) is not None:
            raise ValueError(f"must name each file once, not {printable(repeated)!r} twice; delete one of them")
        return value
