"""The record of what was served, measured and compared.

pytest tests/families --record-models docs/data/models.json
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tools import models_table

# Of this session, by family.
_ROWS: Final[dict[str, dict[str, Any]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--record-models FILE`."""
    parser.addoption("--record-models", type=Path, help="write what was found for each family into this file")


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Notes a family's row, or changes it."""

    def note(family: str, **fields: Any) -> None:
        _ROWS.setdefault(family, {"family": family}).update(fields)

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record."""
    path: Path | None = session.config.getoption("--record-models", default=None)
    if path is not None:
        models_table.record(path, list(_ROWS.values()))
