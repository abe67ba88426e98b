"""The sink of vLLM's own port: the page of metrics that its API servers hand out.

Owns when it is written. Its text is `export/page.py`'s, its file `store/metrics_page.py`'s, and who hands it out
`processes/api_server/metrics_front.py`.
"""

from pathlib import Path

from glassbox.config.load import GlassboxConfig
from glassbox.export.family_source import View
from glassbox.export.page import render
from glassbox.store.metrics_page import confirm_page, has_front, remove_page, write_page


def is_wanted(config: GlassboxConfig, run_dir: Path) -> bool:
    """True if vLLM's port shows metrics, and an API server of this node hands out a page."""
    return config.enabled and config.export.prometheus.shown_at_vllm and has_front(run_dir)


class PageWriter:
    """Keeps the page of a run directory up to date until it is closed."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._written: View | None = None

    def write(self, view: View, time_s: float) -> None:
        """The page shows this view, which was looked at then (Unix time).

        Raises:
            OSError: it can't be written; the older one stays, and grows old.
        """
        if view is self._written:
            try:
                confirm_page(self._run_dir, time_s)
                return
            except FileNotFoundError:  # somebody has removed it
                self._written = None
        write_page(self._run_dir, render(view.families), time_s)
        self._written = view

    def close(self) -> None:
        """Remove the page: from now on API servers render what they show."""
        remove_page(self._run_dir)
        self._written = None
