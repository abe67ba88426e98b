"""Does what rules ask: log, tag, abort, webhook; and says of each what came of it.

Owns the outcomes: they are counted, written to the audit file, and noted beside the request's trace. Which rule applies
is `signals/rule_book.py`'s. Nothing here waits for anybody: API servers answer orders later, receivers of webhooks even
later.
"""

import json
import logging
import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from glassbox.config.load import ActionsConfig, RuleConfig
from glassbox.config.model import MAX_RULES
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.export.rotation import BYTES_PER_MB, RotatingFile
from glassbox.export.webhooks import MAX_BODY_BYTES, Event, WebhookSender
from glassbox.signals.rule_book import Match
from glassbox.store import orders
from glassbox.store.acts import MAX_ACTS, OUTCOMES, Act, Acts, count_key
from glassbox.store.orders import Do, Order
from glassbox.store.trace_directory import TraceKey
from glassbox.store.trace_record import RequestTrace

logger = get_logger(__name__)

STAGE: Final = "actions"
# Until when API servers may answer an order: what it is valid for, and a little.
ANSWER_S: Final = orders.VALID_S + 2.0
# Lines of the audit file that wait for a disk with room.
MAX_LINES: Final = 4096
# Of errors, by action.
_STAGES: Final = {"abort": "aborts", "webhook": "webhooks"}
_NO_ANSWER: Final = "no API server of this node has taken it"

# By "rule|action|outcome".
Counts = Counter[str]
# Rules of which counts are kept: those in force, and of those that edits took away.
_MOST_RULES: Final = 2 * MAX_RULES


@dataclass(frozen=True)
class _Doing:
    """One action of a rule that applied.

    Attributes:
        id: of the event; all actions of the rule for this request share it.
        match, action: what.
        about: fields of the request, for the audit file and webhooks.
        time_s: Unix time at which it applied.
    """

    id: str
    match: Match
    action: str
    about: Mapping[str, Any]
    time_s: float


class Acting:
    """The actions of one server.

    All methods but `counts` belong to one thread.

    Args:
        run_dir: of the server.
        errors: told of errors, as stages `actions`, `aborts`, `webhooks` and `audit`.
        counts: to go on from: those of an exporter before.
        clock: Unix time in seconds.
        sender: makes a WebhookSender of a URL and its secret's file.
    """

    def __init__(
        self,
        run_dir: Path,
        errors: ErrorCounter,
        counts: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.time,
        sender: Callable[[str, Path], WebhookSender] = WebhookSender,
    ) -> None:
        self._run_dir, self._errors, self._clock, self._sender = Path(run_dir), errors, clock, sender
        self._acts = Acts(run_dir)
        self._counts: Counts = Counter(dict(counts or {}))
        self._ordered: dict[str, _Doing] = {}
        self._senders: dict[tuple[str, Path], WebhookSender] = {}
        # What senders' threads have told.
        self._told: deque[tuple[_Doing, str, str]] = deque()
        self._audit: tuple[tuple[Path, int], RotatingFile] | None = None
        self._fresh_acts: dict[TraceKey, deque[Act]] = {}
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        with errors.guard(STAGE):
            orders.withdraw_all(self._run_dir)

    def counts(self) -> Counts:
        """How often each action of each rule had each outcome."""
        return Counter(dict(self._counts))

    def perform(self, match: Match, trace: RequestTrace, scores: Mapping[str, Any]) -> None:
        """Do what a rule asks.

        Args:
            match: the rule, and what it found.
            trace: of the request, as it is known now.
            scores: JSON-ready, for webhooks.
        """
        event, now_s, about = f"msg_{uuid.uuid4().hex}", self._clock(), _about(trace)
        self._log(match, trace)
        for action in match.rule.do:
            doing = _Doing(event, match, action, about, now_s)
            if match.limited:
                self._settle(doing, "limited")
            elif match.rule.dry_run:
                self._settle(doing, "dry_run")
            elif action == "log":
                self._settle(doing, "done")
            elif action == "webhook":
                self._post(doing, scores)
            elif action == "abort":
                self._order(doing, "abort", trace)
            else:
                self._order(doing, "tag", trace)

    def _log(self, match: Match, trace: RequestTrace) -> None:
        rule, others = match.rule, ", ".join(action for action in match.rule.do if action != "log")
        told = f"Rule {rule.name}: request {trace.request_id} has {rule.source} at {match.value:.4g}, {_side(rule)}"
        if match.limited:
            log_once(
                logger,
                logging.WARNING,
                f"limited-{rule.name}",
                "%s; nothing is done, since the rule has applied to per_minute (%d) already. Further ones are only "
                "counted (glassbox_actions_total)",
                told,
                rule.per_minute,
            )
        elif rule.dry_run:
            logger.warning("%s. It is a dry run; it would do: %s", told, ", ".join(rule.do))
        elif "log" in rule.do:
            logger.warning("%s%s", told, f"; what is done: {others}" if others else "")

    def _order(self, doing: _Doing, do: Do, trace: RequestTrace) -> None:
        if trace.status != "active":
            # Its span and its record are still to come: they have the tag.
            self._settle(doing, "done" if do == "tag" else "late")
            return
        if len(self._ordered) >= orders.MAX_OPEN:
            self._settle(doing, "dropped", "too many orders wait for an answer")
            return
        order = Order(trace.internal_id, trace.request_id, do, doing.match.rule.name, doing.time_s)
        try:
            orders.give(self._run_dir, order)
        except OSError as error:
            self._errors.count(STAGE, error)
            self._settle(doing, "failed", str(error))
            return
        self._ordered[order.name] = doing

    def _post(self, doing: _Doing, scores: Mapping[str, Any]) -> None:
        rule = doing.match.rule
        url, secret = rule.webhook.url, rule.secret_path
        assert url is not None
        assert secret is not None
        sender = self._senders.get((url, secret))
        if sender is None:
            sender = self._senders[url, secret] = self._sender(url, secret)
        body = _body(doing, scores)
        if len(body) > MAX_BODY_BYTES:
            # What a request asks for and what it is called is its client's to say: no way past a rule.
            log_once(
                logger,
                logging.WARNING,
                "large-event",
                "A webhook of rule %s tells no scores: with them it has %d bytes, and may have %d. The request's trace "
                "has them; have fewer signals asked for (glassbox_signals), or fewer probes",
                rule.name,
                len(body),
                MAX_BODY_BYTES,
            )
            body = _body(doing, None)
        if len(body) > MAX_BODY_BYTES:
            self._settle(
                doing,
                "failed",
                f"an event must have at most {MAX_BODY_BYTES} bytes, got {len(body)} without scores, most of them the "
                "request's id; bound X-Request-Id in front of vLLM",
            )
            return
        event = Event(doing.id, body, lambda outcome, why: self._told.append((doing, outcome, why)))
        if not sender.offer(event):
            self._settle(doing, "dropped", "too many webhooks wait")

    def collect(self, config: ActionsConfig) -> None:
        """Hear what came of orders and webhooks, and write the audit file. Never raises."""
        with self._errors.guard(STAGE):
            self._collect_answers()
        while self._told:
            doing, outcome, why = self._told.popleft()
            self._settle(doing, outcome, why)
        self._close_senders({(rule.webhook.url, rule.secret_path) for rule in config.rules})
        self.note_acts()
        with self._errors.guard("audit"):
            self._write_audit(config)
        self._forget_counts({rule.name for rule in config.rules})

    def note_acts(self) -> None:
        """Leave what was done beside the requests' traces. Never raises."""
        acts, self._fresh_acts = self._fresh_acts, {}
        with self._errors.guard(STAGE):
            for key, of_request in acts.items():
                self._acts.note(key, of_request)

    def _collect_answers(self) -> None:
        if not self._ordered:
            return
        for name, outcome in orders.answers(self._run_dir).items():
            doing = self._ordered.pop(name, None)
            orders.withdraw(self._run_dir, name)
            if doing is not None:
                # A tag that comes too late for the response is in span and record all the same.
                tagged = doing.action == "tag" and outcome == "late"
                self._settle(doing, "done" if tagged else outcome)
        old_s = self._clock() - ANSWER_S
        for name in [name for name, doing in self._ordered.items() if doing.time_s < old_s]:
            doing = self._ordered.pop(name)
            orders.withdraw(self._run_dir, name)
            self._settle(doing, "done" if doing.action == "tag" else "failed", _NO_ANSWER)

    def _close_senders(self, wanted: set[tuple[str | None, Path | None]]) -> None:
        for key in self._senders.keys() - wanted:
            self._senders.pop(key).close(timeout_s=0.0)

    def _settle(self, doing: _Doing, outcome: str, why: str = "") -> None:
        """What came of an action is known."""
        assert outcome in OUTCOMES
        match = doing.match
        self._counts[count_key(match.rule.name, doing.action, outcome)] += 1
        stage = _STAGES.get(doing.action)
        if stage is not None and outcome == "failed":
            self._errors.count(stage, f"rule {match.rule.name}: {why}")
        elif stage is not None and outcome == "done":
            self._errors.worked(stage)
        line = {
            "time": round(self._clock(), 3),
            "applied": round(doing.time_s, 3),
            "event": doing.id,
            **_found(match),
            "action": doing.action,
            "outcome": outcome,
            "why": why,
            **doing.about,
        }
        self._lines.append(json.dumps(line, allow_nan=False, separators=(",", ":")))
        value = match.value if math.isfinite(match.value) else None
        act = Act(match.rule.name, doing.action, outcome, value, doing.time_s)
        key = (doing.about["engine"], doing.about["internal_id"], doing.about["client"])
        self._fresh_acts.setdefault(key, deque(maxlen=MAX_ACTS)).append(act)

    def _forget_counts(self, rules: set[str]) -> None:
        """Edits could make rules of ever new names, each of them a label."""
        if len({key.partition("|")[0] for key in self._counts}) > _MOST_RULES:
            self._counts = Counter({k: n for k, n in self._counts.items() if k.partition("|")[0] in rules})

    def _write_audit(self, config: ActionsConfig) -> None:
        path = config.audit.expanded_path
        if path is None:
            self._lines.clear()
            return
        wanted = (path, config.audit.max_mb)
        if self._audit is None or self._audit[0] != wanted:
            self._audit = (wanted, RotatingFile(path, config.audit.max_mb * BYTES_PER_MB))
        self._audit[1].append(list(self._lines))  # raises if the disk is full: they come again
        self._lines.clear()

    def close(self, config: ActionsConfig) -> None:
        """Send and write what waits; what nobody has answered by then has failed."""
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        for name, doing in self._ordered.items():
            orders.withdraw(self._run_dir, name)
            self._settle(doing, "failed", "glassbox's exporter ended")
        self._ordered.clear()
        self.collect(config)


def _body(doing: _Doing, scores: Mapping[str, Any] | None) -> bytes:
    """Of an event; without scores they are null."""
    data = {**doing.about, **_found(doing.match), "scores": scores}
    content = {"type": "glassbox.rule_applied", "timestamp": _iso(doing.time_s), "data": data}
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _side(rule: RuleConfig) -> str:
    return f"{'above' if rule.above is not None else 'below'} {rule.threshold:g}"


def _found(match: Match) -> dict[str, Any]:
    rule = match.rule
    return {
        "rule": rule.name,
        "condition": rule.condition,
        "value": match.value if math.isfinite(match.value) else None,
        "threshold": rule.threshold,
        "dry_run": rule.dry_run,
    }


def _about(trace: RequestTrace) -> dict[str, Any]:
    """What is told of a request: who, never what it said."""
    return {
        "request_id": trace.request_id,
        "internal_id": trace.internal_id,
        "engine": trace.engine,
        "model_name": trace.model_name,
        "requested_model": trace.requested_model,
        "client": trace.client,
        "status": trace.status,
        "prompt_len": trace.prompt_len,
        "num_generated": trace.num_generated,
    }


def _iso(time_s: float) -> str:
    whole, part = divmod(round(time_s * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{part:03d}Z"
