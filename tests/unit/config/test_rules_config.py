"""Rules in the YAML file: what is refused and in which words, and what `glassbox check` says of those that are good."""

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.config.load import ConfigError, GlassboxConfig, changes, parse_config
from glassbox.config.usable import require_usable
from glassbox.config.webhook_secret import read_webhook_secret
from glassbox.core.secret_file import SecretFileError
from glassbox.signals.probe import Platt, Probe, ProbeFeature, Trained, write_probe
from glassbox.signals.probe_files import require_probes

PATH = Path("x.yaml")
RULE = {"name": "r", "probe": "p", "above": 0.5}
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def parsed(*rules: dict[str, Any], **actions: Any) -> GlassboxConfig:
    return parse_config(PATH, yaml.safe_dump({"actions": {"rules": list(rules), **actions}}).encode())


def refused(*rules: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(*rules)
    text = str(caught.value)
    assert text.startswith("x.yaml: actions.rules")
    return text.removeprefix("x.yaml: actions.rules")


@pytest.fixture
def probe_file(tmp_path: Path) -> Path:
    path = tmp_path / "probe.json"
    feature = ProbeFeature("answer_top1_ratio_L0_H0", 0.5, 1.0, 1.0)
    trained = Trained("tiny", 2, 1, "2026-01-01T00:00:00Z", "none.parquet")
    write_probe(path, Probe("p", "bad", (feature,), 0.0, Platt(1.0, 0.0), 0.5, trained))
    return path


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


class TestRules:
    def test_the_least(self) -> None:
        """Without more a rule logs, once requests have ended, and is a dry run."""
        (rule,) = parsed(RULE).actions.rules
        assert (("log",), True, False, 60) == (rule.do, rule.dry_run, rule.watches_running, rule.per_minute)
        (aborts,) = parsed({**RULE, "do": ["abort"]}).actions.rules
        assert aborts.watches_running

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"probe": None}, ".0 must have either probe or signal, got neither; give one of them"),
            ({"signal": "spectral.sv1"}, ".0 must have either probe or signal, got both; give one of them"),
            ({"above": None}, ".0 must have either above or below, got neither; give one of them"),
            ({"below": 0.1}, ".0 must have either above or below, got both; give one of them"),
            ({"name": "a|b"}, ".0.name must be 1 to 64 letters, digits, _, . or -, got the string 'a|b'; give it one "
             "such as injection"),
            ({"do": ["kill"]}, ".0.do.0 must be a list of log, tag, abort and webhook, each once, got the string "
             "'kill'; write [log]"),
            ({"do": ["log", "log"]}, ".0.do must be a list of log, tag, abort and webhook, each once, got "
             "['log', 'log']; delete the repeated one"),
            ({"do": ["abort"], "when": "ended"}, ".0 must look at requests that run, to abort them, got when: ended; "
             "write when: running, or remove abort"),
            ({"do": ["webhook"]}, ".0 must have webhook.url and webhook.secret_file to send webhooks, got neither; "
             "give both, or remove webhook from do"),
            ({"per_minute": 0}, ".0.per_minute must be between 1 and 6000, got 0; use 60"),
            ({"dry_run": "no"}, ".0.dry_run must be true or false, got the string 'no'; write false without quotes"),
            ({"thresold": 1}, ".0.thresold is not a known key; known here: name, probe, signal, above, below, when, "
             "min_generated, do, dry_run, per_minute, webhook"),
        ],
    )  # fmt: skip
    def test_refused(self, change: dict[str, Any], told: str) -> None:
        """In a line that says key, rule, value and remedy."""
        rule = {key: value for key, value in {**RULE, **change}.items() if value is not None}
        assert told == refused(rule).removesuffix(" (and 1 more)")

    @pytest.mark.parametrize(
        ("signal", "told"),
        [
            ("spectrum.sv1", ".0.signal must be a value of one of the signals spectral, asymmetry, "),
            ("spectral.sv9", ".0.signal must be one of spectral.sv1, spectral.sv_ratio, spectral.sv_entropy, "),
            ("focus.mass_", ".0.signal must be one of focus.mass, focus.mass_SPAN, got the string 'focus.mass_'"),
            ("focus.weight_x", ".0.signal must be one of focus.mass, focus.mass_SPAN, got the string 'focus.weight_x'"),
            ("spectral", ".0.signal must be NAME.VALUE of a signal, or null, got the string 'spectral'"),
        ],
    )
    def test_signals(self, signal: str, told: str) -> None:
        """Those of the table."""
        assert refused({"name": "r", "signal": signal, "above": 1}).startswith(told)
        for good in ("spectral.sv1", "focus.mass", "focus.mass_my.span-1"):
            parsed({"name": "r", "signal": good, "above": 1})

    def test_signals_on_demand(self) -> None:
        """They are not made while a request runs."""
        rule = {"name": "r", "signal": "routing.phi_hat", "below": 0.1}
        assert not parsed(rule).actions.watches_running
        told = (
            ".0 must look at routing.phi_hat once requests have ended, for it is made of all their queries and keys, "
            "got {}; write when: ended, without abort"
        )
        assert told.format("abort") == refused({**rule, "do": ["abort"]})
        assert told.format("when: running") == refused({**rule, "when": "running"})

    def test_of_sampled_requests(self) -> None:
        """What rules look at is there, beside what else is asked for; each once."""
        rules = [{"name": name, "signal": f"spectral.{name}", "above": 1} for name in ("sv1", "sv_ratio")]
        config = parsed(*rules).model_dump() | {"requests": {"signals": ["selfattn"]}}
        assert ("selfattn", "spectral") == GlassboxConfig.model_validate(config).sampled_signals

    def test_names(self) -> None:
        """Metrics tell rules apart by them."""
        assert refused(RULE, RULE).startswith(" must have different names, since metrics tell them apart by these, got")
        many = [{**RULE, "name": f"r{number}"} for number in range(33)]
        assert refused(*many).startswith(" must be a list of at most 32 rules with different names, got ")

    @pytest.mark.parametrize(
        "url",
        ["http://example.org/", "ftp://example.org", "example.org", "https://", "http://127.0.0.1.example.org/"],
    )
    def test_urls(self, url: str) -> None:
        """What is told of a request goes over no network in the clear; what may hold a secret is not shown."""
        told = refused({**RULE, "webhook": {"url": url}})
        assert told.startswith(
            ".0.webhook.url must be an https URL, or an http URL of this host, or null, got a value "
        )
        for good in ("https://example.org/x?y=z", "http://127.0.0.1:8080/x", "http://localhost/", "http://[::1]:1/"):
            parsed({**RULE, "webhook": {"url": good}})


class TestSecrets:
    def test_a_good_one(self, secret_file: Path) -> None:
        """As `openssl rand` or `head -c 32 /dev/urandom | base64` makes it."""
        assert bytes(range(32)) == read_webhook_secret(secret_file)

    @pytest.mark.parametrize(
        "text", ["", "secret", "whsec_", "whsec_c2hvcnQ=", f"x{SECRET}", f"{SECRET}{SECRET}", "whsec_ä"]
    )
    def test_none(self, secret_file: Path, text: str) -> None:
        """What could be guessed, or is no secret of this form; its content is not told."""
        secret_file.write_text(text)
        with pytest.raises(SecretFileError, match="must hold whsec_ and the base64 of 24 to 64 bytes; make one with"):
            read_webhook_secret(secret_file)

    def test_usable(self, secret_file: Path) -> None:
        """It is tried at start and with an edit that brings it; not again with an edit of something else."""
        rule = {**RULE, "do": ["webhook"], "webhook": {"url": "https://x.org", "secret_file": str(secret_file)}}
        config = parsed(rule)
        require_usable(PATH, config)
        secret_file.chmod(0o640)
        require_usable(PATH, config)
        secret_file.chmod(0o644)
        told = f"x.yaml: actions.rules.0.webhook.secret_file must not be read or changed by others, got mode 0644, got '{secret_file}'; use chmod 600"  # noqa: E501
        with pytest.raises(ConfigError) as caught:
            require_usable(PATH, config)
        assert told == str(caught.value)
        require_usable(PATH, config.model_copy(update={"sample_rate": 0.5}), before=config)
        secret_file.unlink()
        with pytest.raises(ConfigError, match="must be a file that can be read: No such file or directory, got"):
            require_usable(PATH, config)


class TestProbes:
    def test_a_rule_names_one(self, probe_file: Path) -> None:
        """One that is there; what broke since holds back no edit of another rule."""
        probes = {"probes": [{"file": str(probe_file)}]}
        good = GlassboxConfig.model_validate({**probes, "actions": {"rules": [RULE]}})
        require_probes(PATH, good, None)
        bad = GlassboxConfig.model_validate(
            {**probes, "actions": {"rules": [RULE, {**RULE, "name": "s", "probe": "q"}]}}
        )
        told = "x.yaml: actions.rules.1.probe must be the name of one of probes, which are p, got 'q'; name one of them, or add the probe's file to probes"  # noqa: E501
        for before in (None, good):
            with pytest.raises(ConfigError) as caught:
                require_probes(PATH, bad, before)
            assert told == str(caught.value)
        without = GlassboxConfig.model_validate({"actions": {"rules": [RULE]}})
        with pytest.raises(ConfigError, match="of which there are none, got 'p'"):
            require_probes(PATH, without, good)
        probe_file.write_text("{}")
        require_probes(PATH, good.model_copy(update={"sample_rate": 0.5}), good)


class TestShown:
    def test_check(self, probe_file: Path, secret_file: Path, tmp_path: Path) -> None:
        """Rules in words; of a webhook's address the host alone."""
        rules = [
            {**RULE, "do": ["log", "abort", "webhook"], "dry_run": False, "min_generated": 8,
             "webhook": {"url": "https://hooks.example.org:8443/s3cret", "secret_file": str(secret_file)}},
            {"name": "s", "signal": "asymmetry.G", "below": 0.25},
        ]  # fmt: skip
        file = tmp_path / "glassbox.yaml"
        file.write_text(yaml.safe_dump({"probes": [{"file": str(probe_file)}], "actions": {"rules": rules}}))
        result = CliRunner().invoke(main, ["check", str(file)])
        assert (0, "") == (result.exit_code, result.stderr)
        assert "s3cret" not in result.stdout
        lines = [line.removeprefix("# ") for line in result.stdout.splitlines()]
        at = lines.index(
            "Rule r: probe p above 0.5, while requests run with at least 8 generated tokens; it is done "
            "(dry_run: false)"
        )
        assert [
            "  log, abort, webhook to https://hooks.example.org:8443; at most 60 a minute",
            "Rule s: signal asymmetry.G below 0.25, when requests have ended; a dry run: it only says what it would do",
            "  log; at most 60 a minute",
            "  of requests that name asymmetry in their glassbox_signals, and of those that the trace rate chooses",
            "Rules look at traced requests: those whose client asks.",
            "What rules do is written to no file; set actions.audit.path for one.",
        ] == lines[at + 1 : at + 7]

    def test_an_edit(self) -> None:
        """That rules changed is told, without what may be a secret."""
        before, after = parsed(RULE), parsed({**RULE, "webhook": {"url": "https://x.org/s3cret"}})
        assert ["actions.rules changed"] == changes(before, after)
