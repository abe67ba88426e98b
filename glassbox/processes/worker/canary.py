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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.adapter.row_mask import RowMask
from glassbox.adapter.runner import Batch
from glassbox.core.logs import get_logger
from glassbox.core.output_checks import (
    ERROR_RATIO_BUCKETS,
    KV_SUM,
    KV_TENSORS,
    NONFINITE_OUTPUT,
    OUTPUT_SUM,
    LayerChecks,
    LayerState,
    Verdict,
)
from glassbox.core.rows import ROW_BATCH, ROW_DECODE, ROW_PHASE, ROW_PROMPT_LEN, ROW_QUERY, ROW_SLOT, ROW_UNCOUNTED
from glassbox.measure.contract import CheckedLayers, CheckLimits
from glassbox.measure.verdict import judge_layers

logger = get_logger(__name__)

# A step is looked at for a phase that was not checked yet, or for rows that can be checked: so many steps at once, then
# one in so many seconds.
_EAGER_LOOKS: Final = 8
_PATIENT_S: Final = 1.0
# With `canary.interval_s: 0`, for layers of which nothing was found: their check may have failed.
_RETRY_S: Final = 30.0


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker is, for the log and the metrics.

    Attributes:
        layers: global index of each layer; names: vLLM's.
        head_offsets: global index of the first local head of each layer.
        rank, host: of the worker.
        vllm: version.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    head_offsets: tuple[int, ...]
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
        decode_only: prompt rows can't be reproduced, since they attend over K and V that are made of latent vectors for
            this step alone (MLA).
        count: is told how many rows, one in each layer, were reproduced or failed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        place: WorkerPlace,
        limits: CheckLimits,
        *,
        probation: bool,
        decode_only: bool = False,
        count: Callable[[str, int], None] = lambda result, rows: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._place, self._limits, self._probation = place, limits, probation
        self._count, self._clock = count, clock
        # Checks are concluded on the thread that finds them done.
        self._lock = threading.Lock()
        self._checks = LayerChecks.nothing(len(place.layers))
        # Those that are to be checked; those that were at any time, and phases of which no row of them was checked.
        self._layers = frozenset(range(len(place.layers)))
        self._known: frozenset[int] = frozenset()
        self._phases = {ROW_DECODE} if decode_only else {0, ROW_DECODE}
        self._missing = set(self._phases)
        self._looks, self._turn = 0, 0
        self._look_s = self._checked_s = -np.inf
        self._announced = False
        self._refused: dict[int, str] = {}
        self.allowed: frozenset[int] = frozenset()
        self._set_allowed()

    def _set_allowed(self) -> None:
        state = self._checks.state
        fit = state == LayerState.CERTIFIED if self._probation else state != LayerState.FAILED
        self.allowed = frozenset(np.flatnonzero(fit).tolist()) - frozenset(self._refused)

    def refuse(self, local: int, reason: str) -> None:
        """A layer can't be observed, as its steps have shown.

        Args:
            reason: one of core.counters.BYPASS_REASONS.
        """
        with self._lock:
            self._refused[local] = reason
            self._set_allowed()

    def checks(self) -> LayerChecks:
        """A copy of what is known of the layers."""
        with self._lock:
            return LayerChecks(**{name: array.copy() for name, array in vars(self._checks).items()})

    def not_observed(self) -> dict[str, int]:
        """Layers that are not observed though they could be, by reason."""
        failed = set(np.flatnonzero(self._checks.state == LayerState.FAILED).tolist())
        pending = set(self._pending()) if self._probation else set()
        found = {
            "not_reproduced": len(failed - self._refused.keys()),
            "not_certified": len(pending - self._refused.keys()),
            **Counter(self._refused.values()),
        }
        return {reason: layers for reason, layers in found.items() if layers}

    def _pending(self) -> list[int]:
        """Those of the layers that are to be checked of which nothing is known yet."""
        return [local for local in self._layers if self._checks.state[local] == LayerState.PENDING]

    def is_due(self, interval_s: float, layers: frozenset[int]) -> bool:
        """Whether the step that begins is to be looked at for rows to check.

        Args:
            interval_s: `canary.interval_s` of the configuration.
            layers: local ones to check; those that were not asked for before begin anew.
        """
        if self._refused:
            layers = self._layers if layers - self._refused.keys() == self._layers else layers - self._refused.keys()
        if layers is not self._layers and not layers <= self._known:
            self._known |= layers
            self._missing, self._looks, self._look_s = set(self._phases), 0, -np.inf
        self._layers = layers
        now_s = self._clock()
        return now_s >= self._look_s and (bool(self._missing) or self._is_time(now_s, interval_s))

    def _is_time(self, now_s: float, interval_s: float) -> bool:
        """Whether rows are to be checked whatever phase they are of."""
        return now_s - self._checked_s >= (interval_s or _RETRY_S) and (bool(interval_s) or bool(self._pending()))

    def choose(
        self,
        batch: Batch,
        rows: npt.NDArray[np.int32],
        interval_s: float,
        *,
        room: int,
        excluded: npt.NDArray[np.bool_] | None = None,
        mask: RowMask | None = None,
        tokens: int | None = None,
    ) -> tuple[npt.NDArray[np.int32], StepCheck | None]:
        """Add the checked rows to a step's row list; those that are in it already are checked as they are.

        Args:
            batch: of the step.
            rows: int32 [R, NUM_ROW_COLUMNS], ascending in ROW_QUERY, without the slots of checked rows.
            interval_s: as `is_due` takes it.
            room: how many rows may be added.
            excluded: [B] requests whose rows may not be measured.
            mask: of the step.
            tokens: of the step, the first ones, that can be reproduced; None is all.

        Returns:
            The longer list, and the check; None if there is nothing to check.
        """
        now_s = self._clock()
        self._looks += 1
        self._look_s = now_s + (0.0 if self._looks < _EAGER_LOOKS else _PATIENT_S)
        requests, positions = self._candidates(batch, excluded)
        if 0 not in self._phases:
            generated = positions >= batch.prompt_len[requests]
            requests, positions = requests[generated], positions[generated]
        if mask is not None:
            causal = ~mask.sees_others(requests, positions)
            requests, positions = requests[causal], positions[causal]
        query = batch.query_start[requests] + positions - batch.num_computed[requests]
        if tokens is not None:
            there = query < tokens
            requests, positions, query = requests[there], positions[there], query[there]
        new = ~np.isin(query, rows[:, ROW_QUERY])
        keep = ~new | (np.cumsum(new) <= room)
        requests, positions, query, new = requests[keep], positions[keep], query[keep], new[keep]
        phases = np.where(positions >= batch.prompt_len[requests], ROW_DECODE, 0)
        found = set(phases.tolist())
        # Beyond the interval, only a phase that is missing makes up for what a check costs.
        if not found or not self._layers or not (found & self._missing or self._is_time(now_s, interval_s)):
            return rows, None
        self._missing -= found
        self._checked_s = now_s
        if not self._missing:
            self._looks = 0
        added = np.zeros((int(new.sum()), rows.shape[1]), dtype=np.int32)
        added[:, ROW_QUERY], added[:, ROW_BATCH] = query[new], requests[new]
        added[:, ROW_PHASE] = phases[new] | ROW_UNCOUNTED
        added[:, ROW_PROMPT_LEN], added[:, ROW_SLOT] = batch.prompt_len[requests[new]], -1
        joined = np.concatenate([rows, added])
        joined = joined[np.argsort(joined[:, ROW_QUERY], kind="stable")]
        places = np.searchsorted(joined[:, ROW_QUERY], query)
        return joined, StepCheck(self, places, positions.astype(np.int32), phases, self._layers)

    def _candidates(
        self, batch: Batch, excluded: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Batch rows and positions of the rows to check, ascending: of each request in turn, the newest first."""
        end = (batch.num_computed + batch.num_scheduled).astype(np.int64)
        scheduled: npt.NDArray[np.bool_] = np.asarray(batch.num_scheduled) > 0
        open_to = np.flatnonzero(scheduled if excluded is None else scheduled & ~excluded)
        if not len(open_to):
            return open_to, open_to  # none
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
                # Rows whose output and reference are not finite, or all 0, say nothing of the layer.
                norm2, nonfinite = (found.sums[..., OUTPUT_SUM[name]] for name in ("norm2", "nonfinite"))
                telling = np.any((norm2 > 0) | (nonfinite >= NONFINITE_OUTPUT), axis=2)  # [R, N]
                for n, local in enumerate(found.local_layers):
                    if telling[:, n].any() or not verdicts[n].reproduced:
                        failed = self._note(local, verdicts[n], check.phases, telling[:, n])
                        failures += [(local, verdicts[n])] if failed else []
                    if found.kv_sums is not None:
                        self._note_cache(local, found.kv_sums[:, n], found.head_size)
            self._set_allowed()
        if failures:
            self._log_failures(failures)
        if self._probation and not self._announced and not self._pending():
            self._announced = True
            self._log_probation()

    def _note(
        self, local: int, verdict: Verdict, phases: npt.NDArray[np.int64], telling: npt.NDArray[np.bool_]
    ) -> bool:
        """Keep a layer's verdict of some rows, those that say something; True if the layer has failed just now."""
        checks = self._checks
        ratios = np.asarray(verdict.ratios)[telling]
        buckets = np.searchsorted(ERROR_RATIO_BUCKETS, ratios)
        for phase, bucket, ratio in zip((phases[telling] & ROW_DECODE).tolist(), buckets, ratios, strict=True):
            checks.error_counts[local, phase, bucket] += 1
            checks.error_sums[local, phase] += min(float(ratio), 1e9)  # a sum must stay finite
        checks.worst_ratio[local] = verdict.ratio
        checks.worst_head[local] = self._place.head_offsets[local] + verdict.head
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
        more, first_head = len(failures) - 1, place.head_offsets[worst_layer]
        logger.error(
            "The served output of layer %d (%s) is not what its keys and values give, so it is not observed any "
            "more%s: %s. Rank %d%s on %s, vLLM %s; serving is untouched (docs/runbooks, GlassboxOutputWrong)",
            place.layers[worst_layer],
            place.names[worst_layer],
            "" if not more else ", as is 1 other" if more == 1 else f", as are {more} others",
            worst.what,
            place.rank,
            f", whose first head is {first_head}," if first_head else "",
            place.host,
            place.vllm,
        )

    def _log_probation(self) -> None:
        certified = sum(self._checks.state[local] == LayerState.CERTIFIED for local in self._layers)
        logger.warning(
            "vLLM %s is not among the tested ones; %d of %d layers reproduced%s",
            self._place.vllm,
            certified,
            len(self._layers),
            "" if certified == len(self._layers) else ", the others are not observed",
        )
