"""How many rows of traces each client may still have measured.

Owns the rate, nothing of what is done about it: `tracker.py` refuses and truncates.
"""

from collections.abc import Callable
from typing import Final

# A prompt's rows and those of some long answers come at once.
BURST_S: Final = 10.0
# Clients whose quota is whole again are forgotten beyond so many.
_REMEMBERED: Final = 1024


class RowQuota:
    """Rows by client: so many a second, those of `BURST_S` at once. A client that isn't known (None) has no limit.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # By client: when its quota will be whole again, as far as it has used it.
        self._whole_at: dict[str, float] = {}

    def is_used_up(self, client: str | None, rows_per_second: int | None) -> bool:
        """Whether a client may have no row at the moment."""
        if client is None or rows_per_second is None:
            return False
        return self._whole_at.get(client, 0.0) - self._clock() > BURST_S - 1 / rows_per_second

    def take(self, client: str | None, rows: int, rows_per_second: int | None) -> bool:
        """Use rows of a client's quota; False and nothing used if there aren't so many."""
        if client is None or rows_per_second is None:
            return True
        now = self._clock()
        whole_at = max(self._whole_at.get(client, now), now) + rows / rows_per_second
        if whole_at - now > BURST_S:
            return False
        if len(self._whole_at) >= _REMEMBERED:
            self._whole_at = {one: at for one, at in self._whole_at.items() if at > now}
        self._whole_at[client] = whole_at
        return True
