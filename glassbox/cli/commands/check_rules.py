"""What `glassbox check` says of rules: what each does, about which requests, and what it would not do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from glassbox.config.load import GlassboxConfig, RuleConfig


def rule_lines(config: "GlassboxConfig") -> Iterator[str]:
    """Each rule in words; nothing without rules."""
    rules, requests = config.actions.rules, config.requests
    if not rules:
        return
    for rule in rules:
        yield from _lines_of(rule)
    if not requests.opt_in and requests.trace_rate <= 0:
        yield "No rule applies: no request is traced (requests.opt_in: false, requests.trace_rate: 0)."
    else:
        asked = "those whose client asks" if requests.opt_in else ""
        chosen = f"{requests.trace_rate:.3g} of all others" if requests.trace_rate > 0 else ""
        yield f"Rules look at traced requests: {' and '.join(filter(None, (asked, chosen)))}."
    if config.actions.audit.path is None:
        yield "What rules do is written to no file; set actions.audit.path for one."
    else:
        yield f"What rules do is written to {config.actions.audit.expanded_path} (actions.audit.path)."


def _lines_of(rule: "RuleConfig") -> Iterator[str]:
    when = "while requests run" if rule.watches_running else "when requests have ended"
    least = f" with at least {rule.min_generated} generated tokens" if rule.min_generated else ""
    dry = "; a dry run: it only says what it would do" if rule.dry_run else "; it is done (dry_run: false)"
    yield f"Rule {rule.name}: {rule.condition}, {when}{least}{dry}"
    do = ", ".join(f"webhook to {_place(rule)}" if action == "webhook" else action for action in rule.do)
    yield f"  {do}; at most {rule.per_minute} a minute"
    if rule.signal is not None:
        signal = rule.signal.partition(".")[0]
        yield f"  of requests that name {signal} in their glassbox_signals, and of those that the trace rate chooses"


def _place(rule: "RuleConfig") -> str:
    """Scheme and host of a webhook: the path of a chat service's is a secret."""
    parts = urlsplit(rule.webhook.url or "")
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
