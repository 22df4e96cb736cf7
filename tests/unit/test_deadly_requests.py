"""Requests that kill the server: ours that is started again, or another's that comes back.

The server is a stand-in of a few lines that takes vLLM's arguments and dies as vLLM does.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.engines.base import Completion, EngineError, Reply, Request, Sampling
from models.engines.openai import ClientSettings, OpenAIEngine
from models.engines.server import Server, ServerSettings, free_port
from models.engines.suspects import KILLED, RESTARTS
from models.vlm import Conversation

STAND_IN = """
import json, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder = Path(__file__).parent
port = int(sys.argv[sys.argv.index("--port") + 1])
with (folder / "starts").open("a") as file:
    print(os.getpid(), file=file)
print("engine 7 is loaded", flush=True)
answered, dying = (folder / "answered").open("a"), threading.Event()

class Service(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.reply(200, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if text.startswith("poison") or "--broken" in sys.argv:
            if "--at-once" in sys.argv:
                os._exit(3)
            dying.set()
            service.socket.close()
            threading.Timer(0.3, os._exit, [3]).start()
        dying.wait(float(text.split()[1]) if text.startswith("slow ") else 0.02)
        if dying.is_set():
            self.close_connection = True
            return self.reply(500, {"error": "EngineDeadError"})
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        self.reply(200, {"choices": [choice]})
        print(text, file=answered, flush=True)
    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

service = Service(("127.0.0.1", port), Handler)
service.serve_forever()
"""
QUICK = ClientSettings(backoff_s=0.02, patience_s=20)
Launched = Callable[..., Server]


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, str]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return sys.executable, str(script)


@pytest.fixture
def launched(tmp_path: Path, command: Sequence[str]) -> Launched:
    """launched(*arguments): a server of our own, to be started."""

    def make(*arguments: str) -> Server:
        log = tmp_path / "server.log"
        settings = ServerSettings("m", log, command=command, arguments=arguments, grace_s=1.0)
        return Server(settings, lambda line: None)

    return make


@contextmanager
def supervised(command: Sequence[str], *arguments: str) -> Iterator[str]:
    """The address of a server that somebody else starts again whenever it has died."""
    port, ended = free_port(), threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def supervise() -> None:
        while not ended.is_set():
            running[:] = [subprocess.Popen([*command, "--port", str(port), *arguments])]
            running[0].wait()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        ended.set()
        running[0].kill()
        supervisor.join()


def engine_of(server: Server, capacity: int = 64) -> OpenAIEngine:
    return OpenAIEngine(server.url, "m", "data", capacity, QUICK, server.revive)


def request(text: str, seed: int = 0) -> Request:
    return Request(f"{text}/{seed}", Conversation([], [(text, "")]), Sampling(1.0, seed=seed))


def ask_all(engine: OpenAIEngine, texts: Sequence[str]) -> list[Reply]:
    async def run() -> list[Reply]:
        try:
            return await asyncio.gather(*(engine.ask(request(text, n)) for n, text in enumerate(texts)))
        finally:
            await engine.close()

    return asyncio.run(run())


def shown(replies: Sequence[Reply]) -> list[str]:
    return [reply.text if isinstance(reply, Completion) else reply.reason for reply in replies]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def among_forty(*poison: str) -> list[str]:
    texts = [f"text {n}" for n in range(40 - len(poison))]
    for n, text in enumerate(poison):
        texts.insert(10 + 15 * n, text)
    return texts


def expected(texts: Sequence[str]) -> list[str]:
    return [KILLED.reason if text.startswith("poison") else text for text in texts]


@pytest.mark.parametrize("how", [["--at-once"], []])
@pytest.mark.parametrize(("poison", "deaths"), [(["poison"], 3), (["poison 1", "poison 2"], 5)])
def test_what_kills_our_server_is_found_and_the_others_are_answered_once(
    launched: Launched, tmp_path: Path, poison: list[str], deaths: int, how: list[str]
) -> None:
    texts = among_forty(*poison)
    with launched(*how) as server:
        engine = engine_of(server)
        assert shown(ask_all(engine, texts)) == expected(texts)
        assert shown(ask_all(engine, [poison[0], "after"])) == [KILLED.reason, "after"]
        assert engine.counters.failures == {KILLED.reason: len(poison) + 1}
    assert len(lines(tmp_path / "starts")) <= 1 + deaths
    assert max(Counter(lines(tmp_path / "answered")).values()) == 1


def test_what_kills_our_server_is_found_however_few_calls_are_under_way(
    launched: Launched, tmp_path: Path
) -> None:
    texts = among_forty("poison 1", "poison 1", "poison 2")
    with launched("--at-once") as server:
        assert shown(ask_all(engine_of(server, 2), texts)) == expected(texts)
    assert len(lines(tmp_path / "starts")) <= 1 + 4


def test_a_server_that_dies_whatever_it_is_asked_is_given_up_with_the_end_of_its_log(
    launched: Launched, tmp_path: Path
) -> None:
    with (
        launched("--broken", "--at-once") as server,
        pytest.raises(EngineError, match=r"exit status 3[\s\S]*\| engine 7 is loaded"),
    ):
        ask_all(engine_of(server), among_forty())
    assert len(lines(tmp_path / "starts")) == 1 + RESTARTS


@pytest.mark.parametrize("how", [["--at-once"], []])
def test_what_kills_the_server_of_somebody_else_is_found(
    command: Sequence[str], tmp_path: Path, how: list[str]
) -> None:
    texts = among_forty("poison 1", "poison 2")
    with supervised(command, *how) as url:
        engine = OpenAIEngine(url, "m", "data", 64, QUICK)
        assert shown(ask_all(engine, texts)) == expected(texts)
    assert max(Counter(lines(tmp_path / "answered")).values()) == 1


def test_the_server_of_somebody_else_that_always_dies_is_not_asked_for_ever(
    command: Sequence[str],
) -> None:
    with (
        supervised(command, "--broken", "--at-once") as url,
        pytest.raises(EngineError, match="5 times in a row without an answer"),
    ):
        ask_all(OpenAIEngine(url, "m", "data", 64, QUICK), among_forty())


def test_close_while_it_is_looked_for_what_kills_the_server(launched: Launched, tmp_path: Path) -> None:
    with launched() as server:
        engine = engine_of(server)

        async def run() -> list[Reply | BaseException]:
            texts = [*(f"slow 3 {n}" for n in range(20)), "poison"]
            asked = [asyncio.create_task(engine.ask(request(text))) for text in texts]
            while len(lines(tmp_path / "starts")) < 2:
                await asyncio.sleep(0.02)
            await engine.close()
            return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(ended, asyncio.CancelledError) for ended in asyncio.run(run()))
        texts = [f"text {n}" for n in range(40)]
        assert shown(ask_all(engine, texts)) == texts
