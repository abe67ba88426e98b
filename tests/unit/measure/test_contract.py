"""What measurers are told of a batch."""

import numpy as np
import torch

from glassbox.core.rows import NUM_ROW_COLUMNS, ROW_BATCH, ROW_QUERY
from glassbox.measure.contract import BatchTables


class TestBatchTables:
    def rows(self, *places: tuple[int, int]) -> torch.Tensor:
        """Of (batch row, query)."""
        rows = np.full((len(places), NUM_ROW_COLUMNS), 7, dtype=np.int32)
        rows[:, [ROW_BATCH, ROW_QUERY]] = np.array(places, dtype=np.int32).reshape(-1, 2)
        return torch.from_numpy(rows)

    def test_positions(self) -> None:
        """Of a prompt's chunk and of a request that verifies drafts; behind the batch there is padding."""
        starts, lengths = [0, 6, 10, 10], [12, 24, 0]
        tables = BatchTables(
            torch.zeros(3, 4, dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            None,
        )
        found = tables.positions(self.rows((0, 0), (0, 5), (1, 6), (1, 9)))
        assert found.dtype == torch.int32
        assert found.tolist() == [[0, 6], [0, 11], [1, 20], [1, 23]]
        assert tables.positions(self.rows()).shape == (0, 2)

    def test_a_row_without_a_place(self) -> None:
        """A draft that the runner left out: the position is one, and its query was never kept."""
        tables = BatchTables(*(torch.tensor(t, dtype=torch.int32) for t in ([[0]], [0, 9], [2])), None)
        assert tables.positions(self.rows((0, 0))).tolist() == [[0, 0]]
