"""A vLLM server of our own: started, watched, and never left behind (models.engines.process).

settings = ServerSettings("artifacts/foundation/generator", log=Path(".work/vllm.log"))
with launched(settings) as url:  # http://127.0.0.1:PORT/v1
    ...
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

import psutil

from models.engines.base import EngineError
from models.engines.process import POLL_S, OwnProcess, Report, say

HOST = "127.0.0.1"
HEALTH_TIMEOUT_S = 2.0
DYING_S = 3.0
"""Most to wait for the end of a server that answers no more."""


def vllm_command(python: str = sys.executable) -> tuple[str, ...]:
    """The command that starts vLLM's server with the interpreter of the environment it is installed in. It is
    to say what it found in its cache, and not to log every call."""
    options = ("--enable-prompt-tokens-details", "--disable-uvicorn-access-log")
    return (python, "-m", "vllm.entrypoints.openai.api_server", *options)


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
def launched(settings: ServerSettings, report: Report = say) -> Iterator[str]:
    """The address of a server that lives as long as the block; use Server to look after it or restart it.

    Raises EngineError if it does not start; and in place of an error inside the block if the server has died.
    """
    with Server(settings, report) as server:
        yield server.url


class Server:
    """One server of our own. Entering the block starts it, leaving ends it and all its processes."""

    def __init__(self, settings: ServerSettings, report: Report = say) -> None:
        s = self.settings = settings
        self.port = 0
        self._reviving = threading.Lock()
        self._process = OwnProcess(
            "the server", s.log, report, s.start_timeout_s, s.grace_s, s.report_every_s
        )

    @property
    def url(self) -> str:
        """The address for an OpenAI client."""
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Start and wait for health. Raises EngineError, with nothing left running."""
        s, process = self.settings, self._process
        self.port = free_port(self.port or s.port)
        try:
            address = ("--host", HOST, "--port", str(self.port))
            process.start([*s.command, "--model", s.model, *address, *s.arguments], s.environment)
            process.await_ready(lambda: _status(self.url) == 200, "answer /health")
            self.check()
            self._refuse_stranger()
        except BaseException:
            self.stop()
            raise
        process.report(f"{s.model}: served on {self.url} after {process.elapsed_s:.0f} s; log: {s.log}")

    def check(self, within_s: float = 0.0) -> None:
        """Raises EngineError with the end of the log if the server has died, or dies within so many seconds.
        Costs one system call where it need not wait. A server that hangs is noticed by the time-outs of its
        requests only."""
        self._process.check(within_s)

    def restart(self) -> None:
        """End what is left of it and start it again at the same address."""
        self.stop()
        self.start()

    def revive(self, hopeless: bool = False) -> bool:
        """Start it again if it has died, and say whether it had. hopeless: do not, but raise EngineError with
        the end of its log."""
        with self._reviving:
            try:
                self.check()
            except EngineError as error:
                if hopeless:
                    raise
                self._process.report(f"{error}\nstarting it again")
                self.restart()
                return True
            return False

    def stop(self) -> None:
        """End the server and all that descends from it. Idempotent."""
        self._process.stop()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):  # a death is told a moment later than connections break
                self._process.check(DYING_S if _status(self.url) == 0 else 0)
        finally:
            self.stop()

    def _refuse_stranger(self) -> None:
        """EngineError if a process that is none of ours listens on our port: two may bind it, until one
        listens."""
        ours = self._process.descendants()
        addresses = {(host, self.port) for host in (HOST, "0.0.0.0", "::")}
        with contextlib.suppress(psutil.Error):
            for held in psutil.net_connections("tcp"):
                listens = held.status == psutil.CONN_LISTEN and held.laddr in addresses
                if listens and held.pid and held.pid not in ours:
                    raise EngineError(
                        f"another process ({held.pid}) answers on port {self.port}: it took it while our "
                        "server was loading; name another port, or none (a free one is taken)"
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
