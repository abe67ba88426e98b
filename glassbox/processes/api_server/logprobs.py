"""Log-probabilities of the tokens of traced requests: asked of the engine, and kept from the client.

Owns which requests have them asked for, and what comes back until a request ends. The client's own parameters decide
what its response contains; `adapter/server.py` hands over what the engine gave and takes it out of what goes on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from glassbox.config.load import GlassboxConfig
from glassbox.core.logs import get_logger, log_once
from glassbox.core.signal_table import SIGNAL_NAMES, signal_row
from glassbox.core.trace_options import CHOICE_KEY, CLIENT_KEY, SAMPLED_KEY, SIGNALS_KEY, TraceOptions
from glassbox.store.logprobs_files import LogprobsFiles
from glassbox.store.trace_directory import traces_path

logger = get_logger(__name__)

# As many tokens as any context has: what comes beyond is dropped.
_MAX_TOKENS: Final = 1 << 24


@dataclass
class _Request:
    client: str | None
    logprobs: list[float] = field(default_factory=list)


class RequestLogprobs:
    """The requests of this process whose log-probabilities are wanted.

    Args:
        config: returns the configuration of the moment.
        run_dir: of the server.
        sampled: returns what is kept of a request that the trace rate chooses.
    """

    def __init__(
        self,
        config: Callable[[], GlassboxConfig],
        run_dir: Path,
        sampled: Callable[[], TraceOptions] = TraceOptions,
    ) -> None:
        self._sampled = sampled
        self._config, self._files = config, LogprobsFiles(traces_path(run_dir))
        self._requests: dict[str, _Request] = {}

    def wants(self, extra_args: object) -> bool:
        """Whether a request with these keys has signals that need them."""
        config = self._config()
        if not isinstance(extra_args, Mapping) or not config.enabled:
            return False
        requests = config.requests
        if extra_args.get(CHOICE_KEY) == "trace":
            given = extra_args.get(SIGNALS_KEY, ())
            signals = given if isinstance(given, list | tuple) else [given]
            wanted = requests.opt_in
        else:
            wanted = extra_args.get(SAMPLED_KEY) is True
            signals = self._sampled().signals if wanted else ()
        return wanted and any("logprobs" in signal_row(name).arrays for name in SIGNAL_NAMES if name in signals)

    def begin(self, internal_id: str, extra_args: Mapping[str, Any]) -> None:
        """A request goes to the engine, which is asked for them."""
        # One whose client goes on with its prompt comes again.
        self._requests.setdefault(internal_id, _Request(extra_args.get(CLIENT_KEY)))

    @property
    def any(self) -> bool:
        """Whether there is a request whose output is to be looked at."""
        return bool(self._requests)

    def __contains__(self, internal_id: object) -> bool:
        return internal_id in self._requests

    def add(self, internal_id: str, logprobs: Sequence[float]) -> None:
        """The engine gave those of the next tokens."""
        found = self._requests[internal_id].logprobs
        found.extend(logprobs[: _MAX_TOKENS - len(found)])

    def end_all_but(self, running: Callable[[str], bool]) -> None:
        """Leave those of the requests that run no more."""
        for internal_id in [one for one in self._requests if not running(one)]:
            request = self._requests.pop(internal_id)
            requests = self._config().requests
            try:
                self._files.write(internal_id, request.client, request.logprobs, keep=requests.keep)
            except OSError as error:
                log_once(
                    logger,
                    logging.WARNING,
                    "logprobs",
                    "Log-probabilities of traced requests can't be left in the run directory, so their signals have no "
                    "value: %s",
                    error,
                )
