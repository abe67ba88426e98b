"""What a request asks for: query parameters in, a checked selection out.

Every wrong parameter is a `RequestError` that says parameter, rule, value and remedy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from starlette.datastructures import QueryParams

from glassbox.core.statistics import PHASES, STATISTICS, Phase, Statistic
from glassbox.store.merge import MergedEngine
from glassbox.web.answers import RequestError

Window = Literal["last", "total"]
WINDOWS: Final[tuple[Window, ...]] = ("last", "total")
_BY_NAME: Final = {statistic.name: statistic for statistic in STATISTICS}
_OF_ALL: Final = frozenset({"engine", "head", "layer", "model", "phase", "statistic"})


@dataclass(frozen=True)
class Selection:
    """A checked request. Hashable: equal requests get the same answer.

    Attributes:
        statistics: in the order of the table.
        phases: in their order.
        engines, models: label values; empty selects all.
        head: global (layer, head) whose histograms are wanted, or None.
        window: `total`: since the server counts; `last`: between the last two snapshots.
    """

    statistics: tuple[Statistic, ...]
    phases: tuple[Phase, ...]
    engines: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    head: tuple[int, int] | None = None
    window: Window = "total"

    def of(self, engines: Sequence[MergedEngine]) -> tuple[MergedEngine, ...]:
        """The selected ones among a server's engines; none if it has none yet.

        Raises:
            RequestError: the server has engines, but not one that is asked for, or not that layer or head.
        """
        if not engines:
            return ()
        for name, wanted, known in (
            ("engine", self.engines, {engine.engine for engine in engines}),
            ("model", self.models, {engine.model_name for engine in engines}),
        ):
            for value in wanted:
                if value not in known:
                    raise _not_one_of(name, value, sorted(known))
        selected = tuple(
            engine
            for engine in engines
            if (not self.engines or engine.engine in self.engines)
            and (not self.models or engine.model_name in self.models)
        )
        if not selected:
            pairs = ", ".join(f"{engine.model_name} on engine {engine.engine}" for engine in engines)
            raise RequestError(f"engine and model must go together, the server has {pairs}; leave one of them out")
        for engine in selected:
            self._check_head(engine)
        return selected

    def _check_head(self, engine: MergedEngine) -> None:
        if self.head is None:
            return
        layer, head = self.head
        if layer not in engine.layers:
            known = f"{engine.layers[0]} to {engine.layers[-1]}" if engine.layers else "none"
            raise RequestError(
                f"layer must be an observed layer ({known}), got {layer}; /glassbox/v1/snapshot lists them"
            )
        if head >= engine.num_heads:
            raise RequestError(f"head must be between 0 and {engine.num_heads - 1}, got {head}; heads count from 0")


def parse_snapshot(query: QueryParams) -> Selection:
    """The selection of /glassbox/v1/snapshot: any number of statistics, phases, engines and models; default all.

    Raises:
        RequestError: a parameter is unknown, has a wrong value, or comes twice where it may not.
    """
    _check_names(query, _OF_ALL)
    return Selection(
        statistics=_statistics(query.getlist("statistic")) or STATISTICS,
        phases=_phases(query.getlist("phase")) or PHASES,
        engines=tuple(sorted(set(query.getlist("engine")))),
        models=tuple(sorted(set(query.getlist("model")))),
        head=_head(query),
    )


def parse_stream(query: QueryParams) -> Selection:
    """The selection of /glassbox/v1/stream: one statistic, one phase, one engine.

    Raises:
        RequestError: as in `parse_snapshot`.
    """
    _check_names(query, _OF_ALL | {"window"})
    window = _single(query, "window", "last")
    if window not in WINDOWS:
        raise _not_one_of("window", window, WINDOWS)
    return Selection(
        statistics=_statistics([_single(query, "statistic", STATISTICS[0].name)]),
        phases=_phases([_single(query, "phase", Phase.DECODE.value)]),
        engines=_optional(query, "engine"),
        models=_optional(query, "model"),
        head=_head(query),
        window=window,
    )


def _not_one_of(name: str, value: str, known: Iterable[str]) -> RequestError:
    return RequestError(f"{name} must be one of {', '.join(known)}, got {value[:80]!r}; leave it out for the default")


def _check_names(query: QueryParams, known: frozenset[str]) -> None:
    for name in query:
        if name not in known:
            raise RequestError(f"parameters must be among {', '.join(sorted(known))}, got {name[:80]!r}; leave it out")


def _single(query: QueryParams, name: str, default: str) -> str:
    values = query.getlist(name) or [default]
    if len(values) > 1:
        raise RequestError(f"{name} must be given once, got it {len(values)} times; leave out all but one")
    return values[0]


def _optional(query: QueryParams, name: str) -> tuple[str, ...]:
    return (_single(query, name, ""),) if name in query else ()


def _statistics(names: Sequence[str]) -> tuple[Statistic, ...]:
    for name in names:
        if name not in _BY_NAME:
            raise _not_one_of("statistic", name, _BY_NAME)
    return tuple(statistic for statistic in STATISTICS if statistic.name in names)


def _phases(names: Sequence[str]) -> tuple[Phase, ...]:
    for name in names:
        if name not in PHASES:
            raise _not_one_of("phase", name, PHASES)
    return tuple(phase for phase in PHASES if phase.value in names)


def _head(query: QueryParams) -> tuple[int, int] | None:
    layer, head = (_index(query, name) for name in ("layer", "head"))
    if layer is None and head is None:
        return None
    if layer is None or head is None:
        missing = "layer" if layer is None else "head"
        raise RequestError(f"layer and head must be given together, got no {missing}; add it or leave out both")
    return layer, head


def _index(query: QueryParams, name: str) -> int | None:
    if name not in query:
        return None
    text = _single(query, name, "")
    # Not int(): it takes blanks, underscores, signs and other alphabets' digits.
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise RequestError(f"{name} must be a whole number from 0, got {text[:80]!r}; use the global index")
    return int(text)
