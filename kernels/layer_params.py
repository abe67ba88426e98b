"""What the scores of an attention layer depend on beside q and k, for every kernel; None is "none" everywhere."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerParams:
    """Made once per layer: launches are remembered by its identity.

    Attributes:
        scale: factor of q.k.
        soft_cap: score = soft_cap * tanh(score / soft_cap), before the bias.
        alibi_slopes: [Hq]; the bias is slope * (j - i), at most 0.
        sinks: score of the learned sink, [Hq].
        sliding_window: keys that a row sees, its own included.
        chunk_size: a row sees the keys of its own chunk of so many positions alone (chunked local attention); a layer
            has a window or chunks, not both.
        q_scale, k_scale, v_scale: [1] or [Hkv] float32, factors of a quantised q, K and V where the kernel reads them
            as they are stored; on the CPU a `KeyReader` knows its own.
    """

    scale: float
    soft_cap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    sliding_window: int | None = None
    chunk_size: int | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def reach(self) -> int | None:
        """How far back a row sees, as kernels take it: a sliding window, or -chunk_size; None is all."""
        return -self.chunk_size if self.chunk_size else self.sliding_window
