"""What clients may ask for, and what an error tells them."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.signal_table import ON_REQUEST
from glassbox.core.trace_options import (
    CLIENT_KEYS,
    MAX_INDICES,
    MAX_SPANS,
    ClientChoice,
    MessageSpan,
    OptionError,
    Span,
    TraceOptions,
    parse_options,
)

HUGE = "x" * 1_000_000
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def trace(**options: Any) -> dict[str, Any]:
    """A client's keys, `glassbox_` left out."""
    return {"glassbox": "trace", **{f"glassbox_{name}": value for name, value in options.items()}}


class TestGood:
    @pytest.mark.parametrize("extra_args", [None, {}, {"kv_transfer_params": {"a": 1}, "other": "glassbox"}])
    def test_nothing_said(self, extra_args: Any) -> None:
        """Other keys are none of glassbox's business."""
        assert parse_options(extra_args) == ClientChoice()

    def test_choice(self) -> None:
        """trace with the defaults, or off."""
        assert parse_options(trace()) == ClientChoice("trace", TraceOptions())
        assert parse_options({"glassbox": "off"}) == ClientChoice("off")

    def test_everything(self) -> None:
        """Lists come back sorted, spans in the order they were given."""
        found = parse_options(trace(layers=[5, 0], heads=[2], top_k=8, spans=["a=0:4", "b-1.x=4:9"], rows=1))
        expected = TraceOptions((0, 5), (2,), 8, (Span("a", 0, 4), Span("b-1.x", 4, 9)), True)
        assert found == ClientChoice("trace", expected)
        assert expected.probes

    @pytest.mark.parametrize("value", [3, 3.0, "3", [3], [3.0], ["3"]])
    def test_a_number_in_any_spelling(self, value: Any) -> None:
        """Clients and gateways turn 3 into 3.0 or "3"."""
        assert parse_options(trace(layers=value)).options.layers == (3,)

    @pytest.mark.parametrize(
        ("value", "rows"),
        [
            *((value, True) for value in (1, True, "true", "True", "1", 1.0)),
            *((value, False) for value in (0, False, "false", "0", 0.0)),
        ],
    )
    def test_switches(self, value: Any, rows: bool) -> None:
        """JSON's true arrives as 1 or as a string."""
        assert rows == parse_options(trace(rows=value)).options.attention

    @pytest.mark.parametrize("prompt", ["all", "new"])
    def test_rows_of_the_prompt(self, prompt: str) -> None:
        """All or new ones, and then the attention that positions receive is kept."""
        options = parse_options(trace(prompt=prompt)).options
        assert (prompt, {"received"}) == (options.prompt, options.arrays)

    def test_signals(self) -> None:
        """In the order they were given; those that need the whole prompt ask for it."""
        found = parse_options(trace(signals=["spectral", "rauq"], respond=1)).options
        assert TraceOptions(signals=("spectral", "rauq"), prompt="all", respond=True) == found
        assert {"received", "singular_values", "logprobs"} == found.arrays
        assert "new" == parse_options(trace(signals="spectral", prompt="new")).options.prompt
        assert TraceOptions(signals=("rauq",)) == parse_options(trace(signals="rauq")).options
        assert set() == TraceOptions().arrays
        assert {"received", "queries", "keys"} == TraceOptions(signals=("cyclic",), prompt="all").arrays

    def test_all(self) -> None:
        """The word for what is the default."""
        assert parse_options(trace(layers="all", heads="all")).options == TraceOptions()

    def test_a_single_span(self) -> None:
        """Without the list around it."""
        assert parse_options(trace(spans="a=0:4")).options.spans == (Span("a", 0, 4),)

    def test_a_span_beyond_the_sequence(self) -> None:
        """It may grow into it."""
        assert parse_options(trace(spans=["a=0:2147483647"])).options.spans[0].end == 2**31 - 1

    def test_spans_by_message(self) -> None:
        """Only the API server sees them, and turns them into token ranges."""
        found = parse_options(trace(spans=["user=message:-1", "a=0:2"]), from_client=True)
        assert found.message_spans == (MessageSpan("user", -1),)
        assert found.options.spans == (Span("a", 0, 2),)
        assert str(Span("a", 0, 2)) == "a=0:2"

    def test_traceparent(self) -> None:
        """It comes with any request, and a bad one is as none."""
        assert parse_options({"glassbox_traceparent": TRACEPARENT}).traceparent == TRACEPARENT
        assert parse_options({"glassbox": "off", "glassbox_traceparent": "00-0-0-0"}) == ClientChoice("off")


MALFORMED = [
    ({"glassbox": "yes"}, "glassbox must be trace or off, got 'yes'; leave it out for neither"),
    ({"glassbox": ""}, "glassbox must be trace or off, got ''"),
    ({"glassbox": 1}, "glassbox must be trace or off, got 1"),
    ({"glassbox": True}, "glassbox must be trace or off, got True"),
    ({"glassbox": ["trace"]}, "glassbox must be trace or off, got ['trace']"),
    ({"glassbox": "TRACE"}, "glassbox must be trace or off, got 'TRACE'"),
    ({"glassbox_layer": [1], "glassbox": "trace"}, "'glassbox_layer' must be one of glassbox, glassbox_layers"),
    ({"glassboxtopk": 3}, "'glassboxtopk' must be one of"),
    ({"glassbox.top_k": 3}, "correct or remove it"),
    ({"glassbox_top_k": 3}, 'glassbox_top_k must come with "glassbox": "trace", got None; add that, or remove'),
    ({"glassbox": "off", "glassbox_rows": 1}, 'glassbox_rows must come with "glassbox": "trace", got \'off\''),
    (trace(layers=[]), "glassbox_layers must be all or a list of 1 to 1024 different whole numbers"),
    (trace(layers="some"), "got 'some'; use a list such as [0, 5, 11]"),
    (trace(layers=[-1]), "glassbox_layers must be all or a list of 1 to 1024 different whole numbers from 0 to 65535"),
    (trace(layers=[0, 65536]), "got 65536"),
    (trace(layers=[1.5]), "got 1.5"),
    (trace(layers=[True]), "got True"),
    (trace(layers=["a"]), "got 'a'"),
    (trace(layers=[[1]]), "got [1]"),
    (trace(layers=[1, 1]), "got [1, 1]; delete the repeated one"),
    (trace(layers=[1, "1"]), "delete the repeated one"),
    (trace(layers=list(range(MAX_INDICES + 1))), "got 1025; leave it out for all"),
    (trace(layers={"every": 2}), "got {'every': 2}"),
    (trace(heads=[2**70]), "glassbox_heads must be all or a list"),
    (trace(heads=""), "glassbox_heads must be all or a list"),
    (trace(heads=[None]), "got None"),
    (trace(top_k=-1), "glassbox_top_k must be a whole number from 0 to 32, got -1; use 8, or 0 for none"),
    (trace(top_k=33), "got 33"),
    (trace(top_k="many"), "got 'many'"),
    (trace(top_k=1e300), "got 1e+300"),
    (trace(top_k=float("nan")), "got nan"),
    (trace(top_k=float("inf")), "got inf"),
    (trace(top_k=[3]), "got [3]"),
    (trace(top_k=True), "got True"),
    (trace(top_k="9" * 100), "glassbox_top_k must be a whole number from 0 to 32"),
    (trace(top_k="٣"), "glassbox_top_k must be a whole number"),
    (trace(rows="yes"), "glassbox_rows must be true or false, got 'yes'; use 1 or 0"),
    (trace(rows=2), "got 2"),
    (trace(rows=[1]), "got [1]"),
    (trace(respond="yes"), "glassbox_respond must be true or false, got 'yes'; use 1 or 0"),
    ({"glassbox_respond": 1}, 'glassbox_respond must come with "glassbox": "trace"'),
    ({"glassbox_prompt": "all"}, 'glassbox_prompt must come with "glassbox": "trace"'),
    ({"glassbox_signals": ["rauq"]}, 'glassbox_signals must come with "glassbox": "trace"'),
    (trace(prompt="sampled"), "glassbox_prompt must be all or new, got 'sampled'; leave it out for the rows that"),
    (trace(prompt=["all"]), "got ['all']"),
    (trace(signals=["spectral", "x"]), "glassbox_signals must list names of spectral, asymmetry, selfattn"),
    (trace(signals=["spectral", "x"]), "got 'x'; correct or remove it"),
    (trace(signals=[["spectral"]]), "got ['spectral']"),
    (trace(signals={"spectral": 1}), "got {'spectral': 1}"),
    (trace(signals=["rauq", "rauq"]), "must list different names, got ['rauq', 'rauq']; delete the repeated one"),
    (trace(spans=["a"]), "glassbox_spans must be name=start:end, got 'a'; write such as system=0:25"),
    (trace(spans=["a=1"]), "got 'a=1'"),
    (trace(spans=["=0:1"]), "glassbox_spans must have names of 1 to 64 letters, digits, _ . or -, got ''"),
    (trace(spans=["a b=0:1"]), "got 'a b'"),
    (trace(spans=["a" * 65 + "=0:1"]), "must have names of 1 to 64"),
    (trace(spans=["a\n=0:1"]), "must have names"),
    (trace(spans=["a=x:1"]), "start and end whole numbers, got 'a=x:1'"),
    (trace(spans=["a=0:"]), "start and end whole numbers"),
    (trace(spans=["a=0:1:2"]), "start and end whole numbers"),
    (trace(spans=["a=-1:1"]), "glassbox_spans must have 0 <= start < end <= 2147483647, got 'a=-1:1'"),
    (trace(spans=["a=3:3"]), "the end is exclusive"),
    (trace(spans=["a=4:3"]), "0 <= start < end"),
    (trace(spans=["a=0:2147483648"]), "0 <= start < end"),
    (trace(spans=[1]), "got 1"),
    (trace(spans=["a=0:1", "a=1:2"]), "glassbox_spans must have different names, got 'a' twice; rename one"),
    (trace(spans=[f"s{i}=0:1" for i in range(MAX_SPANS + 1)]), "must list at most 16 spans, got 17; ask for fewer"),
    (trace(spans=["a=message:0"]), "only chats have messages, give token positions instead"),
    (trace(spans={"a": [0, 1]}), "glassbox_spans must be name=start:end"),
]


class TestMalformed:
    @pytest.mark.parametrize(("extra_args", "message"), MALFORMED)
    def test_says_field_rule_value_and_remedy(self, extra_args: dict[str, Any], message: str) -> None:
        """One line that a client can act on."""
        with pytest.raises(OptionError) as raised:
            parse_options(extra_args)
        text = str(raised.value)
        assert message in text
        assert "must" in text
        assert ";" in text
        assert "\n" not in text

    @pytest.mark.parametrize("index", ["", "x", "1.5", "99999999"])
    def test_message_index(self, index: str) -> None:
        """A whole number, also for the API server."""
        with pytest.raises(OptionError, match=r"name=message:index, the index a whole number.*user=message:-1"):
            parse_options(trace(spans=[f"a=message:{index}"]), from_client=True)

    def test_traceparent_of_a_client(self) -> None:
        """glassbox sets it itself; a client has a header for it."""
        with pytest.raises(OptionError, match=r"glassbox_traceparent must not be given.*traceparent header"):
            parse_options({"glassbox_traceparent": TRACEPARENT}, from_client=True)

    @pytest.mark.parametrize(
        "extra_args",
        [{"glassbox": HUGE}, {f"glassbox{HUGE}": 1}, trace(spans=[HUGE]), trace(layers=HUGE), trace(top_k=[HUGE])],
    )
    def test_a_message_is_short(self, extra_args: dict[str, Any]) -> None:
        """Whatever a client sends does not fill the log."""
        with pytest.raises(OptionError) as raised:
            parse_options(extra_args)
        assert len(str(raised.value)) < 400


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_VALUES = _SCALARS | st.lists(_SCALARS | st.lists(_SCALARS, max_size=2), max_size=20)


class TestAnything:
    @settings(max_examples=500, deadline=None)
    @given(st.dictionaries(st.sampled_from(CLIENT_KEYS) | st.text(max_size=12).map("glassbox".__add__), _VALUES))
    def test_is_understood_or_an_option_error(self, extra_args: dict[str, Any]) -> None:
        """Nothing else is ever raised, and what is understood is within its limits."""
        for from_client in (False, True):
            try:
                options = parse_options(extra_args, from_client=from_client).options
            except OptionError:
                continue
            assert 0 <= options.top_k <= 32
            assert len(options.spans) <= MAX_SPANS
            assert all(0 <= span.start < span.end for span in options.spans)
            assert options.arrays <= set(ON_REQUEST)


class TestAdvice:
    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("top_k", 99), ("top_k", "many"), ("rows", 7), ("layers", [-1]), ("heads", ["x"]), ("spans", "x"),
            ("spans", "=0:1"), ("spans", "a=b:c"), ("spans", "a=message:x"), ("spans", 3),
        ],
    )  # fmt: skip
    def test_is_accepted(self, name: str, wrong: Any) -> None:
        """What a message says to use or to write is no error."""
        with pytest.raises(OptionError) as caught:
            parse_options(trace(**{name: wrong}), from_client=True)
        advice = str(caught.value).rpartition("; ")[2]
        found = re.findall(r"\[[\d, ]+\]|[\w.-]+=[\w.]+:-?\d+|\b\d+\b", advice)
        assert re.match("(use|write) ", advice)
        assert found
        for text in found:
            parse_options(trace(**{name: json.loads(text) if text[0] in "[0123456789" else text}), from_client=True)
