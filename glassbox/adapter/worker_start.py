"""When one of vLLM's workers begins, and when it is about to serve: its warm-up begins, and it is over.

Owns the patch on vLLM's worker classes, and nothing of what follows from it: the seat is told. It is made right after
their modules were imported, whatever attention backends the worker has: one of which nothing can be observed has to say
so, too. All imports of vLLM are vLLM's own.
"""

from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any, Final

from glassbox.adapter.late_patch import LatePatches
from glassbox.adapter.patch import patch_method
from glassbox.adapter.protocols import VllmWorker
from glassbox.adapter.seat import SEAT

_CPU_WORKER: Final = ("vllm.v1.worker.cpu_worker", "CPUWorker")
# (module, class), the CPU's inherits from the other.
_WORKER_CLASSES: Final = (("vllm.v1.worker.gpu_worker", "Worker"), _CPU_WORKER)
# Comes before the model is loaded; that a module was imported makes no worker of a process.
_BEGIN: Final = "init_device"
# The last call before real steps.
_WARM_UP = "compile_or_warm_up_model"


def install(cpu_worker_begins: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """Tell the seat of every worker of this process; the returned function takes that back.

    Args:
        cpu_worker_begins: is called when a worker on a CPU begins in this process, before it loads its model.
    """

    def wrap_begin(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def init_device(vllm_worker: VllmWorker, *args: Any, **kwargs: Any) -> Any:
            cpu_worker_begins()
            return original(vllm_worker, *args, **kwargs)

        return init_device

    patches = LatePatches()
    for module_name, class_name in _WORKER_CLASSES:
        patches.add(module_name, partial(_patch, class_name, _WARM_UP, _wrap_warm_up))
    module_name, class_name = _CPU_WORKER
    patches.add(module_name, partial(_patch, class_name, _BEGIN, wrap_begin))
    return patches.remove


def _patch(
    class_name: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], module: ModuleType
) -> Callable[[], None]:
    cls: type = getattr(module, class_name)
    if name not in vars(cls):  # inherited from one that is patched
        return lambda: None
    return patch_method(cls, name, wrap)


def _wrap_warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def compile_or_warm_up_model(vllm_worker: VllmWorker, *args: Any, **kwargs: Any) -> Any:
        SEAT.warm_up_begins(vllm_worker)
        result = original(vllm_worker, *args, **kwargs)
        SEAT.warm_up_ended()
        return result

    return compile_or_warm_up_model
