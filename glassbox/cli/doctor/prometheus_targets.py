"""Whether a Prometheus scrapes the server, has glassbox's series and alerts, and which of these fire."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.question import Question, port_of
from glassbox.cli.doctor.reading import get

_PREFIX: Final = "Glassbox"
_SERIES: Final = "glassbox_build_info"
_RULES: Final = "deploy/prometheus/rules.yaml"


class _NoAnswer(RuntimeError):
    """Prometheus did not give what its API promises."""


def scraping(question: Question) -> Iterator[Finding]:
    """Its targets, series and alerts."""
    name = "prometheus.reachable"
    if question.prometheus is None:
        yield unknown(name, "no --prometheus was given", "glassbox doctor --prometheus http://localhost:9090")
        return
    try:
        targets = _list(_api(question.prometheus, "targets?state=active"), "activeTargets")
        yield ok(name, f"{question.prometheus} has {len(targets)} targets")
        yield from _targets(targets, question)
        yield from _series(question.prometheus)
        yield from _alerts(question.prometheus)
    except _NoAnswer as problem:
        yield error(name, str(problem), "give the URL of a Prometheus, as its page is opened in a browser")


def _targets(targets: list[Mapping[str, Any]], question: Question) -> Iterator[Finding]:
    name = "prometheus.targets"
    wanted = [url for url in (question.url, question.own_url) if url is not None]
    if not wanted:
        yield unknown(name, "no --url says which target is the server's")
        return
    own = [target for target in targets if any(_same_place(target, url) for url in wanted)]
    if not own:
        seen = f"no target has the port of {' or '.join(wanted)}"
        yield warning(name, seen, "add the server to scrape_configs: deploy/prometheus/prometheus.yml is an example")
    for target in own:
        where, why = str(target.get("scrapeUrl")), str(target.get("lastError", ""))
        if target.get("health") == "up":
            yield ok(name, f"{where} is up, last scraped {target.get('lastScrape')}")
        elif "sample limit" in why:
            remedy = "raise sample_limit, or lower export.prometheus.detail (glassbox check tells the number of series)"
            yield error(name, f"{where}: {why}", remedy)
        else:
            seen = f"{where} is {target.get('health')}: {why or 'not scraped yet'}"
            yield error(name, seen, "see that Prometheus's host reaches it, with its key and TLS if it asks for them")


def _series(base: str) -> Iterator[Finding]:
    found = _list(_api(base, f"query?query={quote(f'count({_SERIES})')}"), "result")
    if found:
        yield ok("prometheus.series", f"it has {found[0].get('value', ['', '?'])[1]} engines in {_SERIES}")
    else:
        seen = f"it has no {_SERIES} of the last minutes"
        yield error(
            "prometheus.series", seen, "see prometheus.targets and server.metrics; relabelling may drop glassbox_*"
        )


def _alerts(base: str) -> Iterator[Finding]:
    rules = [rule for group in _list(_api(base, "rules?type=alert"), "groups") for rule in _list(group, "rules")]
    own = [rule for rule in rules if str(rule.get("name", "")).startswith(_PREFIX)]
    if not own:
        seen = "it has no alerts of glassbox"
        yield warning("prometheus.alerts", seen, f"add {_RULES} to its rule_files")
        return
    yield ok("prometheus.alerts", f"it has {len(own)} alerts of glassbox")
    for rule in own:
        if rule.get("state") == "firing":
            yield warning("prometheus.firing", f"{rule['name']} fires", f"docs/runbooks/{rule['name']}.md")


def _same_place(target: Mapping[str, Any], url: str) -> bool:
    """By port: Prometheus may know the host by another name."""
    try:
        return port_of(str(target.get("scrapeUrl"))) == port_of(url)
    except ValueError:
        return False


def _api(base: str, path: str) -> Mapping[str, Any]:
    """The field `data` of an answer."""
    url = f"{base}/api/v1/{path}"
    answer = get(url)
    if answer.status is None:
        raise _NoAnswer(f"{url}: {answer.why}")
    if answer.status != 200 or not answer.whole:
        raise _NoAnswer(f"{url} answers HTTP {answer.status}")
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        raise _NoAnswer(f"{url} answers no JSON") from None
    data = found.get("data") if isinstance(found, dict) else None
    if not isinstance(data, dict):
        raise _NoAnswer(f"{url} answers as no Prometheus does")
    return data


def _list(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _NoAnswer(f"its answer has no list of {key}")
    return found
