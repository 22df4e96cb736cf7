"""A vLLM server of our own: started, watched, and never left behind.

    settings = ServerSettings("artifacts/foundation/generator", log=Path(".work/vllm.log"))
    with launched(settings) as url:  # http://127.0.0.1:PORT/v1
        ...

vLLM is several processes, and its engine lives on when the one that was started is killed
(vllm-project/vllm#55510). So a watcher stands between us and the server, in a session of its own. It ends
the server and all that descends from it when it is told to, when this process is gone (however it ended),
and when the server dies by itself. If the watcher is killed, the server gets SIGTERM, and `stop` kills the
process group. The environment is passed on, so that flows.recovery finds what survives even that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

import psutil

from models.engines.base import EngineError

HOST = "127.0.0.1"
POLL_S = 0.1
HEALTH_TIMEOUT_S = 2.0
ORPHAN_GRACE_S = 2.0
"""Grace for what a server that died by itself has left: nobody waits for it."""
UNKILLABLE_S = 5.0
"""The watcher gives up on processes that live this long after SIGKILL."""
RESTARTS = 3
"""How often a server that dies is started again: what kills it more often is in the requests or settings."""
LOG_LINES, LOG_BYTES = 30, 1 << 16
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WATCHER = (
    "import sys; sys.path[:] = sys.argv[1].split(':'); from models.engines.server import _watch; _watch()"
)
"""Run with our sys.path (as multiprocessing does) and without PYTHON* variables, which are for the server."""
REMEDIES = {
    r"No module named '?vllm": "that interpreter has no vLLM: install it, or name one that has it "
    "(command=vllm_command('/path/to/python'))",
    r"^cannot run ": "correct `command`",
    r"unrecognized arguments": "this vLLM does not know one of the arguments: its --help lists them",
    r"address already in use": "another process took the port meanwhile: start again",
    r"out of memory|memory for the cache block|available KV cache memory \(|desired .PU memory utilization": (
        "the model and its KV cache do not fit: lower --max-model-len, change --gpu-memory-utilization, "
        "or use more GPUs (--tensor-parallel-size)"
    ),
}

Report = Callable[[str], None]


def vllm_command(python: str = sys.executable) -> tuple[str, ...]:
    """The command that starts vLLM's server with the interpreter of the environment it is installed in."""
    return (python, "-m", "vllm.entrypoints.openai.api_server")


@dataclass(frozen=True)
class ServerSettings:
    """What to start.

    model: folder or hub id. log: the server's output is appended to it. port: on loopback; None: a free one.
    command: followed by --model, --host, --port and `arguments`. environment: added to ours. grace_s: from
    SIGTERM to SIGKILL.
    """

    model: str
    log: Path
    port: int | None = None
    command: Sequence[str] = vllm_command()
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_timeout_s: float = 900.0
    grace_s: float = 10.0
    report_every_s: float = 5.0


@contextlib.contextmanager
def launched(settings: ServerSettings, report: Report = partial(print, flush=True)) -> Iterator[str]:
    """The address of a server that lives as long as the block; use Server to look after it or restart it.

    Raises EngineError if it does not start; and in place of an error inside the block if the server has died.
    """
    with Server(settings, report) as server:
        yield server.url


class Server:
    """One server of our own. Entering the block starts it, leaving ends it and all its processes."""

    def __init__(self, settings: ServerSettings, report: Report = partial(print, flush=True)) -> None:
        self.settings, self.report = settings, report
        self.port = 0
        self._watcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._began = 0.0
        self._restarts = 0

    @property
    def url(self) -> str:
        """The address for an OpenAI client."""
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Start and wait for health. Raises EngineError, with nothing left running."""
        self.port = free_port(self.port or self.settings.port)
        self._began = time.monotonic()
        try:
            self._watcher = self._spawn()
            self._await_health()
        except BaseException:
            self.stop()
            raise

    def check(self) -> None:
        """Raises EngineError with the end of the log if the server has died. Costs one system call. A server
        that hangs is noticed by the time-outs of its requests only."""
        if self._watcher is None:
            raise EngineError("the server is not running: start it")
        status = self._watcher.poll()
        if status is not None:
            raise self._error(f"the server {_ended(status)} after {self._elapsed():.0f} s")

    def restart(self) -> None:
        """End what is left of it and start it again at the same address."""
        self.stop()
        self.start()

    def revive(self) -> None:
        """Start it again if it has died; at most RESTARTS times, then EngineError with the end of its log."""
        try:
            self.check()
        except EngineError as error:
            if self._restarts >= RESTARTS:
                raise
            self._restarts += 1
            self.report(f"{error}\nstarting it again ({self._restarts} of {RESTARTS})")
            self.restart()

    def stop(self) -> None:
        """End the server and all that descends from it. Idempotent."""
        watcher, self._watcher = self._watcher, None
        if watcher is None:
            return
        watcher.terminate()
        try:
            watcher.wait(self.settings.grace_s + 2 * UNKILLABLE_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
        if watcher.wait() < 0:  # it was killed itself, and could not do its work
            with contextlib.suppress(ProcessLookupError):
                os.killpg(watcher.pid, signal.SIGKILL)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                self.check()
        finally:
            self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        s = self.settings
        server = [*s.command, "--model", s.model, "--host", HOST, "--port", str(self.port), *s.arguments]
        watcher = [sys.executable, "-E", "-P", "-c", WATCHER]
        s.log.parent.mkdir(parents=True, exist_ok=True)
        with s.log.open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(
                [*watcher, ":".join(sys.path), str(os.getpid()), str(s.grace_s), *server],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **s.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _await_health(self) -> None:
        s = self.settings
        reported = 0.0
        while _status(self.url) != 200:
            self.check()
            if self._elapsed() > s.start_timeout_s:
                raise self._error(
                    f"the server did not answer /health within {s.start_timeout_s:.0f} s: "
                    "if it was still loading, allow more (start_timeout_s)"
                )
            if self._elapsed() - reported >= s.report_every_s:
                reported = self._elapsed()
                last = (self._log_end(1) or ["nothing in its log yet"])[0]
                self.report(f"starting the server for {s.model}, {reported:.0f} s: {last[:160]}")
            time.sleep(POLL_S)
        self.check()
        if stranger := self._stranger():
            raise EngineError(
                f"another process ({stranger}) answers on port {self.port}: it took it while our server was "
                "loading; name another port, or none (a free one is taken)"
            )
        self.report(f"{s.model}: served on {self.url} after {self._elapsed():.0f} s; log: {s.log}")

    def _stranger(self) -> int | None:
        """A process that listens on our port and is none of ours: two may bind it, until one listens."""
        assert self._watcher is not None
        ours = {child.pid for child in _descendants(self._watcher.pid)}
        addresses = {(host, self.port) for host in (HOST, "0.0.0.0", "::")}
        with contextlib.suppress(psutil.Error):
            for held in psutil.net_connections("tcp"):
                listens = held.status == psutil.CONN_LISTEN and held.laddr in addresses
                if listens and held.pid and held.pid not in ours:
                    return int(held.pid)
        return None

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _log_end(self, lines: int) -> list[str]:
        """The last lines of what the server has said since it was started, as plain text."""
        data = b""
        with contextlib.suppress(OSError), self.settings.log.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_BYTES))
            data = log.read()
        text = ESCAPES.sub("", data.decode("utf-8", "replace"))
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()][-lines:]

    def _error(self, what: str) -> EngineError:
        lines = self._log_end(LOG_LINES)
        text = "\n".join(lines)
        found = (do for sign, do in REMEDIES.items() if re.search(sign, text, re.IGNORECASE | re.MULTILINE))
        shown = "\n".join(f"  | {line[:500]}" for line in lines) or "  | (nothing)"
        return EngineError(
            f"{what}; {next(found, 'its log says why')}.\nThe end of {self.settings.log}:\n{shown}"
        )


def await_running(url: str, timeout_s: float = 30.0) -> None:
    """Wait for a server that somebody else runs, at its OpenAI address (…/v1). Raises EngineError.

    Any answer but a server error will do: hosted ones have no /health."""
    deadline = time.monotonic() + timeout_s
    while not 0 < _status(url) < 500:
        if time.monotonic() > deadline:
            raise EngineError(
                f"no server answers at {url} (waited {timeout_s:.0f} s): start it there, correct the "
                "address, or let it be started (launch: true)"
            )
        time.sleep(POLL_S)


def free_port(wanted: int | None = None) -> int:
    """A port on loopback that nobody listens on: `wanted`, or any. Raises EngineError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
        try:
            probe.bind((HOST, wanted or 0))
        except (OSError, OverflowError) as error:
            raise EngineError(
                f"port {wanted} of {HOST} cannot be used ({error}): stop what listens there, name another "
                "port or none (a free one is taken), or, if it is the server you want, use it (launch: false)"
            ) from error
        return int(probe.getsockname()[1])


def _status(url: str) -> int:
    """HTTP status of a server's /health; 0 if nothing answers. Proxies are for other machines: not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    health = url.rstrip("/").removesuffix("/v1") + "/health"
    try:
        with opener.open(health, timeout=HEALTH_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return int(error.code)
    except (OSError, HTTPException, ValueError):
        return 0


def _ended(status: int) -> str:
    """How the server (or its watcher) ended, from the watcher's exit status."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return "was killed (SIGKILL: often for want of memory)"
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"died with exit status {status}"


def _watch() -> None:
    """The watcher's whole life. Exits with the server's status, 128 + signal if it was killed."""
    owner, grace_s, command = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a killed server leaves becomes our child, not init's
    try:
        server = subprocess.Popen(command, preexec_fn=partial(_prctl, PR_SET_PDEATHSIG, signal.SIGTERM))
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}")
        sys.exit(127)
    while server.poll() is None and not told and os.getppid() == owner:
        time.sleep(POLL_S)
    died = server.returncode
    _end_descendants(server, grace_s if died is None else ORPHAN_GRACE_S)
    status = died if died is not None else 0
    sys.exit(status if status >= 0 else 128 - status)


def _end_descendants(server: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM for the server, which knows how to end its own; when it is gone, for those it has left;
    SIGKILL for all after the grace."""
    deadline = time.monotonic() + grace_s
    told: set[int] = set()
    while (left := _descendants()) and time.monotonic() < deadline + UNKILLABLE_S:
        gone = server.poll() is not None
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in told and (gone or process.pid == server.pid):
                    told.add(process.pid)
                    process.terminate()
        time.sleep(POLL_S / 2)


def _descendants(pid: int | None = None) -> list[psutil.Process]:
    """The living ones, of this process or another."""
    living = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
    return living


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
