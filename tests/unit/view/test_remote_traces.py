"""Samples of a server with several ranks: features are of all heads, whichever rank writes its part last."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from glassbox.config.load import GlassboxConfig
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from glassbox.view.asking import NO_ACCESS
from glassbox.view.samples.remote import RemoteModel
from glassbox.view.samples.samples_file import read_samples
from glassbox.web.request_routes import request_routes
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace

HEADS = (0, 1), (2, 3)
# Prompt, answer, and kept rows up to the last one.
PROMPT, ANSWER, POSITIONS = 6, 3, (5, 6, 7)


class TwoRanks:
    """A server of completions: the first rank has written its part when the answer is there, the other one later."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.status = run_dir, "finished"
        for rank, heads in enumerate(HEADS):
            place = {"rank": rank, "head_offset": heads[0], "total_heads": 4, "interval_s": 60.0}
            write_snapshot(run_dir, make_snapshot(layers=(0, 3), instance=f"i{rank}", **place))
        config = GlassboxConfig()
        routes = [Route("/v1/completions", self.complete, methods=["POST"])]
        self.app = Starlette(routes=[*routes, *request_routes(run_dir, lambda: config, self.count)])

    def count(self, _: str) -> None:
        raise AssertionError("an error that isn't the client's")

    def part(self, rank: int) -> RequestTrace:
        now_s = time.time()
        at = {"rank": rank, "instance": f"i{rank}", "heads": HEADS[rank], "status": self.status, "spans": ()}
        end_s = None if self.status == "active" else now_s
        rows = {"positions": POSITIONS, "prompt_len": PROMPT, "num_generated": ANSWER, "attention": False, "top_k": 0}
        return make_trace(seed=rank, internal_id="cmpl-1-0-aa", start_time_s=now_s, end_time_s=end_s, **at, **rows)

    def write(self, rank: int) -> None:
        write_trace(traces_path(self.run_dir), self.part(rank))

    async def complete(self, _: Request) -> Response:
        self.write(0)
        threading.Timer(0.5, self.write, [1]).start()
        usage = {"prompt_tokens": PROMPT, "completion_tokens": ANSWER}
        return JSONResponse({"id": "cmpl-1", "choices": [{"text": " so it is"}], "usage": usage})


@pytest.fixture
def two_ranks(tmp_path: Path) -> TwoRanks:
    return TwoRanks(tmp_path / "run")


@pytest.fixture
def url(two_ranks: TwoRanks) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(two_ranks.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("status", ["finished", "active"])
def test_features_of_all_heads(two_ranks: TwoRanks, url: str, status: Any, tmp_path: Path) -> None:
    """Also on an idle server, where a request stays active that has all its rows."""
    two_ranks.status = status
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Is it?", "label": True}))
    (row,) = RemoteModel(url, "tiny", NO_ACCESS, timeout_s=20.0).rows(read_samples(data).samples)
    assert row.problem is None
    heads = {int(name.rpartition("_H")[2]) for name in row.features if "_H" in name}
    assert {0, 1, 2, 3} == heads
