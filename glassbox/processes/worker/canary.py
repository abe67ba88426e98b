"""The canary: which rows of which steps are checked, what followed from each check, and which layers may be observed.

Owns the pace of the checks and the standing of each layer. A check reproduces what vLLM served of a few rows: it takes
place at the first prefill and the first decode, and then every `canary.interval_s`. What is computed is the measurers'
(`measure/`), what it means is `glassbox/measure/verdict.py`'s.

A layer that was not reproduced is not observed any more, and goes on being checked: whoever looks for a broken kernel
or a bad GPU wants to know whether it still differs. On a vLLM that is not among the tested ones no layer is observed
before it was reproduced.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.adapter.runner import Batch
from glassbox.core.logs import get_logger
from glassbox.core.output_checks import (
    ERROR_RATIO_BUCKETS,
    KV_SUM,
    KV_TENSORS,
    OUTPUT_SUM,
    LayerChecks,
    LayerState,
    Verdict,
)
from glassbox.core.rows import ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_PROMPT_LEN, ROW_QUERY, ROW_SLOT, ROW_UNCOUNTED
from glassbox.measure.contract import CheckedLayers, CheckLimits
from glassbox.measure.verdict import judge_layers

logger = get_logger(__name__)

# Until both phases were checked, every step is looked at for the one that is missing: this many times at once, then
# once in this many seconds.
_EAGER_TRIES: Final = 8
_PATIENT_S: Final = 1.0


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker is, for the log and the metrics.

    Attributes:
        layers: global index of each layer; names: vLLM's.
        head_offset: global index of the first local head.
        rank, host: of the worker.
        vllm: version.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    head_offset: int
    rank: int
    host: str
    vllm: str


@dataclass
class StepCheck:
    """The checked rows of one step; see `contract.OutputCheck`."""

    owner: "Canary"
    places: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int32]
    phases: npt.NDArray[np.int64]
    local_layers: frozenset[int]
    found: list[CheckedLayers] = field(default_factory=list)

    def add(self, found: CheckedLayers) -> None:
        """See contract.OutputCheck."""
        self.found.append(found)

    def take_slots(self, rows: npt.NDArray[np.int32], limit: int) -> None:
        """Give each checked row a slot after those that are taken; rows for which there is none are not checked."""
        free = rows[self.places, ROW_SLOT] < 0
        slots = int(rows[:, ROW_SLOT].max(initial=-1)) + np.cumsum(free)
        keep = ~free | (slots < limit)
        rows[self.places[free & keep], ROW_SLOT] = slots[free & keep]
        self.places, self.positions, self.phases = self.places[keep], self.positions[keep], self.phases[keep]

    def commit(self) -> None:
        """See contract.OutputCheck."""
        self.owner.conclude(self)


class Canary:
    """Of one worker.

    Args:
        place: of the worker.
        limits: of a check on its device.
        probation: no layer is observed before it was reproduced.
        count: is told how many rows, one in each layer, were reproduced or failed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        place: WorkerPlace,
        limits: CheckLimits,
        *,
        probation: bool,
        count: Callable[[str, int], None] = lambda result, rows: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._limits, self._probation = place, limits, probation
        self._count, self._clock = count, clock
        # Checks are concluded on the thread that finds them done.
        self._lock = threading.Lock()
        self._checks = LayerChecks.nothing(len(place.layers))
        self._missing = {0, ROW_DECODE}  # phases of which no row was checked
        self._tries, self._next_s, self._turn = 0, -np.inf, 0
        self._announced = False
        self.allowed: frozenset[int] = frozenset()
        self._set_allowed()

    def _set_allowed(self) -> None:
        state = self._checks.state
        fit = state == LayerState.CERTIFIED if self._probation else state != LayerState.FAILED
        self.allowed = frozenset(np.flatnonzero(fit).tolist())

    def checks(self) -> LayerChecks:
        """A copy of what is known of the layers."""
        with self._lock:
            return LayerChecks(**{name: array.copy() for name, array in vars(self._checks).items()})

    def not_observed(self) -> dict[str, int]:
        """Layers that are not observed though they could be, by reason."""
        state = self._checks.state
        failed = int(np.count_nonzero(state == LayerState.FAILED))
        pending = int(np.count_nonzero(state == LayerState.PENDING)) if self._probation else 0
        found = {"not_reproduced": failed, "not_certified": pending}
        return {reason: layers for reason, layers in found.items() if layers}

    def is_due(self, interval_s: float) -> bool:
        """Whether the step that begins is to be checked.

        Args:
            interval_s: `canary.interval_s` of the configuration.
        """
        if not self._missing and not interval_s:
            return False
        return self._clock() >= self._next_s

    def choose(
        self,
        batch: Batch,
        rows: npt.NDArray[np.int32],
        layers: frozenset[int],
        interval_s: float,
        *,
        room: int,
        excluded: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[npt.NDArray[np.int32], StepCheck | None]:
        """Add the checked rows to a step's row list; those that are in it already are checked as they are.

        Args:
            batch: of the step.
            rows: int32 [R, NUM_ROW_COLUMNS], ascending in ROW_QUERY, without the slots of checked rows.
            layers: local ones to check.
            interval_s: as `is_due` takes it.
            room: how many rows may be added.
            excluded: [B] requests whose rows may not be measured.

        Returns:
            The longer list, and the check; None if there is nothing to check.
        """
        requests, positions = self._candidates(batch, excluded)
        if not len(requests) or not layers:
            return rows, None
        query = batch.query_start[requests] + positions - batch.num_computed[requests]
        new = ~np.isin(query, rows[:, ROW_QUERY])
        keep = ~new | (np.cumsum(new) <= room)
        if not keep.any():
            return rows, None
        requests, positions, query, new = requests[keep], positions[keep], query[keep], new[keep]
        phases = np.where(positions >= batch.prompt_len[requests], ROW_DECODE, 0)
        self._tries += 1
        self._missing -= set(phases.tolist())
        patience_s = 0.0 if self._tries < _EAGER_TRIES else _PATIENT_S
        self._next_s = self._clock() + (patience_s if self._missing else interval_s)
        added = np.zeros((int(new.sum()), rows.shape[1]), dtype=np.int32)
        added[:, ROW_QUERY], added[:, ROW_BATCH] = query[new], requests[new]
        added[:, ROW_PHASE] = phases[new] | ROW_UNCOUNTED
        added[:, ROW_PROMPT_LEN], added[:, ROW_SLOT] = batch.prompt_len[requests[new]], -1
        joined = np.concatenate([rows, added])
        joined = joined[np.argsort(joined[:, ROW_QUERY], kind="stable")]
        places = np.searchsorted(joined[:, ROW_QUERY], query)
        return joined, StepCheck(self, places, positions.astype(np.int32), phases, layers)

    def _candidates(
        self, batch: Batch, excluded: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Batch rows and positions of the rows to check, ascending: of each request in turn, the newest first."""
        end = (batch.num_computed + batch.num_scheduled).astype(np.int64)
        scheduled: npt.NDArray[np.bool_] = np.asarray(batch.num_scheduled) > 0
        open_to = np.flatnonzero(scheduled if excluded is None else scheduled & ~excluded)
        if not len(open_to):
            return open_to, open_to
        order = np.roll(open_to, -(self._turn % len(open_to)))
        # Phases that no row was checked of come first.
        last_phase = np.where(end[order] > batch.prompt_len[order], ROW_DECODE, 0)
        wanted = ~np.isin(last_phase, list(self._missing))
        order = order[np.argsort(wanted, kind="stable")]
        self._turn += 1
        each = max(1, self._limits.rows // len(order))
        found: list[tuple[int, int]] = []
        keys = 0
        for request in order.tolist():
            first, count = int(batch.num_computed[request]), int(batch.num_scheduled[request])
            # Evenly spaced over the request's rows in this step, its last one included.
            take = min(each, count)
            for n in range(take):
                position = first + -(-(n + 1) * count // take) - 1
                if found and keys + position + 1 > self._limits.keys:
                    continue
                found.append((request, position))
                keys += position + 1
            if len(found) >= self._limits.rows:
                break
        chosen = np.array(sorted(found)[: self._limits.rows], dtype=np.int64)
        return chosen[:, 0], chosen[:, 1]

    def conclude(self, check: StepCheck) -> None:
        """A check was computed."""
        failures: list[tuple[int, Verdict]] = []
        with self._lock:
            for found in check.found:
                verdicts = judge_layers(found.sums, found.roundoff)
                compared = np.any(found.sums[..., OUTPUT_SUM["norm2"]] > 0, axis=(0, 2)).tolist()
                for n, local in enumerate(found.local_layers):
                    # Rows whose output and reference are not finite say nothing of the layer.
                    if compared[n] or not verdicts[n].reproduced:
                        failed = self._note(local, verdicts[n], check)
                        failures += [(local, verdicts[n])] if failed else []
                    if found.kv_sums is not None:
                        self._note_cache(local, found.kv_sums[:, n], found.head_size)
            self._set_allowed()
        if failures:
            self._log_failures(failures)
        if self._probation and not self._announced and not (self._checks.state == LayerState.PENDING).any():
            self._announced = True
            self._log_probation()

    def _note(self, local: int, verdict: Verdict, check: StepCheck) -> bool:
        """Keep a layer's verdict; True if the layer has failed just now."""
        checks = self._checks
        ratios = np.asarray(verdict.ratios)
        buckets = np.searchsorted(ERROR_RATIO_BUCKETS, ratios)
        for phase, bucket, ratio in zip((check.phases & ROW_DECODE).tolist(), buckets, ratios, strict=True):
            checks.error_counts[local, phase, bucket] += 1
            checks.error_sums[local, phase] += min(float(ratio), 1e9)  # a sum must stay finite
        checks.worst_ratio[local] = verdict.ratio
        checks.worst_head[local] = self._place.head_offset + verdict.head
        self._count("reproduced" if verdict.reproduced else "failed", len(ratios))
        before = checks.state[local]
        if not verdict.reproduced:
            checks.state[local] = LayerState.FAILED
        elif before == LayerState.PENDING:
            checks.state[local] = LayerState.CERTIFIED
        return not verdict.reproduced and before != LayerState.FAILED

    def _note_cache(self, local: int, sums: npt.NDArray[np.float32], head_size: int) -> None:
        """Of a layer, [R, Hkv, len(KV_SUMS)]."""
        elements = sums.shape[0] * sums.shape[1] * head_size
        total = sums.reshape(-1, sums.shape[-1]).sum(0, dtype=np.float64)
        for which, tensor in enumerate(KV_TENSORS):
            norm2 = total[KV_SUM[f"{tensor}_norm2"]]
            if norm2 > 0:
                self._checks.kv_error[local, which] = np.sqrt(total[KV_SUM[f"{tensor}_error2"]] / norm2)
                self._checks.kv_saturated[local, which] = total[KV_SUM[f"{tensor}_saturated"]] / elements

    def _log_failures(self, failures: Sequence[tuple[int, Verdict]]) -> None:
        place = self._place
        worst_layer, worst = max(failures, key=lambda one: one[1].ratio)
        others = f", as are {len(failures) - 1} others" if len(failures) > 1 else ""
        logger.error(
            "The served output of layer %d (%s) is not what its keys and values give, so it is not observed any "
            "more%s: %s. Rank %d on %s, vLLM %s; serving is untouched (docs/runbooks, GlassboxOutputWrong)",
            place.layers[worst_layer],
            place.names[worst_layer],
            others,
            worst.what,
            place.rank,
            place.host,
            place.vllm,
        )

    def _log_probation(self) -> None:
        state = self._checks.state
        logger.warning(
            "vLLM %s is not among the tested ones; %d of %d layers reproduced%s",
            self._place.vllm,
            np.count_nonzero(state == LayerState.CERTIFIED),
            len(state),
            "" if (state == LayerState.CERTIFIED).all() else ", the others are not observed",
        )
