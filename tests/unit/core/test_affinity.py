"""What a bound worker starts runs beside it, not on the cores it computes on."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

ALLOWED = os.sched_getaffinity(0)

pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="needs two cores: with one there is no other to go to")


def in_bound_process(code: str, *arguments: str, **environ: str) -> str:
    """Output of a Python program that is bound to one core; its parent, this process, is not."""
    program = f"import os, sys\nos.sched_setaffinity(0, {{{min(ALLOWED)}}})\n{textwrap.dedent(code)}"
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout


class TestLeaveWorkersCores:
    def test_a_thread_leaves_and_the_others_stay(self) -> None:
        """The calling thread may run where the parent may; the main thread stays bound."""
        printed = in_bound_process(
            """
            import json, threading
            from glassbox.core.affinity import leave_workers_cores

            def run():
                leave_workers_cores(0)
                found.append(sorted(os.sched_getaffinity(0)))

            found = []
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            print(json.dumps([*found, sorted(os.sched_getaffinity(0))]))
            """
        )
        assert json.loads(printed) == [sorted(ALLOWED), [min(ALLOWED)]]

    def test_a_process_that_is_gone_is_no_error(self) -> None:
        """The exporter may have ended before its affinity is set."""
        assert (
            in_bound_process(
                """
            import subprocess
            from glassbox.core.affinity import leave_workers_cores

            child = subprocess.Popen(["true"])
            child.wait()
            leave_workers_cores(child.pid)
            print("done")
            """
            )
            == "done\n"
        )


class TestExporterProcess:
    def test_the_exporter_of_a_bound_worker_is_not_bound(self, tmp_path: Path) -> None:
        """Neither by inheritance nor by the OpenMP variables with which vLLM binds a CPU worker."""
        config = tmp_path / "glassbox.yaml"
        config.write_text(yaml.safe_dump({"export": {"interval_s": 0.2, "jsonl": {"path": str(tmp_path / "x.jsonl")}}}))
        printed = in_bound_process(
            """
            import json, time
            from pathlib import Path
            from glassbox.config.load import load_config
            from glassbox.processes.exporter.launch import ExporterProcess
            from glassbox.store.exporter_status import read_status

            config, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
            exporter = ExporterProcess(config, run_dir)
            exporter.ensure(load_config(config))
            while read_status(run_dir) is None:
                time.sleep(0.02)
            print(json.dumps(sorted(os.sched_getaffinity(exporter.pid))))
            exporter.stop()
            """,
            str(config),
            str(tmp_path / "run"),
            OMP_PLACES=f"{{{min(ALLOWED)}}}",
            OMP_PROC_BIND="true",
        )
        assert json.loads(printed) == sorted(ALLOWED)
