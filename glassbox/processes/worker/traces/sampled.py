"""What a worker keeps of requests that the trace rate chooses, as the configuration and the probes' files have it.

Owns following them outside of any step, and saying which probes don't fit the model. What is kept is
`signals/needs.py`'s.
"""

from collections.abc import Callable
from typing import Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.core.trace_options import TraceOptions
from glassbox.processes.worker.traces.active import TraceHost
from glassbox.signals.needs import sampled_options
from glassbox.signals.probe import ProbeError
from glassbox.signals.probe_files import ProbeFiles

logger = get_logger(__name__)

STAGE: Final = "probes"


class SampledOptions:
    """The options of chosen requests.

    Attributes:
        options: of the moment; read by the step thread, replaced as a whole by `refresh`.

    Args:
        config: returns the configuration in force.
        host: the worker.
        errors: told of files that can't be taken, as stage `probes`.
        elsewhere: layers of the model that are on other pipeline stages.
    """

    def __init__(
        self,
        config: Callable[[], GlassboxConfig],
        host: TraceHost,
        errors: ErrorCounter,
        elsewhere: frozenset[int] = frozenset(),
    ) -> None:
        self._config, self._host = config, host
        self._layers = sorted({*host.layers, *elsewhere})
        self._probes = ProbeFiles(config, lambda error: errors.count(STAGE, error))
        self._warned: set[str] = set()
        self.options = TraceOptions()

    def refresh(self) -> None:
        """Look at the configuration and the files again."""
        probes = self._probes.current()
        for probe in probes:
            try:
                probe.check_fits(self._host.model_name, self._layers, range(self._host.num_heads_total))
            except ProbeError as error:
                if str(error) not in self._warned and self._host.layers:
                    self._warned.add(str(error))
                    logger.warning("%s. Until then its scores lack these features", error)
        self.options = sampled_options(probes, self._config().sampled_signals)
