"""THE table of the row list: its columns, and the bits of a row's phase.

Owns what an entry of the list says and where. The sampler writes it, measurers, kernels and traces read it; the Triton
kernel and the C++ kernel take columns and bits from here when they are compiled. It doesn't know which rows are chosen.

The row list is int32 [R, NUM_ROW_COLUMNS]; a row is one query token of one request in a step.
"""

from typing import Final

# By name, in order.
ROW_COLUMNS: Final = ("query", "batch", "phase", "prompt_len", "slot")
NUM_ROW_COLUMNS: Final = len(ROW_COLUMNS)

ROW_QUERY: Final = ROW_COLUMNS.index("query")  # index into the step's flattened tokens
ROW_BATCH: Final = ROW_COLUMNS.index("batch")  # batch row
ROW_PHASE: Final = ROW_COLUMNS.index("phase")  # ROW_DECODE and ROW_UNCOUNTED, or neither; above them an adapter
ROW_PROMPT_LEN: Final = ROW_COLUMNS.index("prompt_len")  # tokens of the request's prompt
# Trace ring slot: number among the step's traced rows, -1 if the request is not traced.
ROW_SLOT: Final = ROW_COLUMNS.index("slot")

# Of a token that was generated; alone it is the row's index into statistics.PHASES, so it must be the lowest bit.
ROW_DECODE: Final = 1
# Of a row that is measured only because its request is traced. It must not enter the accumulators: traced requests are
# measured in every step and would outweigh the sample.
ROW_UNCOUNTED: Final = 2
# From this bit on the slot of the request's LoRA adapter (`core/adapter_slots.py`). 0 is the base model's, and that of
# all rows if adapters are not told apart.
ROW_ADAPTER_SHIFT: Final = 2
