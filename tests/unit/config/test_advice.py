"""What a message says to write is itself accepted: of every setting, for every way to be wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from glassbox.config.load import ConfigError, GlassboxConfig, parse_config
from glassbox.config.wording import advised, all_keys

PATH = Path("x.yaml")
# One value of each kind, and numbers beyond every bound; written as in the file.
WRONG = (
    "null", "''", "'x'", "nonsense", "true", "off", "[]", "{}", "[1, 1]", "{every: 0}", "{a: b}", "-1", "0", "1e99",
    "99999999999", "-0.5", "0.5", "1e5", "1e-5", "2.0", ".inf", ".nan", "'1'", "'0.25'", "0100", "08", "1:30", "0x1F",
    "1_000", "'yes'", "'FALSE'", "DEBUG", "Head", "HTTP", "'a\\0b'", "'c:4317'", "ftp://c", "http://c#d",
)  # fmt: skip


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def error_of(key: str, written: str) -> ConfigError | None:
    """What is said of a setting with this value, None if it is good."""
    parts = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    try:
        parse_config(PATH, ("\n".join(lines) + f" {written}\n").encode())
    except ConfigError as error:
        return error
    return None


def tries(key: str, advice: str) -> Iterator[dict[str, Any]]:
    """The files that an advice may mean: a value of the key, or a line at the top or beside the key."""
    value = yaml.safe_load(advice)
    leaf = re.match(r"(\w+): ", advice)
    if leaf and leaf[1] in GlassboxConfig.model_fields:
        yield value
    elif leaf and isinstance(value, dict):
        yield nested(key.rpartition(".")[0], value)
    else:
        yield nested(key, value)


def refused(key: str, advice: str) -> str | None:
    """Why an advice is not accepted, None if it is."""
    for content in tries(key, advice):
        try:
            parse_config(PATH, json.dumps(content).encode())
        except ConfigError as error:
            return str(error)
    return None


@pytest.mark.parametrize("key", all_keys(GlassboxConfig))
class TestEverySetting:
    def test_has_an_advice(self, key: str) -> None:
        """Its remedy names something to write, between backquotes."""
        model: Any = GlassboxConfig
        for part in key.split("."):
            field = model.model_fields[part]
            model = field.annotation
        assert advised(field.json_schema_extra["remedy"])

    def test_its_messages_advise_what_is_accepted(self, key: str) -> None:
        """For each wrong value, what the message says to write is no error; it is shown as it is to be written."""
        errors = [error for written in WRONG if (error := error_of(key, written)) is not None]
        assert len(errors) > 10
        assert [] == [
            (str(error), advice, why)
            for error in errors
            for advice in error.advice
            if (why := refused(key, advice)) is not None or advice not in str(error)
        ]
        assert [] == [str(error) for error in errors if "`" in str(error) or "\n" in str(error)]

    def test_use_and_write_are_followed_by_an_advice(self, key: str) -> None:
        """No message says to use or write something that the test before doesn't see."""
        errors = [error for written in WRONG if (error := error_of(key, written)) is not None]
        unseen = [
            str(error)
            for error in errors
            if re.search(r"; (use|write) (?!a plain number)", str(error)) and not error.advice
        ]
        assert [] == unseen


class TestTheTest:
    """It can fail."""

    def test_a_bad_advice_is_found(self) -> None:
        """A value that is refused, a key that isn't there, a level in the wrong place."""
        assert refused("sample_rate", "3") is not None
        assert refused("export.prometheus.port", "100000") is not None
        assert refused("export.prometheus.port", "ports: 3") is not None
        assert refused("log_level", "trace") is not None

    def test_a_good_one_is_not(self) -> None:
        """A value, a line at the top, a line beside."""
        assert [None] * 4 == [
            refused("sample_rate", "0"),
            refused("sampling.max_rows_per_step", "sample_rate: 0"),
            refused("export.jsonl.max_mb", "path: null"),
            refused("sampling.layers", "{every: 4}"),
        ]


@pytest.mark.parametrize("content", [b"", b"- 1", b"hello"])
def test_of_the_whole_file(content: bytes) -> None:
    """A file without settings is told of lines that are one."""
    with pytest.raises(ConfigError) as caught:
        parse_config(PATH, content)
    [advice] = caught.value.advice
    assert f"`{advice}`" in str(caught.value)
    parse_config(PATH, advice.encode())


@pytest.mark.parametrize("key", [key.rpartition(".")[2] for key in all_keys(GlassboxConfig)])
def test_did_you_mean(key: str) -> None:
    """The key that is suggested for a misspelt one exists."""
    with pytest.raises(ConfigError) as caught:
        parse_config(PATH, f"{key[0]}{key}: 1".encode())
    found = re.search(r"did you mean ([\w.]+)\?", str(caught.value))
    assert found is None or found[1] in {*all_keys(GlassboxConfig), *GlassboxConfig.model_fields}
