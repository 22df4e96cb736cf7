"""Any OpenAI-compatible server as an engine: chat completions over kept-alive connections.

engine = OpenAIEngine("http://127.0.0.1:8000/v1", "artifacts/foundation/generator", images="data")
prompt = Conversation(["images/a.png"], [("What is the sum of the top row?", "")])
reply = await engine.ask(Request("q1/0", prompt, Sampling()))
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from models.engines.base import Completion, EngineError, Failure, Reply, Request, Scored
from models.engines.http import HEAD_BYTES, Address, Answer, Connection, Unreachable, retry_after_s
from models.engines.pictures import Pictures
from models.engines.session import Session
from models.engines.suspects import KILLED, RESTARTS, Suspects, prompt_of
from models.images import ImageError, ImageSource
from models.vlm import Conversation

PROBE_S = 5.0
"""Longest pause between two attempts to reach a server that does not listen."""
DETAIL_CHARS = 200
AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another attempt may cure."""
BUSY = frozenset({429, 503})
"""Statuses whose Retry-After speaks of the server, not of one request (RFC 9110, 10.2.3; RFC 6585, 4)."""

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

    revive: called in a thread while the server does not listen; starts one of our own that has died again and
    returns True, or, called with True, raises the EngineError that says how it died.

    A call that fails is tried again; a request that stays without a reply ends as a Failure of the last kind.
    When the server is gone, what was under way is asked little by little, until it is known what kills it.
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
        revive: Callable[[bool], bool] | None = None,
    ) -> None:
        self.url, self.model, self.capacity, self.settings = url.rstrip("/"), model, capacity, settings
        self._revive = revive
        self.counters = Counters()
        self._key = _api_key(settings.api_key_env)
        self._address = Address.of(self.url, "/chat/completions", self._key)
        self._pictures = Pictures(images, settings.image_bytes)
        self._random = random.Random()
        self._numbers = itertools.count()
        self._suspects = Suspects()
        self._session: _Session | None = None

    async def ask(self, request: Request) -> Reply:
        """Engine.ask. Raises EngineError if the server refuses the key, cannot be trusted (TLS), has not
        listened for patience_s or dies whatever it is asked; every later request then fails likewise until
        `close`."""
        if self._session is None:
            self._session = _Session(self.capacity)
        session = self._session
        reply = await session.answer(request, lambda: self._reply(session, request))
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
        connection = session.idle.pop() if session.idle else Connection(self._address)
        number, answered = next(self._numbers), False
        try:
            reply = await self._attempts(session, connection, number, prompt_of(request), body)
            answered = isinstance(reply, Completion)
            return reply
        finally:
            session.idle.append(connection)
            session.sent.pop(number, None)
            if self._suspects.left(number, answered):
                session.wake()

    async def _body(self, session: _Session, request: Request) -> bytes:
        """The payload. Images are read in a thread, one after the other, unless they are held already."""
        names = tuple(request.prompt.images)
        parts = self._pictures.held(names)
        if parts is None:
            loop = asyncio.get_running_loop()
            parts = await loop.run_in_executor(session.reader, self._pictures.read, names)
        return orjson.dumps(payload(request, self.model, parts, self.settings))

    async def _attempts(
        self, session: _Session, connection: Connection, number: int, prompt: Hashable, body: bytes
    ) -> Reply:
        failed = 0
        while True:
            await session.clear_to_send(
                lambda: self._suspects.may_ask(number) or self._suspects.is_deadly(prompt)
            )
            if self._suspects.is_deadly(prompt):
                return KILLED
            if number not in session.sent:  # what another server did is not counted
                failed = 0
            try:
                await connection.open(self.settings.connect_timeout_s)
                session.sent[number] = prompt
                return await self._call(connection, body)
            except Unreachable as error:
                await self._outlast(session, connection, error)
            except EngineError as error:
                session.end_with(error)
                raise
            except _Fault as fault:
                failed += 1
                if not fault.again or failed >= self.settings.attempts:
                    return Failure(fault.kind, self._shown(fault.detail))
                self.counters.retries[fault.kind] += 1
                await self._back_off(session, fault, failed)

    async def _call(self, connection: Connection, body: bytes) -> Completion:
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

    def _read(self, answer: Answer) -> Completion:
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

    async def _outlast(self, session: _Session, connection: Connection, error: Unreachable) -> None:
        """Wait until the server listens again. One request tries to reach it, the others wait for that."""
        if not session.reachable.is_set():
            return
        session.reachable.clear()
        self._suspects.died(session.sent)
        session.sent.clear()
        try:
            if self._revive is None and (deaths := self._suspects.fruitless) > RESTARTS:
                raise EngineError(
                    f"{self.url} has gone {deaths} times in a row without an answer to what it was asked: "
                    "its log says why"
                )
            await self._reach(connection, error)
        except EngineError as hopeless:
            session.end_with(hopeless)
            raise
        finally:
            session.reachable.set()
            session.wake()

    async def _reach(self, connection: Connection, error: Unreachable) -> None:
        """Open the connection as soon as the server listens. Raises EngineError if it does not."""
        patience_s = self.settings.patience_s
        LOG.warning("%s cannot be reached (%s): waiting up to %g s", self.url, error, patience_s)
        began, pause = time.monotonic(), self.settings.backoff_s
        while time.monotonic() - began < patience_s:
            await asyncio.sleep(min(pause, patience_s) * self._random.uniform(0.5, 1))
            pause = min(2 * pause, PROBE_S)
            started = False
            try:
                if self._revive is not None:
                    started = await asyncio.to_thread(self._revive, self._suspects.hopeless)
                await connection.open(self.settings.connect_timeout_s)
            except Unreachable as still:
                error = still
                if started:
                    self._suspects.died({})
            else:
                LOG.warning("%s is back after %.0f s", self.url, time.monotonic() - began)
                return
        raise EngineError(
            f"{self.url} could not be reached for {patience_s:g} s ({error}): start the server, or "
            "correct its address"
        )

    def _shown(self, text: str) -> str:
        """One line without the key."""
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden.split())[:DETAIL_CHARS]


class _Session(Session):
    """With the connections, and what requests under way wait for.

    reachable: unset while nothing listens. sent: the prompts of what the server that listens has been asked
    and has not answered. turn: set, and replaced, when others may be asked. quiet_until: nothing is sent
    before that time.monotonic(). dead: why the engine cannot answer any more.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.idle: list[Connection] = []
        self.reader = ThreadPoolExecutor(1, "images")
        self.reachable = asyncio.Event()
        self.reachable.set()
        self.sent: dict[int, Hashable] = {}
        self.turn = asyncio.Event()
        self.quiet_until = 0.0
        self.dead: EngineError | None = None

    async def clear_to_send(self, may_ask: Callable[[], bool]) -> None:
        """Wait until the server listens, is not to be left alone, and may be asked this."""
        while True:
            await self.reachable.wait()
            if self.dead is not None:
                raise EngineError(str(self.dead))
            quiet_s = self.quiet_until - time.monotonic()
            if quiet_s > 0:
                await asyncio.sleep(quiet_s)
            elif may_ask():
                return
            else:
                await self.turn.wait()

    def wake(self) -> None:
        """Those who wait for their turn look again."""
        self.turn.set()
        self.turn = asyncio.Event()

    def end_with(self, error: EngineError) -> None:
        """Nobody is answered any more."""
        self.dead = error
        self.wake()

    async def end(self) -> None:
        """Returns when no request is under way, no thread runs and no socket is open."""
        await super().end()
        for connection in self.idle:
            connection.close()
        self.reader.shutdown(cancel_futures=True)
        await asyncio.sleep(0)  # a transport closes its socket one turn after it was told to


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
    if request.log_probs:
        fields["prompt_logprobs"] = 0  # of the prompt's own tokens alone
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
    finished = reason == "stop"
    if answer.get("prompt_logprobs"):
        return Scored(text, tokens, finished, prompt_tokens, cached, _log_probs(answer["prompt_logprobs"]))
    return Completion(text, tokens, finished, prompt_tokens, cached)


def _log_probs(positions: Sequence[Mapping[str, Any] | None]) -> list[tuple[int, float]]:
    """vLLM's form: at each position {token id: {"logprob": ...}}, at the first one null."""
    try:
        return [
            (int(token), float(said["logprob"]))
            for position in positions
            if position
            for token, said in position.items()
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"log-probs of the prompt: {type(error).__name__}: {error}") from None


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


def _text(body: bytes) -> str:
    return body[:HEAD_BYTES].decode("utf-8", "replace")
