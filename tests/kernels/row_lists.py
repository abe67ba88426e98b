"""Entries of a row list, in the order of its columns."""

from glassbox.core.rows import ROW_COLUMNS, ROW_DECODE


def entry(query: int, batch: int, position: int, prompt_len: int, slot: int = -1) -> list[int]:
    """Of the row at that position of its sequence: a decode row unless it belongs to the prompt."""
    phase = ROW_DECODE if position >= prompt_len else 0
    columns = {"query": query, "batch": batch, "phase": phase, "prompt_len": prompt_len, "slot": slot}
    return [columns[name] for name in ROW_COLUMNS]
