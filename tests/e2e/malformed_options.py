"""Fifty kinds of requests whose `vllm_xargs` are not what they should be, and what is to become of each.

The body's other fields are good. `says` is a text that the error must hold; None: any, because vLLM's own check of the
body answers before glassbox is asked.
"""

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Malformed:
    """One kind: the value of `vllm_xargs`, the status wanted, and what the error must say."""

    xargs: Any
    status: int = 400
    says: str | None = None


def _trace(**options: Any) -> dict[str, Any]:
    return {"glassbox": "trace", **{f"glassbox_{name}": value for name, value in options.items()}}


_CHOICE: Final = "glassbox must be trace or off"
_LAYERS: Final = "glassbox_layers must be"
_HEADS: Final = "glassbox_heads must be"
_TOP_K: Final = "glassbox_top_k must be a whole number from 0 to 32"
_SPANS: Final = "glassbox_spans must"
_ROWS: Final = "glassbox_rows must be true or false"

MALFORMED: Final = (
    # The choice itself.
    Malformed({"glassbox": ""}, says=_CHOICE),
    Malformed({"glassbox": "Trace"}, says=_CHOICE),
    Malformed({"glassbox": 1}, says=_CHOICE),
    Malformed({"glassbox": -1.5}, says=_CHOICE),
    Malformed({"glassbox": ["trace"]}, says=_CHOICE),
    Malformed({"glassbox": []}, says=_CHOICE),
    Malformed({"glassbox": "x" * 1_000_000}, says=_CHOICE),
    Malformed({"glassbox": "\x00\u202e\U0001f5fc"}, says=_CHOICE),
    Malformed({"glassbox": {"trace": 1}}),
    Malformed({"glassbox": None}),
    # Keys that are none.
    Malformed({"glassbox": "trace", "glassbox_topk": 3}, says="'glassbox_topk' must be one of"),
    Malformed({"glassbox_": 1}, says="'glassbox_' must be one of"),
    Malformed({"glassboxes": "off"}, says="'glassboxes' must be one of"),
    Malformed({f"glassbox_{'k' * 100_000}": 1}, says="must be one of"),
    Malformed(_trace(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), says="must not be given"),
    # Options without the choice.
    Malformed({"glassbox_top_k": 3}, says="glassbox_top_k must come with"),
    Malformed({"glassbox": "off", "glassbox_rows": 1}, says="glassbox_rows must come with"),
    # Layers and heads.
    Malformed(_trace(layers=[]), says=_LAYERS),
    Malformed(_trace(layers=[-1]), says=_LAYERS),
    Malformed(_trace(layers=[1.5]), says=_LAYERS),
    Malformed(_trace(layers=["one"]), says=_LAYERS),
    Malformed(_trace(layers=[3, 3]), says=_LAYERS),
    Malformed(_trace(layers=[30]), says="glassbox_layers must be from 0 to 29"),
    Malformed(_trace(layers=[10**30]), says=_LAYERS),
    Malformed(_trace(layers=list(range(5000))), says=_LAYERS),
    Malformed(_trace(layers="every"), says=_LAYERS),
    Malformed(_trace(layers=[[1]])),
    Malformed(_trace(heads=[9]), says="glassbox_heads must be from 0 to 8"),
    Malformed(_trace(heads="-1"), says=_HEADS),
    Malformed(_trace(heads=1e308), says=_HEADS),
    # Top-k.
    Malformed(_trace(top_k=-1), says=_TOP_K),
    Malformed(_trace(top_k=33), says=_TOP_K),
    Malformed(_trace(top_k=2.5), says=_TOP_K),
    Malformed(_trace(top_k="many"), says=_TOP_K),
    Malformed(_trace(top_k=[8]), says=_TOP_K),
    Malformed(_trace(top_k=10**18), says=_TOP_K),
    # Spans.
    Malformed(_trace(spans="system"), says=_SPANS),
    Malformed(_trace(spans=["=0:3"]), says=_SPANS),
    Malformed(_trace(spans=["a=3:3"]), says=_SPANS),
    Malformed(_trace(spans=["a=5:2"]), says=_SPANS),
    Malformed(_trace(spans=["a=-1:2"]), says=_SPANS),
    Malformed(_trace(spans=["a=0:99999999999"]), says=_SPANS),
    Malformed(_trace(spans=["a=0:3", "a=3:6"]), says=_SPANS),
    Malformed(_trace(spans=[f"s{i}=0:{i + 1}" for i in range(17)]), says=_SPANS),
    Malformed(_trace(spans=[f"{'n' * 65}=0:1"]), says=_SPANS),
    Malformed(_trace(spans=["a b=0:1"]), says=_SPANS),
    Malformed(_trace(spans=["a=message:first"]), says=_SPANS),
    Malformed(_trace(spans=["a=message:99"]), says="glassbox_spans"),
    Malformed(_trace(spans=[7]), says=_SPANS),
    # Rows.
    Malformed(_trace(rows="maybe"), says=_ROWS),
    Malformed(_trace(rows=2), says=_ROWS),
    Malformed(_trace(rows=[1]), says=_ROWS),
    # What is not an object at all, and what only looks wrong.
    Malformed(["glassbox"]),
    Malformed("glassbox=trace"),
    Malformed({"Glassbox": "trace"}, status=200),
    Malformed({"glass": "box"}, status=200),
    Malformed(_trace(top_k="3", layers="0", heads=[2.0], rows="TRUE", spans="a=0:2000000000"), status=200),
)
