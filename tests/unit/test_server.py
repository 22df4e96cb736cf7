"""A server of our own: waited for, watched, and gone with all its processes, whoever dies first.

The server is a stand-in of a few lines that takes vLLM's arguments and has children, as vLLM has.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.engines.base import EngineError
from models.engines.server import Server, ServerSettings, await_running, free_port, launched, vllm_command
from tests.support.imports import REPOSITORY

MARK = "LONGVIEW_TEST_SERVER"
STAND_IN = '''
import argparse, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for name in ("--model", "--host"):
    parser.add_argument(name)
parser.add_argument("--port", type=int)
parser.add_argument("--load-s", type=float, default=0.0)
parser.add_argument("--after-loading", choices=("serve", "die", "hang"), default="serve")
parser.add_argument("--children", choices=("none", "tidy", "stubborn"), default="none")
arguments = parser.parse_args()

CHILD = """
import signal, sys, time
def told(number, frame):
    print("child was told to end", flush=True)
    if sys.argv[1] == "tidy":
        sys.exit(0)
signal.signal(signal.SIGTERM, told)
print("child is up", flush=True)
while True:
    time.sleep(60)
"""
children = []
if arguments.children != "none":  # one in our group, one in a session of its own
    for away in (False, True):
        command = [sys.executable, "-c", CHILD, arguments.children]
        children.append(subprocess.Popen(command, start_new_session=away))

def end(number, frame):
    print("ending what is mine", flush=True)
    time.sleep(0.3)
    for child in children:
        child.kill()
    os._exit(0)

if arguments.children != "stubborn":
    signal.signal(signal.SIGTERM, end)
ready = time.monotonic() + arguments.load_s
while True:
    print("loading", arguments.model, os.environ.get("COLOUR", "no colour"), flush=True)
    if time.monotonic() >= ready:
        break
    time.sleep(0.1)

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if arguments.after_loading == "hang":
            time.sleep(60)
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args):
        pass

if arguments.after_loading == "die":
    for number in range(50):
        print("\\x1b[31mbad weight\\x1b[0m", number)
    sys.exit(3)
ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
'''

Settings = Callable[..., ServerSettings]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of everything that a test starts."""
    name = uuid.uuid4().hex
    monkeypatch.setenv(MARK, name)
    return name


@pytest.fixture
def settings(tmp_path: Path, mark: str) -> Iterator[Settings]:
    """settings(*arguments, **others): a stand-in's, with everything quick."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    defaults: dict[str, Any] = {"start_timeout_s": 30.0, "grace_s": 5.0, "report_every_s": 0.3}

    def make(*arguments: str, **others: Any) -> ServerSettings:
        options = {"command": (sys.executable, str(script)), "arguments": arguments, **defaults, **others}
        return ServerSettings("a/model", log=tmp_path / "logs" / "server.log", **options)

    yield make
    for process in marked(mark):
        process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that carry a test's mark, this one left out."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            alive = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def until_none_is_left(mark: str, timeout_s: float = 8.0) -> list[psutil.Process]:
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def server_pid(url: str) -> int:
    """The process that answers."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=5) as answer:
        return int(answer.read())


def watcher_of(mark: str) -> psutil.Process:
    return next(p for p in marked(mark) if "_watch()" in " ".join(p.cmdline()))


def wait_for_children(log: Path, count: int = 2) -> None:
    deadline = time.monotonic() + 10
    while log.read_text().count("child is up") < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_a_slow_server_is_waited_for_with_its_last_log_line_and_ends_with_the_block(
    settings: Settings, mark: str
) -> None:
    said: list[str] = []
    slow = settings("--load-s", "1", "--children", "tidy", environment={"COLOUR": "green"})
    with launched(slow, said.append) as url:
        wait_for_children(slow.log)
        assert psutil.Process(server_pid(url)) in marked(mark)  # it has our environment
        assert len(marked(mark)) == 4  # watcher, server, two children
    assert marked(mark) == []
    assert any("a/model" in line and "loading a/model green" in line for line in said[:-1])
    assert url in said[-1]
    log = slow.log.read_text()
    assert "ending what is mine" in log and "child was told" not in log  # the server ends its own


def test_a_server_that_dies_while_loading_fails_at_once_with_the_end_of_its_log(
    settings: Settings, mark: str
) -> None:
    dying = settings("--after-loading", "die")
    began = time.monotonic()
    with pytest.raises(EngineError) as error, launched(dying, print):
        pass
    assert time.monotonic() - began < 10
    message = str(error.value)
    assert "exit status 3" in message and "its log says why" in message and str(dying.log) in message
    assert [line for line in message.splitlines() if line.startswith("  | ")] == [
        f"  | bad weight {number}" for number in range(20, 50)
    ]
    assert marked(mark) == []


def test_only_this_start_is_in_the_message(settings: Settings) -> None:
    dying = settings(command=(sys.executable, "-c", "print('second')"))
    dying.log.parent.mkdir()
    dying.log.write_text("first\n")
    with pytest.raises(EngineError) as error, launched(dying, print):
        pass
    assert "second" in str(error.value) and "first" not in str(error.value)
    assert dying.log.read_text() == "first\nsecond\n"


@pytest.mark.parametrize(
    ("command", "todo"),
    [
        ((sys.executable, "-c", "import vllm_is_not_here"), "vllm_command('/path/to/python')"),
        (("/no/such/python", "-m", "vllm"), "correct `command`"),
        ((sys.executable, "-c", "import sys; sys.exit('CUDA out of memory.')"), "--max-model-len"),
    ],
)
def test_the_message_says_what_to_do(settings: Settings, command: tuple[str, ...], todo: str) -> None:
    with pytest.raises(EngineError) as error, launched(settings(command=command), print):
        pass
    assert todo in str(error.value)


def test_the_environment_is_the_server_s_and_cannot_break_its_watcher(settings: Settings) -> None:
    broken = {"PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere"}
    with pytest.raises(EngineError, match=r"exit status 3[\s\S]*\| /nowhere"):
        Server(settings(command=("sh", "-c", "echo $PYTHONHOME; exit 3"), environment=broken), print).start()


def test_a_server_that_hangs_while_loading_is_given_up_and_killed(settings: Settings, mark: str) -> None:
    hanging = settings("--after-loading", "hang", "--children", "stubborn", start_timeout_s=1.0, grace_s=0.5)
    with pytest.raises(EngineError, match=r"within 1 s.*start_timeout_s[\s\S]*loading a/model"):
        Server(hanging, print).start()
    assert marked(mark) == []


def test_an_interrupted_start_leaves_nothing(settings: Settings, mark: str) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Server(settings("--load-s", "60", "--children", "tidy"), interrupt).start()
    assert marked(mark) == []


def test_children_that_do_not_listen_are_killed_after_the_grace(settings: Settings, mark: str) -> None:
    stubborn = settings("--children", "stubborn", grace_s=0.5)
    with launched(stubborn, print):
        wait_for_children(stubborn.log)
    assert marked(mark) == []


@pytest.mark.parametrize("children", ["tidy", "stubborn"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_our_process(
    settings: Settings, mark: str, tmp_path: Path, sign: int, children: str
) -> None:
    s = settings("--children", children)
    code = f"""if True:
        import os, time
        from pathlib import Path
        from models.engines.server import ServerSettings, launched
        with launched(ServerSettings("m", Path({str(s.log)!r}), command={s.command!r},
                                     arguments={s.arguments!r}, grace_s=1.0)) as url:
            if os.fork() == 0:  # a worker that outlives us must not keep the server
                os.environ.clear(); os.execv("/bin/sleep", ["sleep", "3"])
            Path({str(tmp_path / "up")!r}).write_text(url)
            time.sleep(60)
    """
    ours = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    wait_for_children(s.log)
    assert len(marked(mark)) >= 5
    ours.send_signal(sign)
    ours.wait()
    assert until_none_is_left(mark) == []


def test_a_server_killed_in_use_is_noticed_its_children_end_and_it_can_be_restarted(
    settings: Settings, mark: str
) -> None:
    s = settings("--children", "stubborn", grace_s=0.5)
    with Server(s, print) as server:
        wait_for_children(s.log)
        server.check()
        url, first = server.url, server_pid(server.url)
        os.kill(first, signal.SIGKILL)
        assert until_none_is_left(mark) == []
        with pytest.raises(EngineError, match=r"was killed \(SIGKILL[\s\S]*loading a/model"):
            server.check(within_s=5)  # its watcher may be on the way out
        server.restart()
        server.check()
        assert server.url == url and server_pid(url) != first
    assert marked(mark) == []
    with pytest.raises(EngineError, match="not running"):
        server.check()


def test_an_error_of_the_block_gives_way_to_the_death_that_caused_it(settings: Settings, mark: str) -> None:
    with pytest.raises(EngineError, match="was killed") as error, launched(settings(), print) as url:
        os.kill(server_pid(url), signal.SIGKILL)
        until_none_is_left(mark)
        raise ConnectionError("refused")
    assert isinstance(error.value.__context__, ConnectionError)
    with pytest.raises(ConnectionError), launched(settings(), print):
        raise ConnectionError("its own")


SHARED = """
import os, signal, time
from multiprocessing.shared_memory import SharedMemory

memory = SharedMemory(create=True, size=64)
print("shared", memory.name, flush=True)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_shared_memory_of_a_killed_server_is_removed(settings: Settings, mark: str) -> None:
    s = settings(command=(sys.executable, "-c", SHARED))
    with pytest.raises(EngineError, match="was killed"):
        Server(s, print).start()
    name = s.log.read_text().split("shared ")[1].split()[0]
    assert marked(mark) == []
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)


def test_a_killed_watcher_takes_the_server_with_it(settings: Settings, mark: str) -> None:
    s = settings("--children", "tidy")
    with Server(s, print) as server:
        wait_for_children(s.log)
        watcher_of(mark).kill()
        assert until_none_is_left(mark) == []  # SIGTERM from the kernel: it ends its own
        with pytest.raises(EngineError, match="was killed"):
            server.check()


def test_a_killed_watcher_s_stubborn_server_goes_with_the_process_group(
    settings: Settings, mark: str
) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    s = settings(command=(sys.executable, "-c", deaf))
    server = Server(s, lambda line: watcher_of(mark).kill() if "deaf" in line else None)
    with pytest.raises(EngineError, match="was killed"):
        server.start()
    assert until_none_is_left(mark, timeout_s=2) == []


def test_a_taken_port_is_named(settings: Settings, mark: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=rf"port {port} .*in use.*name another port or none"):
            Server(settings(port=port), print).start()
    assert marked(mark) == []
    with pytest.raises(EngineError, match="port 70000"):
        free_port(70000)


class Healthy(BaseHTTPRequestHandler):
    """Answers 200 to everything but 404 to /health below /hosted."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path.startswith("/hosted") else 200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_that_answers_in_place_of_ours_is_not_taken_for_it(settings: Settings, mark: str) -> None:
    port = free_port()

    def take(line: str) -> None:  # while ours is loading
        if not taken:
            taken.append(HTTPServer(("127.0.0.1", port), Healthy))
            threading.Thread(target=taken[0].serve_forever, daemon=True).start()

    taken: list[HTTPServer] = []
    with pytest.raises(EngineError, match=rf"another process \({os.getpid()}\) answers on port {port}"):
        Server(settings("--load-s", "60", port=port), take).start()
    taken[0].shutdown()
    taken[0].server_close()
    assert marked(mark) == []


def test_a_server_that_runs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        for address in (url, f"{url}/v1", f"{url}/v1/", f"{url}/hosted/v1"):
            await_running(address, timeout_s=1)
        other.shutdown()
    for address in (url, "127.0.0.1:8000/v1"):
        with pytest.raises(EngineError, match=r"no server answers at .*launch: true"):
            await_running(address, timeout_s=0.3)


def test_vllm_may_live_in_another_environment() -> None:
    assert vllm_command("/opt/vllm/bin/python")[:2] == ("/opt/vllm/bin/python", "-m")
    assert json.dumps(ServerSettings("m", Path("log")).command) == json.dumps(vllm_command(sys.executable))
