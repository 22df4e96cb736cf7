"""What vLLM's worker is told and what it says, line by line (models/engines/vllm_worker.py).

channel = Channel(process, pictures, image_bytes=2**29)
channel.open()
channel.send(asked := Asked(1, request, seeded=True))
for replies in channel.replies():
    settle((asked, reply) for _, reply in replies)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import IO, Any

import orjson

from models.engines.base import Completion, EngineError, Failure, Reply, Request, Scored
from models.engines.openai import DETAIL_CHARS, chat
from models.engines.pictures import Pictures
from models.engines.process import POLL_S, OwnProcess
from models.engines.suspects import prompt_of
from models.images import UNREADABLE

READ_BYTES = 1 << 18
READY = b'{"ready"'


class Asked:
    """A request on its way, and the future that its reply ends. sent: the worker that runs has been asked.
    Raises orjson.JSONEncodeError for one that is no JSON."""

    def __init__(self, number: int, request: Request, seeded: bool) -> None:
        self.number, self.images, self.prompt = number, request.prompt.images, prompt_of(request)
        self.sent = False
        self.line = orjson.dumps(payload(number, request, seeded), option=orjson.OPT_APPEND_NEWLINE)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Reply] = self.loop.create_future()


class Channel:
    """One run of the worker process. A thread writes to it, and the keeper reads: neither a full pipe nor an
    image that is read from disk holds up an event loop.

    An image is sent when it is first asked about; beyond image_bytes the worker is told to forget the ones
    not asked about for longest.
    """

    def __init__(self, process: OwnProcess, pictures: Pictures, image_bytes: int) -> None:
        self._process, self._pictures, self._image_bytes = process, pictures, image_bytes
        self._outbox: SimpleQueue[Asked | bytes | None] = SimpleQueue()
        self._unsent: deque[tuple[int, Reply]] = deque()
        self._images: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._begun = b""
        self._ended = False
        self._poll = select.poll()
        self._pipes: tuple[IO[bytes], IO[bytes]] | None = None
        self._writer = threading.Thread(target=self._write, name="vllm-writer", daemon=True)

    def open(self) -> None:
        """Once the process is started."""
        watcher = self._process.watcher
        if watcher is None or watcher.stdin is None or watcher.stdout is None:
            raise EngineError(f"{self._process.name} has been stopped")
        self._pipes = watcher.stdin, watcher.stdout
        self._poll.register(watcher.stdout, select.POLLIN)
        self._writer.start()

    def end(self) -> None:
        """Once the process is stopped."""
        self._outbox.put(None)
        if self._pipes is None:
            return
        self._writer.join()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # what could not be written
                pipe.close()

    def send(self, asked: Asked) -> None:
        """Returns at once."""
        self._outbox.put(asked)

    def cancel(self, number: int) -> None:
        """Nobody waits for this reply any more."""
        self._outbox.put(b'{"cancel":%d}\n' % number)

    def is_ready(self) -> bool:
        """Whether it has said so."""
        return any(line.startswith(READY) for line in self._lines(0))

    def replies(self) -> Iterator[list[tuple[int, Reply]]]:
        """Replies with the numbers of their requests, as they come; none now and then. Raises EngineError
        when the process has died, or says what is no reply."""
        while True:
            lines = self._lines(POLL_S)
            try:
                replies = [reply_in(line) for line in lines]
            except (ValueError, LookupError, TypeError) as error:
                raise self._process.error(f"{self._process.name} says what is no reply: {error}") from None
            while self._unsent:
                replies.append(self._unsent.popleft())
            yield replies
            if not lines:
                self._process.check()

    def _lines(self, timeout_s: float) -> list[bytes]:
        """The whole lines that have come; waits for some."""
        assert self._pipes is not None
        if self._ended:
            time.sleep(timeout_s)
        elif self._poll.poll(1000 * timeout_s):
            data = os.read(self._pipes[1].fileno(), READ_BYTES)
            self._ended = not data
            *lines, self._begun = (self._begun + data).split(b"\n")
            return lines
        return []

    def _write(self) -> None:
        """The writer's whole life."""
        assert self._pipes is not None
        stdin = self._pipes[0]
        with contextlib.suppress(OSError):  # it has died: the keeper notices
            while (told := self._outbox.get()) is not None:
                stdin.writelines([told] if isinstance(told, bytes) else self._request(told))
                if self._outbox.empty():
                    stdin.flush()

    def _request(self, asked: Asked) -> Iterator[bytes]:
        """A request, after the images that it needs."""
        try:
            for name in asked.images:
                yield from self._image(name)
        except Exception as error:  # an ImageError, but without the writer all would wait for ever
            reason, detail = getattr(error, "reason", UNREADABLE), getattr(error, "detail", repr(error))
            self._unsent.append((asked.number, Failure(reason, shown(detail))))
            return
        yield asked.line
        while self._bytes > self._image_bytes:
            name, size = self._images.popitem(last=False)
            self._bytes -= size
            yield orjson.dumps({"forget": name}, option=orjson.OPT_APPEND_NEWLINE)

    def _image(self, name: str) -> Iterator[bytes]:
        if name in self._images:
            self._images.move_to_end(name)
            return
        (part,) = self._pictures.read([name])
        line = orjson.dumps({"image": name, "part": part}, option=orjson.OPT_APPEND_NEWLINE)
        self._images[name] = len(line)
        self._bytes += len(line)
        yield line


def payload(number: int, request: Request, seeded: bool) -> dict[str, Any]:
    """What the worker is told of a request, for orjson; the fields of `sampling` are vLLM's."""
    s = request.sampling
    sampling: dict[str, Any] = {
        "temperature": s.temperature,
        "top_p": s.top_p,
        "repetition_penalty": s.repetition_penalty,
        "max_tokens": s.max_new_tokens,
    }
    if seeded and s.temperature > 0:
        sampling["seed"] = s.seed
    if request.log_probs:
        sampling["prompt_logprobs"] = 0  # of the prompt's own tokens alone
    return {
        "id": number,
        "messages": chat(request.prompt, []),
        "images": list(request.prompt.images),
        "sampling": sampling,
        "schema": None if request.schema is None else dict(request.schema),
    }


def reply_in(line: bytes) -> tuple[int, Reply]:
    """The number of a request, and its reply. ValueError, LookupError or TypeError if the line is none."""
    said = orjson.loads(line)
    number: int = said.pop("id")
    if "failed" in said:
        return number, Failure(said["failed"], shown(said["detail"]))
    if "prompt_log_probs" in said:
        said["prompt_log_probs"] = [(token, value) for token, value in said["prompt_log_probs"]]
        return number, Scored(**said)
    return number, Completion(**said)


def settle(replies: Iterable[tuple[Asked, Reply | EngineError]]) -> None:
    """Tell those who asked, from any thread."""
    for asked, reply in replies:
        with contextlib.suppress(RuntimeError):  # its event loop is closed: nobody waits
            asked.loop.call_soon_threadsafe(_tell, asked.future, reply)


def _tell(future: asyncio.Future[Reply], reply: Reply | EngineError) -> None:
    if future.done():
        return
    if isinstance(reply, EngineError):
        future.set_exception(EngineError(str(reply)))
    else:
        future.set_result(reply)


def shown(text: str) -> str:
    """One line, not too long."""
    return " ".join(text.split())[:DETAIL_CHARS]
