"""The YAML file: what is accepted, what is refused, and in which words."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from glassbox.config.load import (
    MAX_CONFIG_BYTES,
    RESTART_FIELDS,
    SUPPORTED_INNER_BACKENDS,
    ConfigError,
    GlassboxConfig,
    LayerSelection,
    changes,
    find_config,
    load_config,
    packaged_config,
    parse_config,
    replaced_keys,
    restart_needed,
)
from glassbox.config.wording import all_keys

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "glassbox.yaml"


def message(path: Path, content: str | bytes) -> str:
    """The error of a file with this content, without the path it starts with."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


class TestGoodFiles:
    @pytest.mark.parametrize("name", ["glassbox", "debug", "production"])
    def test_shipped(self, name: str) -> None:
        """The files in configs/ are good."""
        load_config(ROOT / "configs" / f"{name}.yaml")

    def test_packaged_is_the_default(self) -> None:
        """The packaged file says what is the case without it, and names every key."""
        assert load_config(packaged_config()) == GlassboxConfig()
        text = packaged_config().read_text()
        assert [key for key in all_keys(GlassboxConfig) if f"{key.rpartition('.')[2]}:" not in text] == []

    def test_examples_differ_as_they_say(self) -> None:
        """debug.yaml measures everything; production.yaml has a budget."""
        debug = load_config(ROOT / "configs/debug.yaml")
        assert (debug.sample_rate, debug.log_level, debug.export.prometheus.detail) == (1.0, "debug", "head")
        production = load_config(ROOT / "configs/production.yaml")
        assert production.sampling.overhead_budget == 0.01
        assert (production.sample_rate, production.export.prometheus.detail) == (0.01, "layer")
        assert not production.export.otel.enabled

    def test_part(self, config_file: Path) -> None:
        """Keys left out have their defaults."""
        config_file.write_text("sampling: {max_rows_per_step: 7}")
        config = load_config(config_file)
        assert config.sampling.max_rows_per_step == 7
        assert (config.sample_rate, config.sampling.prefill_rows_per_request) == (0.01, 8)

    def test_byte_order_mark(self, config_file: Path) -> None:
        """A UTF-8 byte order mark, as Windows editors write, is no error."""
        config_file.write_bytes(b"\xef\xbb\xbfsample_rate: 1\n")
        assert load_config(config_file).sample_rate == 1.0

    def test_frozen(self) -> None:
        """A configuration can't be changed."""
        with pytest.raises(ValueError, match="frozen"):
            GlassboxConfig().sample_rate = 1.0

    @pytest.mark.parametrize("name", ["glassbox", "debug", "production"])
    def test_dump(self, name: str) -> None:
        """model_dump gives plain YAML values that make the same configuration again."""
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        assert GlassboxConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config

    def test_every_field_is_described(self) -> None:
        """Each field has a description, and a rule and remedy for its error."""

        def check(model: type) -> None:
            for name, field in model.model_fields.items():
                assert field.description, name
                assert {"rule", "remedy"} <= set(field.json_schema_extra), name
                if hasattr(field.annotation, "model_fields"):
                    check(field.annotation)

        check(GlassboxConfig)

    @pytest.mark.parametrize(
        ("endpoint", "protocol"),
        [
            ("http://collector:4317", "grpc"),
            ("https://c.example", "grpc"),
            ("collector:4317", "grpc"),
            ("[::1]:4317", "grpc"),
            ("http://127.0.0.1:4318/v1/metrics", "http"),
        ],
    )
    def test_endpoints(self, config_file: Path, endpoint: str, protocol: str) -> None:
        """An endpoint is a URL, for gRPC also host:port."""
        config_file.write_text(yaml.safe_dump({"export": {"otel": {"endpoint": endpoint, "protocol": protocol}}}))
        assert load_config(config_file).export.otel.endpoint == endpoint

    @pytest.mark.parametrize(
        "endpoint",
        ["http://", "http://.", "http://a..b", "http://c:0", "http://c:99999", "http://[::1", "http://c d", "http://c\nd",
         "http://c\u202e", "http://c#d",  f"http://{'x' * 64}.com",
         "file:///etc/passwd", "http:c", "//c:1", "c:", ":4317"],
    )  # fmt: skip
    def test_no_endpoints(self, config_file: Path, endpoint: str) -> None:
        """What no connection can be made to is none."""
        text = message(config_file, yaml.safe_dump({"export": {"otel": {"endpoint": endpoint}}}))
        assert text.startswith("export.otel.endpoint must be a URL or host:port, got ")
        assert text.endswith("; use a URL such as http://collector:4317")
        assert text.isprintable()

    @pytest.mark.parametrize(
        ("written", "level"),
        [("DEBUG", "debug"), ("Info", "info"), ("WARN", "warning"), ("warn", "warning"), ("eRRor", "error")],
    )
    def test_log_levels(self, config_file: Path, written: str, level: str) -> None:
        """A level as other programs write it."""
        config_file.write_text(f"log_level: {written}")
        assert level == load_config(config_file).log_level

    @pytest.mark.parametrize(
        ("written", "rate"), [("1e-3", 0.001), ("1E-5", 1e-5), (".5", 0.5), ("5e-1", 0.5), ("+.25", 0.25), ("1e0", 1.0)]
    )
    def test_numbers(self, config_file: Path, written: str, rate: float) -> None:
        """Numbers are those of YAML 1.2."""
        config_file.write_text(f"sample_rate: {written}")
        assert rate == load_config(config_file).sample_rate

    def test_unclear_numbers_as_text(self, config_file: Path) -> None:
        """Where text is wanted, 0100, 1:30 and a date are what is written."""
        config_file.write_text("export: {otel: {headers: {a: 0100, b: 1:30, c: 2026-11-30}}}")
        headers = load_config(config_file).export.otel.headers
        assert {"a": "0100", "b": "1:30", "c": "2026-11-30"} == headers
        assert {str} == set(map(type, headers.values()))

    def test_home(self, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """~ in jsonl.path and baseline.path is the home directory."""
        monkeypatch.setenv("HOME", "/home/someone")
        config_file.write_text("{export: {jsonl: {path: ~/traces.jsonl}}, baseline: {path: ~/b.npz}}")
        assert load_config(config_file).export.jsonl.expanded_path == Path("/home/someone/traces.jsonl")
        assert load_config(config_file).baseline.expanded_path == Path("/home/someone/b.npz")

    def test_no_secrets_in_repr(self, config_file: Path) -> None:
        """A header's value does not show in the configuration's repr."""
        config_file.write_text("export: {otel: {headers: {authorization: Bearer s3cret}}}")
        config = load_config(config_file)
        assert config.export.otel.headers == {"authorization": "Bearer s3cret"}
        assert "s3cret" not in repr(config)


class TestOwnPort:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{}", None),
            ("{http: {port: 1}}", 1),
            ("{prometheus: {port: 2}}", 2),
            ("{http: {port: 2}, prometheus: {port: 2}}", 2),
            ("{prometheus: {port: 2, enabled: false}}", None),
            ("{http: {port: 1}, prometheus: {enabled: false}}", 1),
        ],
    )
    def test_either_key_opens_it(self, tmp_path: Path, content: str, expected: int | None) -> None:
        """The old one only with Prometheus's metrics, as ever; both may say the same."""
        config = parse_config(tmp_path, f"export: {content}".encode())
        assert expected == config.export.own_port

    @pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "::", "[::]", "::1", "[::1]", "fe80::1%eth0", "a_b.c-d"])
    def test_hosts_of_all_kinds(self, tmp_path: Path, host: str) -> None:
        """Names, IPv4, IPv6 with and without brackets."""
        assert host == parse_config(tmp_path, f"export: {{http: {{host: '{host}'}}}}".encode()).export.http.host

    def test_the_old_key_says_what_replaces_it(self, tmp_path: Path) -> None:
        """And how to open it, as it is no longer open to everybody; not if the new one says where it listens."""
        (line,) = replaced_keys(parse_config(tmp_path, b"export: {prometheus: {port: 2}}"))
        assert line.startswith("export.prometheus.port is replaced by export.http.port; it listens on 127.0.0.1 alone")
        (line,) = replaced_keys(parse_config(tmp_path, b"export: {prometheus: {port: 2}, http: {host: 0.0.0.0}}"))
        assert "export.prometheus.port is replaced by export.http.port" == line
        assert [] == replaced_keys(parse_config(tmp_path, b"export: {http: {port: 2}}"))


class TestLayers:
    @pytest.mark.parametrize(
        ("text", "selected"),
        [
            ("all", (0, 2, 3, 4, 7)),
            ("[4, 0, 2]", (0, 2, 4)),
            ("[2, 9]", (2,)),
            ("{every: 2}", (0, 3, 7)),
            ("{every: 9}", (0,)),
            ("{every: 1}", (0, 2, 3, 4, 7)),
        ],
    )
    def test_select(self, config_file: Path, text: str, selected: tuple[int, ...]) -> None:
        """The chosen ones among the observed layers of a hybrid model, ascending."""
        config_file.write_text(f"sampling: {{layers: {text}}}")
        assert load_config(config_file).sampling.layers.select((0, 2, 3, 4, 7)) == selected

    @pytest.mark.parametrize(("text", "at_once"), [("all", [0, 3, 40]), ("1", [0, 1, 1]), ("8", [0, 3, 8])])
    def test_layers_per_step(self, config_file: Path, text: str, at_once: list[int]) -> None:
        """Never more than there are; what the file says is what `glassbox check` shows of it."""
        config_file.write_text(f"sampling: {{layers_per_step: {text}}}")
        sampling = load_config(config_file).sampling
        assert at_once == [sampling.layers_at_once(num_layers) for num_layers in (0, 3, 40)]
        assert text == str(sampling.model_dump()["layers_per_step"])

    def test_missing(self) -> None:
        """Indices that no observed layer has can be told."""
        assert LayerSelection(indices=(0, 5, 9)).missing((0, 4, 9)) == (5,)
        assert LayerSelection(every=3).missing((0, 4, 9)) == ()


class TestBadValues:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("sample_rate: 3", "sample_rate must be between 0 and 1, got 3; use 0 to stop sampling"),
            ("sample_rate: -0.1", "sample_rate must be between 0 and 1, got -0.1; use 0 to stop sampling"),
            ("sample_rate: .nan", "sample_rate must be between 0 and 1, got nan; use 0 to stop sampling"),
            (
                "sample_rate: '0.1'",
                "sample_rate must be a number, got the string '0.1'; write 0.1 without quotes",
            ),
            ("sample_rate: '3'", "sample_rate must be a number, got the string '3'; use 0 to stop sampling"),
            (
                "export: {prometheus: {port: 0100}}",
                "export.prometheus.port must be a whole number, got 0100, which may be read as 64 or 100; "
                "write 64 or 100",
            ),
            (
                "requests: {max_active: 1:30}",
                "requests.max_active must be a whole number, got 1:30, which may be read as 90; write 90",
            ),
            ("export: {interval_s: 0x1F}", "export.interval_s must be a number, got 0x1F, which may be read as 31;"),
            ("sample_rate: !!float 1_0.5", "sample_rate must be a number, got 1_0.5, which may be read as 10.5;"),
            (
                "export: {prometheus: {port: 1e3}}",
                "export.prometheus.port must be a whole number, got 1000.0; write 1000",
            ),
            ("enabled: 'yes'", "enabled must be true or false, got the string 'yes'; write true without quotes"),
            (
                "export: {prometheus: {detail: Head}}",
                "export.prometheus.detail must be model, layer or head, got the string 'Head'; write head",
            ),
            ("sample_rate: true", "sample_rate must be a number, got true; write a plain number"),
            (
                "sample_rate: null",
                "sample_rate must be a number, got null; give it a value, or delete the line to",
            ),
            ("enabled: 1", "enabled must be true or false, got 1; write true without quotes"),
            (
                "enabled: maybe",
                "enabled must be true or false, got the string 'maybe'; write true or false without quotes",
            ),
            (
                "log_level: off",
                "log_level must be debug, info, warning or error, got false; use info if in doubt (on, off,",
            ),
            (
                "log_level: trace",
                "log_level must be debug, info, warning or error, got the string 'trace'; use info",
            ),
            (
                "sampling: {layers_per_step: 0}",
                "sampling.layers_per_step must be all or a whole number of at least 1, got 0; use all to measure all",
            ),
            ("sampling: {layers_per_step: true}", "sampling.layers_per_step must be all or a whole number"),
            ("sampling: {layers_per_step: 1.5}", "sampling.layers_per_step must be all or a whole number"),
            ("sampling: {layers_per_step: some}", "sampling.layers_per_step must be all or a whole number"),
            (
                "sampling: {max_rows_per_step: true}",
                "sampling.max_rows_per_step must be a whole number, got true;",
            ),
            (
                "sampling: {max_rows_per_step: 8.0}",
                "sampling.max_rows_per_step must be a whole number, got 8.0;",
            ),
            (
                "sampling: {max_rows_per_step: 0}",
                "sampling.max_rows_per_step must be between 1 and 4096, got 0;",
            ),
            (
                "sampling: {overhead_budget: 0}",
                "sampling.overhead_budget must be above 0 and at most 1, or null,",
            ),
            ("sampling: {layers: [1, 1]}", "sampling.layers must name each layer once, got [1, 1];"),
            (
                "sampling: {layers: [-1]}",
                "sampling.layers must list layer indices, whole numbers from 0, got [-1];",
            ),
            ("sampling: {layers: [true]}", "sampling.layers must list layer indices"),
            ("sampling: {layers: []}", "sampling.layers must list layer indices"),
            (
                "sampling: {layers: {every: 0}}",
                "sampling.layers must have a whole number of at least 1 for every",
            ),
            ("sampling: {layers: {indices: [1]}}", "sampling.layers must be all, a list or {every: k}"),
            (
                "sampling: {layers: some}",
                "sampling.layers must be all, a list or {every: k}, got the string 'some';",
            ),
            (
                "sampling: 3",
                "sampling must be a mapping, got 3; indent its keys below it, or delete the line",
            ),
            ("sampling:", "sampling must be a mapping, got null; give it a value, or delete the line"),
            ("statistics: {sink_tokens: 0}", "statistics.sink_tokens must be between 1 and 1024, got 0;"),
            ("requests: {trace_rate: 1.5}", "requests.trace_rate must be between 0 and 1, got 1.5;"),
            (
                "requests: {client_header: 'X Tenant'}",
                "requests.client_header must be the name of a header or null, got",
            ),
            (
                "requests: {client_header: ''}",
                "requests.client_header must be the name of a header or null, got the string '';",
            ),
            ("requests: {isolate: 1}", "requests.isolate must be true or false, got 1;"),
            ("requests: {per_client: {keep: 0}}", "requests.per_client.keep must be between 1 and 100000, got 0;"),
            (
                "requests: {per_client: {rows_per_second: 0}}",
                "requests.per_client.rows_per_second must be between",
            ),
            (
                "export: {interval_s: 0}",
                "export.interval_s must be between 0.1 and 3600 seconds, got 0; use 5",
            ),
            (
                "export: {prometheus: {port: 0}}",
                "export.prometheus.port must be between 1 and 65535, or null, got 0;",
            ),
            ("export: {http: {port: 65536}}", "export.http.port must be between 1 and 65535, or null, got 65536;"),
            *(
                (f"export: {{http: {{host: '{host}'}}}}", "export.http.host must be an address or a host name, without")
                for host in (
                    "",
                    "a b",
                    "127.0.0.1:9464",
                    "http://x",
                    "256.1.1.1",
                    "127.1",
                    "[127.0.0.1]",
                    "[::1",
                    "-a",
                    "é",
                )
            ),
            (
                "export: {http: {allowed_hosts: ['a:1']}}",
                "export.http.allowed_hosts must be a list of host names, without ports,",
            ),
            (
                "export: {http: {cert_file: a}}",
                "export.http must have cert_file and key_file for TLS, got a mapping; set key_file",
            ),
            (
                "export: {http: {client_ca_file: a}}",
                "export.http must have cert_file and key_file for TLS, got a mapping; set cert_file and key_file",
            ),
            (
                "export: {http: {port: 1}, prometheus: {port: 2}}",
                "export.http must have the port of export.prometheus.port, 2, which its own replaces, got a mapping; "
                "delete export.prometheus.port",
            ),
            (
                "export: {prometheus: {detail: rank}}",
                "export.prometheus.detail must be model, layer or head,",
            ),
            ("export: {otel: {endpoint: nowhere}}", "export.otel.endpoint must be a URL or host:port,"),
            ("export: {otel: {endpoint: 'ftp://c:1'}}", "export.otel.endpoint must be a URL or host:port,"),
            ("export: {otel: {endpoint: 'c:99999'}}", "export.otel.endpoint must be a URL or host:port,"),
            (
                "export: {otel: {endpoint: 'c:4317', protocol: http}}",
                "export.otel.endpoint must be an http or https URL, got the string 'c:4317'; use a URL",
            ),
            ("baseline: {path: ''}", "baseline.path must be a file's path or null, got the string '';"),
            ("baseline: {path: 3}", "baseline.path must be"),
            ("baseline: {min_rows: 0}", "baseline.min_rows must be between 1 and 1000000000, got 0; use 500"),
            ("baseline: {window_s: 0.5}", "baseline.window_s must be between 1 and 86400 seconds, got 0.5; use 600"),
            ("baseline: {windows: 5}", "baseline.windows is not a known key; did you mean baseline.window_s?"),
            (
                "export: {jsonl: {path: ''}}",
                "export.jsonl.path must be a file's path or null, got the string '';",
            ),
        ],
    )
    def test_message(self, config_file: Path, content: str, expected: str) -> None:
        """An error names key, rule, value and remedy."""
        assert message(config_file, content).startswith(expected)

    def test_inner_backend(self, config_file: Path) -> None:
        """A wrong inner_backend is answered with the right names."""
        text = message(config_file, "inner_backend: FLASHATTN")
        assert text == (
            f"inner_backend must be auto or one of {', '.join(SUPPORTED_INNER_BACKENDS)}, "
            "got the string 'FLASHATTN'; use auto if in doubt"
        )

    def test_several(self, config_file: Path) -> None:
        """Of several errors the first is told, and how many more there are."""
        text = message(config_file, "sample_rate: 3\nrequests: {opt_in: 7}\nfoo: 1")
        assert text == "sample_rate must be between 0 and 1, got 3; use 0 to stop sampling (and 2 more)"

    def test_long_value(self, config_file: Path) -> None:
        """A long value is shortened."""
        assert len(message(config_file, f"log_level: {'x' * 10_000}")) < 200

    @pytest.mark.parametrize(
        "headers",
        [
            '{authorization: "s3cret\\n"}',
            "{'a b': s3cret}",
            "[s3cret]",
            "{1: s3cret}",
            "{a: [s3cret]}",
            "s3cret",
        ],
    )
    def test_no_secrets_in_messages(self, config_file: Path, headers: str) -> None:
        """An error about headers does not show them."""
        text = message(config_file, f"export: {{otel: {{headers: {headers}}}}}")
        assert text.startswith("export.otel.headers")
        assert "s3cret" not in text

    @pytest.mark.parametrize("headers", ["{x-bin: s3cret}", "{'x*y': s3cret}", '{x: "s3\\tcret"}'])
    def test_headers_that_grpc_cannot_send(self, config_file: Path, headers: str) -> None:
        """Its library refuses each export with them; as the message says, HTTP can."""
        text = message(config_file, f"export: {{otel: {{headers: {headers}}}}}")
        assert text.startswith("export.otel.headers must be, for gRPC, names of letters, digits, _ . or -, not ending")
        assert text.endswith("correct them, or use protocol: http")
        config_file.write_text(f"export: {{otel: {{protocol: http, headers: {headers}}}}}")
        load_config(config_file)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("sampel_rate: 1", "sampel_rate is not a known key; did you mean sample_rate?"),
            (
                "export: {prometheus: {prot: 1}}",
                "export.prometheus.prot is not a known key; did you mean export.prometheus.port?",
            ),
            ("sink_tokens: 4", "sink_tokens is not a known key; did you mean statistics.sink_tokens?"),
            (
                "statistics: {xyz: 4}",
                "statistics.xyz is not a known key; known here: sink_tokens, local_window",
            ),
            ("3: 4", "3 is not a known key; known here: enabled, log_level,"),
        ],
    )
    def test_suggestion(self, config_file: Path, content: str, expected: str) -> None:
        """An unknown key is answered with the nearest known one, or with all there are."""
        assert message(config_file, content).startswith(expected)


class TestBadFiles:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("", "must not be empty"),
            ("# only a comment\n", "must not be empty"),
            ("- 1", "must be a mapping of settings, got a list"),
            ("hello", "must be a mapping of settings, got a string"),
            ("sample_rate: [", "is not valid YAML in line 1, column 15:"),
            ("a: 1\n\tb: 2", "is not valid YAML in line 2, column 1:"),
            (
                "enabled: true\nsampling:\n  layers: all\n  layers: [1]\n",
                "is not valid YAML in line 4, column 3: the key 'layers' is there twice",
            ),
            ("a: 1\n---\nb: 2", "is not valid YAML in line 2, column 1:"),
            (
                "a: !!timestamp 2026-13-45",
                "is not valid YAML in line 1, column 4: it can't be read as timestamp (ValueError)",
            ),
            (
                "sample_rate: !!bool maybe",
                "is not valid YAML in line 1, column 14: it can't be read as bool (KeyError)",
            ),
            ("a: !!int x", "is not valid YAML in line 1, column 4: it can't be read as int (ValueError)"),
            ("a: !!binary é", "is not valid YAML in line 1, column 4: "),
            ("a: 'x\x00'", "is not valid YAML in line 1: character"),
            (
                "!!python/object/apply:os.getcwd []",
                "is not valid YAML in line 1, column 1: could not determine",
            ),
            ("[" * 5000, "is not valid YAML: nested too deep"),
            (b"\xff\xfe\x00", "must be UTF-8 text, got byte 0xff at offset 0; save it as UTF-8"),
            (b"#" * (MAX_CONFIG_BYTES + 1), f"must be at most {MAX_CONFIG_BYTES} bytes, got more"),
        ],
    )
    def test_content(self, config_file: Path, content: str | bytes, expected: str) -> None:
        """What is no configuration is told in one line, with line and column where there are any."""
        assert message(config_file, content).startswith(expected)

    def test_references_that_explode(self, config_file: Path) -> None:
        """A file whose references would multiply to 10^9 values is refused at once."""
        lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
        for last, name in zip("abcdefgh", "bcdefghi", strict=True):
            lines.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]")
        lines.append("sample_rate: *i")
        text = message(config_file, "\n".join(lines))
        assert len(text) < 400

    def test_missing(self, config_file: Path) -> None:
        """A file that is not there."""
        with pytest.raises(ConfigError, match=r"glassbox\.yaml: must be a file, but does not exist; create it or"):
            load_config(config_file)

    def test_directory(self, tmp_path: Path) -> None:
        """A directory."""
        with pytest.raises(ConfigError, match="must be a file, got a directory"):
            load_config(tmp_path)

    def test_pipe(self, tmp_path: Path) -> None:
        """A pipe is refused instead of waited for."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="must be a regular file, got a device or pipe"):
            load_config(tmp_path / "pipe")

    def test_permission(self, config_file: Path) -> None:
        """A file that this user may not read; as user 65534 if the tests run as root."""
        config_file.write_text("enabled: true")
        config_file.chmod(0o000)
        root = os.geteuid() == 0
        if root:  # who may read all
            for directory in (config_file.parent, *config_file.parents[1:3]):
                if directory.name.startswith(("pytest-", "test_")):
                    directory.chmod(0o755)
            os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match="must be readable by user"):
                load_config(config_file)
        finally:
            if root:
                os.seteuid(0)

    def test_path_with_line_break(self, tmp_path: Path) -> None:
        """The message is one line even if the path is not."""
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "a\nb.yaml")
        assert "\n" not in str(caught.value)


class TestFindConfig:
    def test_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """$GLASSBOX_CONFIG comes first, made absolute, even if nothing is there."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "glassbox.yaml").touch()
        assert find_config({"GLASSBOX_CONFIG": "mine.yaml"}) == tmp_path / "mine.yaml"

    def test_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then ./glassbox.yaml; an empty $GLASSBOX_CONFIG counts as none."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "glassbox.yaml").touch()
        assert find_config({"GLASSBOX_CONFIG": ""}) == tmp_path / "glassbox.yaml"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
    def test_another_users_in_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In /tmp, say: it would open ports and send text to whom it likes. As the message says, naming it helps."""
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "glassbox.yaml"
        path.touch()
        os.chown(path, 12345, -1)
        assert path == find_config({}), "mounted into a container"
        tmp_path.chmod(0o1777)
        rule = f"must belong to user 0 or root in {tmp_path}, where everybody may put files, got user 12345, to be used"
        remedy = f"set GLASSBOX_CONFIG={path} if it is meant, or move it, or use chown 0"
        with pytest.raises(ConfigError, match=f"{rule} without being named; {remedy}$"):
            find_config({})
        assert path == find_config({"GLASSBOX_CONFIG": str(path)})
        os.chown(path, 0, -1)
        path.chmod(0o666)
        with pytest.raises(ConfigError, match="must not be writable by everybody, got mode 0666, to be used without"):
            find_config({})

    def test_packaged(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the packaged file; a directory called glassbox.yaml is passed by."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "glassbox.yaml").mkdir()
        assert find_config({}) == packaged_config()
        assert packaged_config().is_file()

    def test_broken_link_is_not_passed_by(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A ./glassbox.yaml that leads nowhere is found, so that loading it tells."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "glassbox.yaml").symlink_to("nowhere")
        assert find_config({}) == tmp_path / "glassbox.yaml"


class TestChanges:
    def between(self, old: str, new: str) -> list[str]:
        return changes(*(parse_config(Path("x.yaml"), text.encode()) for text in (old, new)))

    def test_none(self) -> None:
        """The same settings, however they are written."""
        assert [] == self.between("sample_rate: 0.01", "# a comment\nlog_level: INFO")

    def test_each_setting(self) -> None:
        """Old and new of each, also of nested ones, in the order of the file."""
        assert [
            "log_level info -> debug",
            "sampling.layers all -> [0, 5]",
            "sampling.layers_per_step all -> 4",
            "sampling.overhead_budget null -> 0.01",
            "requests.records.path null -> /a",
            "export.prometheus.detail layer -> head",
        ] == self.between(
            "enabled: true",
            "{log_level: DEBUG, sampling: {layers: [5, 0], layers_per_step: 4, overhead_budget: 1e-2}, "
            "requests: {records: {path: /a}}, export: {prometheus: {detail: head}}}",
        )

    def test_secrets(self) -> None:
        """That they changed is told, not what they are."""
        assert ["export.otel.endpoint (not shown)", "export.otel.headers (not shown)"] == self.between(
            "export: {otel: {headers: {a: s3cret}, endpoint: 'http://u:s3cret@c'}}",
            "export: {otel: {headers: {a: other}, endpoint: 'http://c'}}",
        )

    def test_long_and_odd_values(self) -> None:
        """A line of the log stays one, and short."""
        [text] = self.between("enabled: true", f'baseline: {{path: "a\\e[31m\\n{"x" * 500}"}}')
        assert len(text) < 150
        assert text.isprintable()


class TestRestartNeeded:
    def changed(self, text: str) -> GlassboxConfig:
        return GlassboxConfig.model_validate(yaml.safe_load(text))

    def test_live(self) -> None:
        """An edit of live settings needs no restart."""
        new = self.changed(
            "{sample_rate: 1.0, log_level: debug, sampling: {layers: [1], layers_per_step: 1, max_rows_per_step: 9}, "
            "requests: {trace_rate: 1.0}, baseline: {path: b.npz, min_rows: 9, window_s: 60}, "
            "export: {interval_s: 1.0, prometheus: {detail: head}}}"
        )
        assert restart_needed(GlassboxConfig(), new) == []

    @pytest.mark.parametrize(
        ("text", "start"),
        [
            ("attach: custom", "attach changed from auto to custom"),
            ("inner_backend: TRITON_ATTN", "inner_backend changed from auto to TRITON_ATTN"),
            ("statistics: {sink_tokens: 1}", "statistics.sink_tokens changed from 4 to 1"),
            ("statistics: {local_window: 64}", "statistics.local_window changed from 128 to 64"),
        ],
    )
    def test_restart(self, text: str, start: str) -> None:
        """A setting that is built in is named with both values and what to do."""
        [told] = restart_needed(GlassboxConfig(), self.changed(text))
        assert told.startswith(f"{start}, which takes effect after a restart")

    def test_enabled(self) -> None:
        """Switching on what was off at the start needs a restart, switching off does not."""
        on, off = GlassboxConfig(), self.changed("enabled: false")
        assert restart_needed(on, off) == []
        [told] = restart_needed(off, on)
        assert told.startswith("enabled changed from false to true")

    def test_fields_exist(self) -> None:
        """RESTART_FIELDS names keys of the file."""
        assert set(RESTART_FIELDS) <= set(all_keys(GlassboxConfig))


def test_wheel(tmp_path: Path) -> None:
    """A built wheel holds the configurations and the kernels' package, in spite of the symlinks."""
    # A copy: setuptools leaves build/ and egg-info in the source tree.
    source = tmp_path / "source"
    source.mkdir()
    names = ["pyproject.toml", "LICENSE", "README.md", "glassbox", "configs", "kernels"]
    subprocess.run(
        ["cp", "-a", *(str(ROOT / name) for name in names if (ROOT / name).exists()), str(source)], check=True
    )
    (source / "README.md").touch()
    subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    [wheel] = (source / "dist").glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {f"glassbox/configs/{name}.yaml" for name in ("glassbox", "debug", "production")} <= files
    assert {f"glassbox/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")} <= files
