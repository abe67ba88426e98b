"""Which keys a row sees, for the references."""


def first_visible(position: int, sliding_window: int | None, chunk_size: int | None) -> int:
    """Position of the first key that the row at `position` sees; the last one is its own.

    Args:
        sliding_window: visible keys, the own included; None is all.
        chunk_size: positions of a chunk, of which the row sees its own alone (Llama 4's chunked local attention,
            transformers' `chunked_overlay`); None is no chunks.
    """
    first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
    return first if chunk_size is None else max(first, position // chunk_size * chunk_size)
