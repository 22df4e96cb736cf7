"""vLLM's offline engine as an engine of ours, in a process and an environment of its own.

    settings = WorkerSettings(Path(".work/vllm.log"), worker_command("/opt/vllm/bin/python"))
    with VLLMEngine("artifacts/foundation/generator", "data", 256, settings) as engine:
        reply = await engine.ask(Request("q1/0", prompt, Sampling()))

The same engine as behind vLLM's server, without HTTP: an image is sent once, and named from then on. Its
process is models/engines/vllm_worker.py: started on entering the block, and again when it dies (what it had
not answered is then asked again, little by little, until it is known what kills it: models.engines.suspects),
and left running by `close`.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import orjson

from models.engines.base import Completion, EngineError, Failure, Reply, Request
from models.engines.openai import UNSENDABLE
from models.engines.pictures import Pictures
from models.engines.process import OwnProcess, Report, say
from models.engines.session import Session
from models.engines.suspects import KILLED, Suspects
from models.engines.vllm_channel import Asked, Channel, settle, shown
from models.images import ImageSource

WORKER = Path(__file__).with_name("vllm_worker.py")
ENGINE_ERROR = "engine error"
"""The worker's word for what another attempt may cure."""
WORKER_DIED = "worker died"


def worker_command(python: str = sys.executable) -> tuple[str, ...]:
    """The command that starts the worker with the interpreter of the environment that has vLLM."""
    return (python, str(WORKER))


@dataclass(frozen=True)
class WorkerSettings:
    """What to start, and how long to wait.

    log: the worker's output is appended to it. command: followed by --model and `arguments`, which are those
    of vLLM's engine. environment: added to ours. silence_s: with requests under way and no reply for so long
    it is taken to hang, and started again. attempts: at one request. seeded: send a seed where temperature >
    0. image_bytes: of encoded images that the worker keeps. grace_s: from SIGTERM to SIGKILL.
    """

    log: Path
    command: Sequence[str] = worker_command()
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    silence_s: float = 600.0
    attempts: int = 3
    seeded: bool = True
    image_bytes: int = 2**29
    start_timeout_s: float = 900.0
    grace_s: float = 10.0
    report_every_s: float = 5.0


class VLLMEngine:
    """One model in a worker of our own. images: as for OpenAIEngine. capacity: requests that the worker has
    at once; vLLM decodes up to its --max-num-seqs of them together.

    retries: what was asked again, by kind. independent: as for OpenAIEngine.
    """

    independent = True

    def __init__(
        self,
        model: str,
        images: ImageSource | str | Path,
        capacity: int,
        settings: WorkerSettings,
        report: Report = say,
    ) -> None:
        s = settings
        self.model, self.capacity, self.settings = model, capacity, s
        self.retries: Counter[str] = Counter()
        self._process = OwnProcess(
            f"vLLM's engine for {model}", s.log, report, s.start_timeout_s, s.grace_s, s.report_every_s
        )
        self._pictures = Pictures(images, 0)
        self._numbers = itertools.count()
        self._session: Session | None = None
        self._keeper: threading.Thread | None = None
        self._stopping = False
        self._lock = threading.Lock()  # over what follows, which the keeper and the event loop share
        self._waiting: dict[int, Asked] = {}
        self._suspects = Suspects()
        self._channel: Channel | None = None
        self._dead: EngineError | None = EngineError("vLLM's engine is not running: start it")

    def start(self) -> None:
        """Start the worker and wait until it is ready. Raises EngineError, with nothing left running."""
        self._stopping, self._suspects = False, Suspects()
        self._start_worker()
        self._keeper = threading.Thread(target=self._keep, name="vllm-keeper", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """End the worker and all its processes. Idempotent."""
        self._stopping = True
        self._process.stop()  # the keeper notices
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        self._give_up(EngineError("vLLM's engine has been stopped"))

    def __enter__(self) -> VLLMEngine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def ask(self, request: Request) -> Reply:
        """Engine.ask. Raises EngineError if the worker dies whatever it is asked; every later request then
        fails likewise."""
        if self._session is None:
            self._session = Session(self.capacity)
        try:
            return await self._session.answer(request, lambda: self._attempts(request))
        except orjson.JSONEncodeError as error:  # half a surrogate pair, a schema that is no JSON
            return Failure(UNSENDABLE, shown(str(error)))

    async def close(self) -> None:
        """Engine.close: cancels the tasks that wait for a reply. The worker lives on; the engine may be used
        again, also from another event loop."""
        session, self._session = self._session, None
        if session is not None:
            await session.end()

    async def _attempts(self, request: Request) -> Reply:
        for _ in range(self.settings.attempts - 1):
            reply = await self._reply(request)
            if isinstance(reply, Completion) or reply.reason != ENGINE_ERROR:
                return reply
            self.retries[ENGINE_ERROR] += 1
        return await self._reply(request)

    async def _reply(self, request: Request) -> Reply:
        number = next(self._numbers)
        asked = Asked(number, request, self.settings.seeded)
        with self._lock:
            if self._dead is not None:
                raise EngineError(str(self._dead))
            if self._suspects.is_deadly(asked.prompt):
                return KILLED
            self._waiting[number] = asked
            self._send([asked])
        try:
            return await asked.future
        finally:
            with self._lock:
                if self._waiting.pop(number, None) is not None and asked.sent and self._channel is not None:
                    self._channel.cancel(number)
                if self._suspects.left(number):
                    self._send(self._waiting.values())

    def _send(self, some: Iterable[Asked]) -> None:
        """Those of them whose turn it is; the lock is held."""
        if self._channel is None:
            return
        for asked in some:
            if not asked.sent and self._suspects.may_ask(asked.number):
                asked.sent = True
                self._channel.send(asked)

    def _keep(self) -> None:
        """The keeper's whole life: hands out replies; when the worker dies, starts another."""
        try:
            while not self._stopping:
                try:
                    self._hand_out()
                except EngineError as error:
                    self._revive(error)
        except EngineError as hopeless:
            self._give_up(hopeless)
        except Exception as error:
            self._give_up(EngineError(f"the keeper of vLLM's engine failed: {error!r}"))
            raise

    def _hand_out(self) -> None:
        """Replies to those who asked. Raises EngineError when the worker has died or is taken to hang."""
        assert self._channel is not None
        heard = time.monotonic()
        for replies in self._channel.replies():
            with self._lock:
                if replies or not self._waiting:
                    heard = time.monotonic()
                settled = [(self._waiting.pop(number, None), reply) for number, reply in replies]
                others = [
                    self._suspects.left(number, isinstance(reply, Completion)) for number, reply in replies
                ]
                if any(others):
                    self._send(self._waiting.values())
            settle((asked, reply) for asked, reply in settled if asked is not None)
            if (silent_s := time.monotonic() - heard) > self.settings.silence_s:
                raise self._process.error(
                    f"{self._process.name} has said nothing for {silent_s:.0f} s, with "
                    f"{len(self._waiting)} requests under way"
                )

    def _revive(self, error: EngineError) -> None:
        """Another worker, asked what the last one had not answered. Raises EngineError if there is none."""
        with self._lock:
            channel, self._channel = self._channel, None
            deadly, hopeless = self._suspect(), self._suspects.hopeless
        settle((asked, KILLED) for asked in deadly)
        self._process.stop()
        if channel is not None:
            channel.end()
        self._go_on()
        if hopeless:
            raise error
        self._process.report(f"{error}\nstarting it again")
        self._start_worker()

    def _suspect(self) -> list[Asked]:
        """What the worker that has died was asked is suspected. Returns what is not to be asked again; the
        lock is held."""
        sent = [asked for asked in self._waiting.values() if asked.sent]
        self.retries[WORKER_DIED] += len(sent)
        for asked in sent:
            asked.sent = False
        self._suspects.died({asked.number: asked.prompt for asked in sent})
        deadly = [asked for asked in self._waiting.values() if self._suspects.is_deadly(asked.prompt)]
        for asked in deadly:
            del self._waiting[asked.number]
            self._suspects.left(asked.number)
        return deadly

    def _start_worker(self) -> None:
        s = self.settings
        channel = Channel(self._process, self._pictures, s.image_bytes)
        try:
            self._process.start([*s.command, "--model", self.model, *s.arguments], s.environment, piped=True)
            channel.open()
            self._process.await_ready(lambda: self._go_on() and channel.is_ready(), "load the model")
        except BaseException:
            self._process.stop()
            channel.end()
            raise
        with self._lock:
            self._channel, self._dead = channel, None
            self._send(self._waiting.values())
        self._process.report(
            f"{self.model}: loaded after {self._process.elapsed_s:.0f} s; log: {self.settings.log}"
        )

    def _go_on(self) -> bool:
        """True, or EngineError if we have been told to stop."""
        if self._stopping:
            raise EngineError("vLLM's engine has been stopped")
        return True

    def _give_up(self, error: EngineError) -> None:
        """Whoever waits is told, and whoever asks from here on."""
        with self._lock:
            channel, self._channel = self._channel, None
            waiting, self._waiting = self._waiting, {}
            self._dead = error
        if channel is not None:
            channel.end()
        settle((asked, error) for asked in waiting.values())
