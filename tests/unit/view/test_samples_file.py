"""The file of samples: what a line may say, and what is said of one that says something else."""

import json
from pathlib import Path
from typing import Any

import pytest

from glassbox.view.measured import ViewError
from glassbox.view.samples.samples_file import Sample, SpanPlace, read_samples


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_all_that_a_line_may_say(tmp_path: Path) -> None:
    """Prompts as text and tokens, chats, answers, labels as numbers; blank lines are none."""
    messages = [{"role": "user", "content": "b"}]
    spans = {"a": "text of it", "b": [3, 9], "c": {"message": -1}}
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "label": 1, "group": "g", "id": "first", "spans": spans},
        "",
        {"prompt": [1, 2], "answer": "yes", "label": False},
        {"messages": messages, "label": None},
    )
    places = (SpanPlace("a", text="text of it"), SpanPlace("b", tokens=(3, 9)), SpanPlace("c", message=-1))
    assert read_samples(path).samples == (
        Sample(0, "first", "a", None, None, True, "g", places),
        Sample(1, "3", (1, 2), None, "yes", False, None, ()),
        Sample(2, "4", None, tuple(messages), None, None, None, ()),
    )


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    """Another label is another file."""
    first = read_samples(write(tmp_path / "a.jsonl", {"prompt": "a", "label": 1})).digest
    assert first == read_samples(write(tmp_path / "b.jsonl", {"prompt": "a", "label": 1})).digest
    assert first != read_samples(write(tmp_path / "c.jsonl", {"prompt": "a", "label": 0})).digest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"the line must be a mapping, got \[1\]"),
        ("{", r"must be JSON \("),
        ('{"prompt": "a", "prompt": "b"}', "a key is there twice"),
        ("[" * 100_000, "nested too deeply"),
        ({"prompt": "a", "lable": 1}, "'lable' must be one of prompt, messages"),
        ({"label": 1}, "either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": ""}, "prompt must be a text or a list of token ids"),
        ({"prompt": [1, -2]}, "prompt must be a text or a list of token ids"),
        ({"messages": [{"content": "a"}]}, "messages must be a list of mappings with a role"),
        ({"prompt": "a", "label": "yes"}, r'label must be true or false \(1 or 0\).*, got "yes"'),
        ({"prompt": "a", "label": 2}, "label must be true or false"),
        ({"prompt": "a", "answer": ""}, "answer must be a text"),
        ({"prompt": "a", "spans": {"answer": "b"}}, "must not have the name 'answer'"),
        ({"prompt": "a", "spans": {"a b": "c"}}, "spans must have names of 1 to 64 letters"),
        ({"prompt": "a", "spans": {"a": [5, 5]}}, "spans must have 0 <= start < end"),
        ({"prompt": "a", "spans": {"a": 7}}, r"spans 'a' must be a text of the prompt, \[start, end\]"),
        ({"prompt": "a", "spans": {str(i): "b" for i in range(16)}}, "at most 15 names"),
        ({"prompt": "a", "id": "1"}, "id must be of one sample, got '1' as in line 1"),
    ],
)
def test_what_breaks_a_rule(tmp_path: Path, line: Any, message: str) -> None:
    """File, line, field, rule, value and where the rules are."""
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, line)
    with pytest.raises(ViewError, match=message) as raised:
        read_samples(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")


def test_nothing_in_it(tmp_path: Path) -> None:
    """An empty file is a mistake."""
    with pytest.raises(ViewError, match="must have samples, but is empty"):
        read_samples(write(tmp_path / "a.jsonl", "", " "))
