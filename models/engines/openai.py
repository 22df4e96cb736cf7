"""Any OpenAI-compatible server as an engine: chat completions over kept-alive connections.

    engine = OpenAIEngine("http://127.0.0.1:8000/v1", "artifacts/foundation/generator", images="data")
    prompt = Conversation(["images/a.png"], [("What is the sum of the top row?", "")])
    reply = await engine.ask(Request("q1/0", prompt, Sampling()))

HTTP/1.1 is spoken over asyncio's own streams: with 160 calls in flight that takes 0.07 ms of CPU a call,
where h11 takes 0.20, aiohttp 0.27 and httpx 12. HTTP proxies are not used.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
import random
import ssl
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import orjson

from models.engines.base import Completion, EngineError, Failure, Reply, Request
from models.images import FORMATS, MAX_PIXELS, UNREADABLE, ImageError, ImageSource, decode_image, read_image
from models.vlm import Conversation

KEEP_ALIVE_S = 4.0
"""An idle connection is not used again after this time: uvicorn, and vLLM with it, closes them at 5 s."""
PROBE_S = 5.0
"""Longest pause between two attempts to reach a server that does not listen."""
HEAD_BYTES, ANSWER_BYTES = 2**16, 2**26
"""Most that is read of an answer's head, and of its body."""
DETAIL_CHARS = 200
AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another attempt may cure."""
BUSY = frozenset({429, 503})
"""Statuses whose Retry-After speaks of the server, not of one request (RFC 9110, 10.2.3; RFC 6585, 4)."""
SENT_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif"}
EXIF_ORIENTATION = 0x0112

TIMEOUT, CONNECTION = "timeout", "connection error"
NONSENSE = "not a chat completion"
UNSENDABLE = "prompt is not JSON"

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientSettings:
    """How to ask, how long to wait and how often to try again.

    api_key_env: name of the environment variable that holds the key. timeout_s: one call, the server's queue
    included. attempts: calls for one request. backoff_s: bound of the first random pause, doubled each time
    up to max_backoff_s. patience_s: how long requests wait for a server that does not listen; this costs them
    no attempt. seeded: send a seed where temperature > 0 (vLLM's CPU build dies of it). extra: more fields of
    the payload. image_bytes: of encoded images that are kept.
    """

    api_key_env: str | None = None
    connect_timeout_s: float = 10.0
    timeout_s: float = 600.0
    attempts: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    patience_s: float = 900.0
    seeded: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    image_bytes: int = 2**29


@dataclass
class Counters:
    """What an engine has done so far. calls: sent, repeated ones included. call_s: seconds, summed over
    calls: call_s / (capacity * elapsed seconds) is the engine's utilisation. retries, failures: by kind."""

    calls: int = 0
    in_flight: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    call_s: float = 0.0
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply) -> None:
        """Count a reply."""
        if isinstance(reply, Failure):
            self.failures[reply.reason] += 1
            return
        self.answered += 1
        self.prompt_tokens += reply.prompt_tokens
        self.cached_tokens += reply.cached_tokens
        self.output_tokens += reply.tokens


class _Unreachable(Exception):
    """Nothing listens."""


class _Fault(Exception):
    """A call that brought no completion. kind: as Failure.reason; again: another attempt may help."""

    def __init__(self, kind: str, detail: str, again: bool = True) -> None:
        super().__init__(kind)
        self.kind, self.detail, self.again = kind, detail, again
        self.retry_after_s, self.busy = 0.0, False


class OpenAIEngine:
    """One model of one server. url: its address up to and with /v1. images: where pictures come from by name,
    or the folder their paths are relative to, whose files are then sent as they are. capacity: calls in
    flight.

    A call that fails is tried again; a request that stays without a reply ends as a Failure of the last kind.
    independent: a server batches calls as they happen to arrive, so repeating a chunk would repeat no text.
    """

    independent = True

    def __init__(
        self,
        url: str,
        model: str,
        images: ImageSource | str | Path = "data",
        capacity: int = 160,
        settings: ClientSettings = ClientSettings(),
    ) -> None:
        self.url, self.model, self.capacity, self.settings = url.rstrip("/"), model, capacity, settings
        self.counters = Counters()
        self._key = _api_key(settings.api_key_env)
        self._address = _Address.of(self.url, self._key)
        self._pictures = _Pictures(images, settings.image_bytes)
        self._random = random.Random()
        self._session: _Session | None = None

    async def ask(self, request: Request) -> Reply:
        """Engine.ask. Raises EngineError if the server refuses the key, cannot be trusted (TLS) or has not
        listened for patience_s; every later request then fails likewise until `close`."""
        if request.prompt.turns[-1][1]:
            raise ValueError("the last turn of a prompt must be open (empty answer)")
        if self._session is None:
            self._session = _Session(self.capacity)
        session, task = self._session, asyncio.current_task()
        assert task is not None
        if session.loop is not task.get_loop():
            raise RuntimeError("close() the engine in one event loop before it is used in another")
        session.under_way.add(task)
        try:
            async with session.room:
                reply = await self._reply(session, request)
        finally:
            session.under_way.discard(task)
        self.counters.add(reply)
        return reply

    async def close(self) -> None:
        """Engine.close: cancels the tasks that wait for a reply. The engine may be used again afterwards,
        also from another event loop."""
        session, self._session = self._session, None
        if session is not None:
            await session.end()

    async def _reply(self, session: _Session, request: Request) -> Reply:
        try:
            body = await self._body(session, request)
        except ImageError as error:
            return Failure(error.reason, self._shown(error.detail))
        except orjson.JSONEncodeError as error:  # half a surrogate pair, a schema that is no JSON
            return Failure(UNSENDABLE, self._shown(str(error)))
        connection = session.idle.pop() if session.idle else _Connection(self._address)
        try:
            return await self._attempts(session, connection, body)
        finally:
            session.idle.append(connection)

    async def _body(self, session: _Session, request: Request) -> bytes:
        """The payload. Images are read in a thread, one after the other, unless they are held already."""
        names = tuple(request.prompt.images)
        parts = self._pictures.held(names)
        if parts is None:
            loop = asyncio.get_running_loop()
            parts = await loop.run_in_executor(session.reader, self._pictures.read, names)
        return orjson.dumps(payload(request, self.model, parts, self.settings))

    async def _attempts(self, session: _Session, connection: _Connection, body: bytes) -> Reply:
        failed = 0
        while True:
            await session.clear_to_send()
            try:
                return await self._call(connection, body)
            except _Unreachable as error:
                await self._outlast(session, connection, error)
            except EngineError as error:
                session.dead = error
                raise
            except _Fault as fault:
                failed += 1
                if not fault.again or failed >= self.settings.attempts:
                    return Failure(fault.kind, self._shown(fault.detail))
                self.counters.retries[fault.kind] += 1
                await self._back_off(session, fault, failed)

    async def _call(self, connection: _Connection, body: bytes) -> Completion:
        await connection.open(self.settings.connect_timeout_s)
        self.counters.calls += 1
        self.counters.in_flight += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                answer = await connection.post(body)
        except TimeoutError:
            raise _Fault(TIMEOUT, f"no answer within {self.settings.timeout_s:g} s") from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise _Fault(CONNECTION, str(error) or type(error).__name__) from None
        finally:
            self.counters.in_flight -= 1
            self.counters.call_s += time.monotonic() - began
        return self._read(answer)

    def _read(self, answer: _Answer) -> Completion:
        """The completion in an answer, else a _Fault or EngineError. The key may be echoed by 401 in part, so
        that its text is not shown."""
        if answer.status in (401, 403):
            name = self.settings.api_key_env
            do = (
                f"correct the variable {name}" if name else "name the variable that holds a key (api_key_env)"
            )
            raise EngineError(f"{self.url} refuses the request (HTTP {answer.status}): {do}")
        if answer.status != 200:
            again = answer.status >= 500 or answer.status in AGAIN
            fault = _Fault(f"HTTP {answer.status}", _text(answer.body), again)
            fault.retry_after_s = retry_after_s(answer.headers.get("retry-after", ""))
            fault.busy = answer.status in BUSY
            raise fault
        try:
            return completion(answer.body)
        except ValueError as error:
            raise _Fault(NONSENSE, f"{error}: {_text(answer.body)}") from None

    async def _back_off(self, session: _Session, fault: _Fault, failed: int) -> None:
        """Exponential backoff with full jitter (Brooker 2015), on top of what the server asks for. A server
        that is busy is left alone by all."""
        asked = min(fault.retry_after_s, self.settings.patience_s)
        if asked and fault.busy:
            session.quiet_until = max(session.quiet_until, time.monotonic() + asked)
        bound = min(self.settings.max_backoff_s, self.settings.backoff_s * 2 ** (failed - 1))
        await asyncio.sleep(asked + self._random.uniform(0, bound))

    async def _outlast(self, session: _Session, connection: _Connection, error: _Unreachable) -> None:
        """Wait until the server listens again. One request tries to reach it, the others wait for that."""
        if not session.reachable.is_set():
            return
        session.reachable.clear()
        patience_s = self.settings.patience_s
        LOG.warning("%s cannot be reached (%s): waiting up to %g s", self.url, error, patience_s)
        began, pause = time.monotonic(), self.settings.backoff_s
        try:
            while time.monotonic() - began < patience_s:
                await asyncio.sleep(min(pause, patience_s) * self._random.uniform(0.5, 1))
                pause = min(2 * pause, PROBE_S)
                try:
                    await connection.open(self.settings.connect_timeout_s)
                except _Unreachable as still:
                    error = still
                else:
                    LOG.warning("%s is back after %.0f s", self.url, time.monotonic() - began)
                    return
            session.dead = EngineError(
                f"{self.url} could not be reached for {patience_s:g} s ({error}): start the server, or "
                "correct its address"
            )
            raise session.dead
        finally:
            session.reachable.set()

    def _shown(self, text: str) -> str:
        """One line without the key."""
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden.split())[:DETAIL_CHARS]


class _Session:
    """What belongs to one event loop: the connections, the requests under way and what they wait for.

    reachable: unset while nothing listens. quiet_until: nothing is sent before that time.monotonic(). dead:
    why the engine cannot answer any more.
    """

    def __init__(self, capacity: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.room = asyncio.Semaphore(capacity)
        self.under_way: set[asyncio.Task[Any]] = set()
        self.idle: list[_Connection] = []
        self.reader = ThreadPoolExecutor(1, "images")
        self.reachable = asyncio.Event()
        self.reachable.set()
        self.quiet_until = 0.0
        self.dead: EngineError | None = None

    async def clear_to_send(self) -> None:
        """Wait until the server listens and is not to be left alone."""
        while True:
            await self.reachable.wait()
            if self.dead is not None:
                raise EngineError(str(self.dead))
            quiet_s = self.quiet_until - time.monotonic()
            if quiet_s <= 0:
                return
            await asyncio.sleep(quiet_s)

    async def end(self) -> None:
        """Returns when no request is under way, no thread runs and no socket is open."""
        for task in self.under_way:
            task.cancel()
        while self.under_way:
            await asyncio.sleep(0)
        for connection in self.idle:
            connection.close()
        self.reader.shutdown(cancel_futures=True)
        await asyncio.sleep(0)  # a transport closes its socket one turn after it was told to


@dataclass(frozen=True)
class _Address:
    """Where calls go. head: of every request, up to the value of Content-Length."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    head: bytes = field(repr=False)

    @classmethod
    def of(cls, url: str, key: str) -> _Address:
        """ValueError if the URL will not do."""
        parts = urlsplit(url)
        sound = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not sound:
            raise ValueError(f"not the address of a server: {url!r}; it looks like http://host:8000/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("the address must hold no user, key or query: a key belongs in api_key_env")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        lines = [
            f"POST {parts.path}/chat/completions HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept-Encoding: identity",
            *([f"Authorization: Bearer {key}"] if key else []),
            "Content-Length: ",
        ]
        return cls(
            parts.hostname, parts.port or (443 if tls else 80), tls, "\r\n".join(lines).encode("ascii")
        )


@dataclass(frozen=True)
class _Answer:
    """An HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _Connection:
    """One HTTP/1.1 connection, kept alive between calls; for one call at a time."""

    def __init__(self, address: _Address) -> None:
        self.address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0

    async def open(self, timeout_s: float) -> None:
        """Connect unless that is done. Raises _Unreachable, or EngineError for an invalid certificate."""
        if self._is_open():
            return
        self.close()
        to = self.address
        try:
            async with asyncio.timeout(timeout_s):
                self._streams = await asyncio.open_connection(to.host, to.port, ssl=to.tls, limit=HEAD_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise EngineError(f"{to.host}: its certificate is not valid ({error.verify_message})") from error
        except (OSError, UnicodeError) as error:
            raise _Unreachable(str(error) or f"no connection within {timeout_s:g} s") from error
        self._used = time.monotonic()

    def _is_open(self) -> bool:
        if self._streams is None or time.monotonic() - self._used > KEEP_ALIVE_S:
            return False
        reader, writer = self._streams
        return not reader.at_eof() and not writer.is_closing()

    async def post(self, body: bytes) -> _Answer:
        """The answer to a payload. OSError, EOFError or ValueError if there is none that can be read; the
        connection is closed then."""
        assert self._streams is not None
        reader, writer = self._streams
        try:
            writer.write(self.address.head + b"%d\r\n\r\n" % len(body) + body)
            answer = await _read_answer(reader)
        except BaseException:
            self.close()
            raise
        unsent = writer.transport.get_write_buffer_size()  # answered before it had heard all
        if unsent or answer.headers.get("connection", "").lower() == "close":
            self.close()
        self._used = time.monotonic()
        return answer

    def close(self) -> None:
        """At once."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def _read_answer(reader: asyncio.StreamReader) -> _Answer:
    """RFC 9112: a body ends by length, by chunks or with the connection."""
    status = 0
    while status < 200:  # 1xx: the answer proper is still to come
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        version, status = head[0][:9], int(head[0][9:12])
        if not version.startswith("HTTP/1."):
            raise ValueError(f"not HTTP/1.1: {head[0][:40]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if version == "HTTP/1.0 ":
        headers.setdefault("connection", "close")
    if status in (204, 304):
        body = b""
    elif headers.get("transfer-encoding", "").lower() == "chunked":
        body = await _read_chunks(reader)
    elif "content-length" in headers:
        body = await reader.readexactly(_bounded(int(headers["content-length"])))
    else:
        body = await _read_rest(reader)
    return _Answer(status, headers, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        _bounded(len(body) + size)
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError("a chunk does not end where it should")
    while await reader.readuntil(b"\r\n") != b"\r\n":  # trailers
        pass
    return bytes(body)


async def _read_rest(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while part := await reader.read(HEAD_BYTES):
        body += part
        _bounded(len(body))
    return bytes(body)


def _bounded(size: int) -> int:
    if not 0 <= size <= ANSWER_BYTES:
        raise ValueError(f"an answer of {size:,} bytes")
    return size


def payload(
    request: Request, model: str, pictures: Sequence[orjson.Fragment], settings: ClientSettings
) -> dict[str, Any]:
    """Body of a chat-completions call, for orjson. pictures: the parts of the prompt's images."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "model": model,
        "messages": chat(request.prompt, pictures),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "stream": False,
    }
    if sampling.repetition_penalty != 1:
        fields["repetition_penalty"] = sampling.repetition_penalty
    if sampling.temperature > 0 and settings.seeded:
        fields["seed"] = sampling.seed
    if request.schema is not None:
        form = {"name": "reply", "strict": True, "schema": dict(request.schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": form}
    return fields | dict(settings.extra)


def chat(prompt: Conversation, pictures: Sequence[orjson.Fragment]) -> list[dict[str, Any]]:
    """A prompt as chat messages, images first."""
    messages: list[dict[str, Any]] = []
    for user, assistant in prompt.turns:
        content = [*pictures, {"type": "text", "text": user}] if pictures and not messages else user
        messages.append({"role": "user", "content": content})
        if assistant:
            messages.append({"role": "assistant", "content": assistant})
    return messages


def completion(body: bytes) -> Completion:
    """The completion in an answer's body; ValueError says why there is none."""
    answer = orjson.loads(body)
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        usage = answer.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        counts = usage.get("completion_tokens"), usage.get("prompt_tokens"), details.get("cached_tokens")
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not isinstance(text, str) or not isinstance(reason, str):
        raise ValueError("no text or no finish_reason")
    if any(type(count) not in (int, type(None)) or (count or 0) < 0 for count in counts):
        raise ValueError("token counts are not numbers")
    tokens, prompt_tokens, cached = (count or 0 for count in counts)
    return Completion(text, tokens, reason == "stop", prompt_tokens, cached)


class _Pictures:
    """Images as JSON parts of a message, each read and encoded once; beyond kept_bytes the ones not used for
    longest are let go."""

    def __init__(self, images: ImageSource | str | Path, kept_bytes: int) -> None:
        self._images, self._kept_bytes = images, kept_bytes
        self._parts: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def held(self, names: Sequence[str]) -> list[orjson.Fragment] | None:
        """The parts of these images; None if one must be read first."""
        with self._lock:
            if not all(name in self._parts for name in names):
                return None
            for name in names:
                self._parts.move_to_end(name)
            return [orjson.Fragment(self._parts[name]) for name in names]

    def read(self, names: Sequence[str]) -> list[orjson.Fragment]:
        """The parts of these images. Raises ImageError. For one thread at a time."""
        return [orjson.Fragment(self._part(name)) for name in names]

    def _part(self, name: str) -> bytes:
        with self._lock:
            if name in self._parts:
                return self._parts[name]
        part = orjson.dumps({"type": "image_url", "image_url": {"url": self._data_url(name)}})
        with self._lock:
            self._parts[name] = part
            self._bytes += len(part)
            while self._bytes > self._kept_bytes:
                self._bytes -= len(self._parts.popitem(last=False)[1])
        return part

    def _data_url(self, name: str) -> str:
        if not callable(self._images):
            return data_url(read_image(self._images, name), name)
        try:
            return _png_url(self._images(name))
        except ImageError:
            raise
        except Exception as error:  # a source is anybody's function
            raise ImageError(UNREADABLE, f"{name!r} ({type(error).__name__}: {error})") from error


def data_url(data: bytes, name: str) -> str:
    """An image file as a data URL: its own bytes if anybody sees in them what open_image gives, else a PNG of
    that. Raises ImageError."""
    kind = _sendable(data)
    if kind is None:
        return _png_url(decode_image(data, name))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _sendable(data: bytes) -> str | None:
    """Subtype of an image that needs no conversion: 8 bits, no transparency, upright, a format of the web."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            plain = image.mode in ("RGB", "L", "P") and "transparency" not in image.info
            if plain and image.width * image.height <= MAX_PIXELS:
                upright = image.getexif().get(EXIF_ORIENTATION, 1) == 1
                return SENT_AS_THEY_ARE.get(str(image.format)) if upright else None
    except Exception:  # decode_image says what is wrong
        return None
    return None


def _png_url(image: Any) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _api_key(variable: str | None) -> str:
    """The key in an environment variable; "" if none is named. It is never shown."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EngineError(f"the environment variable {variable} is to hold the server's key, and is not set")
    if not key.isascii() or not key.isprintable():
        raise EngineError(f"the environment variable {variable} holds characters that no key has")
    return key


def retry_after_s(value: str) -> float:
    """Seconds of a Retry-After header, a number or a date (RFC 9110, 10.2.3); 0 if it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(
                UTC
            ).timestamp()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def _text(body: bytes) -> str:
    return body[:HEAD_BYTES].decode("utf-8", "replace")
