"""The engine for OpenAI-compatible servers, against a real server process that misbehaves on demand."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from benchmarks.mock_server import MockServer
from models.engines.base import Completion, EngineError, Failure, Reply, Request, Sampling, generate
from models.engines.http import retry_after_s
from models.engines.openai import ClientSettings, OpenAIEngine, completion
from models.engines.pictures import data_url
from models.images import open_image
from models.vlm import Conversation

QUICK = ClientSettings(attempts=3, backoff_s=0.01, timeout_s=10, connect_timeout_s=5, patience_s=20)
SCHEMA = {"type": "object", "properties": {"next_action": {"type": "string", "enum": ["continue"]}}}
ANSWER: dict[str, Any] = {
    "choices": [{"message": {"content": "seven"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}
BODY = json.dumps(ANSWER)


@pytest.fixture(scope="module")
def one_server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture
def server(one_server: MockServer) -> MockServer:
    """Without rules, its counts at zero."""
    one_server.set_rules()
    return one_server


def engine_of(server: MockServer, capacity: int = 16, images: Any = "data", **changed: Any) -> OpenAIEngine:
    return OpenAIEngine(server.url, "m", images, capacity, replace(QUICK, **changed))


def request(text: str, images: Sequence[str] = (), sampling: Sampling | None = None, **rest: Any) -> Request:
    return Request(text, Conversation(images, [(text, "")]), sampling or Sampling(), **rest)


def ask_all(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        try:
            return await asyncio.gather(*map(engine.ask, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


def texts(replies: Sequence[Reply]) -> list[str]:
    return [reply.text if isinstance(reply, Completion) else f"failed: {reply}" for reply in replies]


def test_every_request_gets_its_own_reply_whatever_comes_back_first(server: MockServer) -> None:
    server.set_rules(*({"do": "reply", "when": f"slow {n} ", "delay_s": 0.3 - 0.05 * n} for n in range(6)))
    asked = [f"slow {n} " if n < 6 else f"text {n}" for n in range(60)]
    assert texts(ask_all(engine_of(server, 8), [request(text) for text in asked])) == asked


def test_capacity_is_used_and_never_exceeded_over_connections_that_are_kept(server: MockServer) -> None:
    server.set_rules({"do": "hang", "times": 2, "when": "7"}, {"do": "reply", "delay_s": 0.01})
    engine = engine_of(server, 12, timeout_s=0.3)
    ask_all(engine, [request(f"text {n}") for n in range(240)])
    stats = server.stats()
    assert stats["most_in_flight"] == 12
    assert stats["calls"] == 242 == engine.counters.calls
    assert stats["connections"] <= 12 + 2 + 1  # one for each call that hung, one that asks for this
    assert engine.counters.answered == 240 and engine.counters.in_flight == 0


def test_what_waits_is_sent_in_the_order_it_was_asked(server: MockServer) -> None:
    ask_all(engine_of(server, 1), [request(f"text {n}") for n in range(30)])
    sent = [seen["body"]["messages"][0]["content"] for seen in server.requests()]
    assert sent == [f"text {n}" for n in range(30)]


def garbage(body: Any) -> dict[str, Any]:
    return {"do": "garbage", "body": body if isinstance(body, str) else json.dumps(body)}


def altered(**choice: Any) -> dict[str, Any]:
    return garbage({**ANSWER, "choices": [{**ANSWER["choices"][0], **choice}]})


NONSENSE = "not a chat completion"
PASSING: dict[str, tuple[dict[str, Any], str]] = {
    "408": ({"do": "status", "status": 408}, "HTTP 408"),
    "429": ({"do": "status", "status": 429}, "HTTP 429"),
    "500": ({"do": "status", "status": 500}, "HTTP 500"),
    "503": ({"do": "status", "status": 503, "retry_after": "0.02"}, "HTTP 503"),
    "dropped": ({"do": "drop"}, "connection error"),
    "dropped in the answer": ({"do": "cut"}, "connection error"),
    "not HTTP": ({"do": "raw", "body": "SSH-2.0-OpenSSH_9.6\r\n\r\n"}, "connection error"),
    "another HTTP": (
        {"do": "raw", "body": f"HTTP/2.0 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"},
        "connection error",
    ),
    "too long": (
        {"do": "raw", "body": "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "keep": True},
        "connection error",
    ),
    "hang": ({"do": "hang"}, "timeout"),
    "not JSON": (garbage("<html>Bad gateway</html>"), NONSENSE),
    "no object": (garbage([]), NONSENSE),
    "no choices": (garbage({**ANSWER, "choices": []}), NONSENSE),
    "content null": (altered(message={"content": None}), NONSENSE),
    "content a list": (altered(message={"content": ["seven"]}), NONSENSE),
    "no finish_reason": (altered(finish_reason=None), NONSENSE),
    "tokens a text": (garbage({**ANSWER, "usage": {"completion_tokens": "2"}}), NONSENSE),
    "usage a list": (garbage({**ANSWER, "usage": [2]}), NONSENSE),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_retries_and_no_request(fault: str, server: MockServer) -> None:
    rule, kind = PASSING[fault]
    server.set_rules({**rule, "times": 2})
    engine = engine_of(server, timeout_s=0.2 if fault == "hang" else 10)
    assert texts(ask_all(engine, [request("text")])) == ["text"]
    assert engine.counters.retries == {kind: 2} and not engine.counters.failures
    assert server.stats()["calls"] == 3


@pytest.mark.parametrize("fault", ["429", "500", "dropped", "hang", "not JSON"])
def test_a_fault_that_stays_is_given_up_after_the_attempts(fault: str, server: MockServer) -> None:
    rule, kind = PASSING[fault]
    server.set_rules(rule)
    engine = engine_of(server, timeout_s=0.1 if fault == "hang" else 10)
    (reply,) = ask_all(engine, [request("text")])
    assert isinstance(reply, Failure) and reply.reason == kind and reply.detail
    assert engine.counters.failures == {kind: 1}
    assert server.stats()["calls"] == QUICK.attempts


@pytest.mark.parametrize("status", [400, 404, 413, 422, 302])
def test_what_another_attempt_cannot_cure_is_not_sent_again(status: int, server: MockServer) -> None:
    server.set_rules({"do": "status", "status": status, "body": '{"message":\n"too long"}'})
    (reply,) = ask_all(engine_of(server), [request("text")])
    assert reply == Failure(f"HTTP {status}", '{"message": "too long"}')
    assert server.stats()["calls"] == 1


def test_one_poisoned_request_is_given_up_alone(server: MockServer) -> None:
    server.set_rules({"do": "status", "status": 500, "when": "poison"})
    asked = [f"text {n}" for n in range(50)]
    replies = ask_all(engine_of(server, 4), [request(text) for text in [*asked[:10], "poison", *asked[10:]]])
    assert isinstance(replies.pop(10), Failure)
    assert texts(replies) == asked


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_left_alone_by_all_for_as_long_as_it_asks(status: int, server: MockServer) -> None:
    server.set_rules({"do": "status", "status": status, "retry_after": "0.5", "times": 1})
    engine = engine_of(server)

    async def run() -> list[float]:
        began = time.monotonic()

        async def timed(text: str, after_s: float) -> float:
            await asyncio.sleep(after_s)
            assert isinstance(await engine.ask(request(text)), Completion)
            return time.monotonic() - began

        took = await asyncio.gather(timed("first", 0), timed("second", 0.2))
        await engine.close()
        return list(took)

    assert all(0.5 <= seconds < 3 for seconds in asyncio.run(run()))
    assert server.stats()["calls"] == 3


def test_retry_after_on_the_fault_of_one_request_holds_up_that_one_only(server: MockServer) -> None:
    server.set_rules({"do": "status", "status": 500, "retry_after": "0.6", "times": 1})
    engine = engine_of(server)

    async def run() -> tuple[float, float]:
        began = time.monotonic()
        first = asyncio.create_task(engine.ask(request("first")))
        await asyncio.sleep(0.1)
        await engine.ask(request("second"))
        second_s = time.monotonic() - began
        await first
        first_s = time.monotonic() - began
        await engine.close()
        return first_s, second_s

    first_s, second_s = asyncio.run(run())
    assert second_s < 0.6 <= first_s


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3), ("0.5", 0.5), ("", 0), ("soon", 0), ("-2", 0), ("inf", 0), ("nan", 0), ("1e999", 0)],
)
def test_retry_after_is_read_as_seconds(value: str, seconds: float) -> None:
    assert retry_after_s(value) == seconds


def test_retry_after_is_read_as_a_date() -> None:
    def header(seconds: int) -> str:
        return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)

    assert 58 < retry_after_s(header(60)) <= 60
    assert retry_after_s(header(-60)) == 0


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_everything_and_is_not_shown(
    status: int, server: MockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-secret")
    server.set_rules({"do": "status", "status": status, "body": "Incorrect API key: sk-secret"})
    engine = engine_of(server, 1, api_key_env="SERVER_KEY")

    async def run() -> Sequence[Any]:
        asked = map(engine.ask, map(request, "abcd"))
        replies = await asyncio.gather(*asked, return_exceptions=True)
        await engine.close()
        return replies

    errors = asyncio.run(run())
    assert all(isinstance(error, EngineError) for error in errors)
    assert "SERVER_KEY" in str(errors[0]) and "secret" not in "".join(map(str, errors))
    assert server.stats()["calls"] == 1


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: MockServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-secret\n")
    echo = {"do": "status", "body": "you sent sk-secret " + 200 * "x"}
    server.set_rules(
        {**echo, "status": 500, "times": 3}, {**echo, "status": 400, "body": 195 * "x" + "sk-secret"}
    )
    engine = engine_of(server, api_key_env="SERVER_KEY")
    with caplog.at_level(logging.DEBUG):
        replies = [*ask_all(engine, [request("a")]), *ask_all(engine, [request("b")])]
    assert [reply.reason for reply in replies if isinstance(reply, Failure)] == ["HTTP 500", "HTTP 400"]
    assert {seen["authorization"] for seen in server.requests()} == {"Bearer sk-secret"}
    assert "sk-s" not in f"{replies} {vars(engine)['_address']} {engine.settings}" + caplog.text


def test_a_key_that_is_not_there_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ClientSettings(api_key_env="SERVER_KEY")
    monkeypatch.delenv("SERVER_KEY", raising=False)
    with pytest.raises(EngineError, match="SERVER_KEY"):
        OpenAIEngine("http://127.0.0.1:1/v1", "m", settings=settings)
    monkeypatch.setenv("SERVER_KEY", "sk\r\nHost: elsewhere")
    with pytest.raises(EngineError, match="SERVER_KEY") as raised:
        OpenAIEngine("http://127.0.0.1:1/v1", "m", settings=settings)
    assert "elsewhere" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "ftp://host/v1", "http:///v1", "http://me:key@host/v1", "http://host/ v1"]
)
def test_an_address_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        OpenAIEngine(url, "m")


def test_a_server_killed_in_the_middle_and_started_again_costs_no_request() -> None:
    asked = [f"text {n}" for n in range(150)]
    with MockServer(delay_s=0.02) as server:
        engine = engine_of(server, 10)

        async def run() -> list[Reply]:
            tasks = [asyncio.create_task(engine.ask(request(text))) for text in asked]
            while engine.counters.answered < 40:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.start)
            replies = await asyncio.gather(*tasks)
            await engine.close()
            return replies

        assert texts(asyncio.run(run())) == asked
        assert 0 < engine.counters.retries["connection error"] <= 20
        assert server.stats()["most_in_flight"] <= 10


def test_waiting_for_a_server_that_does_not_listen_burns_no_attempt() -> None:
    with MockServer() as server:
        server.stop()
        threading.Timer(0.5, server.start).start()
        engine = engine_of(server, 16, attempts=1, backoff_s=0.02)
        assert texts(ask_all(engine, [request(f"text {n}") for n in range(64)])) == [
            f"text {n}" for n in range(64)
        ]
        assert engine.counters.calls == 64 and not engine.counters.retries


def test_patience_with_a_server_that_does_not_listen_ends(caplog: pytest.LogCaptureFixture) -> None:
    with MockServer() as server:
        server.stop()
        engine = engine_of(server, 2, patience_s=0.3)

        async def run() -> Sequence[Any]:
            replies = await asyncio.gather(*map(engine.ask, map(request, "abcde")), return_exceptions=True)
            await engine.close()
            return replies

        began = time.monotonic()
        errors = asyncio.run(run())
        assert 0.3 <= time.monotonic() - began < 3
        assert all(isinstance(error, EngineError) and server.url in str(error) for error in errors)
        assert caplog.text.count("cannot be reached") == 1
        server.start()
        assert texts(ask_all(engine, [request("again")])) == ["again"]


def test_closing_in_the_middle_leaves_nothing_behind(
    server: MockServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.set_rules({"do": "hang", "when": "hang"}, {"do": "drop", "when": "drop"})
    engine = engine_of(server, 18, lambda name: Image.new("RGB", (8, 8)), backoff_s=30)
    asked = [request(f"{do} {n}", ["image"]) for do in ("fine", "hang", "drop") for n in range(6)]

    async def run() -> Sequence[Any]:
        asyncio.get_running_loop().slow_callback_duration = 60  # debug mode is to tell of leaks alone
        tasks = [asyncio.create_task(engine.ask(one)) for one in asked]
        while engine.counters.answered < 6 or engine.counters.retries["connection error"] < 6:
            await asyncio.sleep(0.01)
        assert len(sockets()) >= 12 and threads()
        await engine.close()
        assert not sockets() and not threads()
        await engine.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    def sockets() -> list[Any]:
        mine = psutil.Process().net_connections()
        return [one for one in mine if one.raddr and one.raddr.port == server.port]

    def threads() -> list[Any]:
        return [one for one in threading.enumerate() if one.name.startswith("images")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replies = asyncio.run(run(), debug=True)
        gc.collect()
    assert texts(replies[:6]) == [f"fine {n}" for n in range(6)]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[6:])
    assert not caplog.records, caplog.text
    stats = server.stats()
    assert stats["lost"] == 6 and stats["in_flight"] == 0 and stats["open"] == 1
    assert engine.counters.in_flight == 0
    assert texts(ask_all(engine, [request("again")])) == ["again"]


def test_an_answer_that_comes_too_late_is_nobodys(server: MockServer) -> None:
    server.set_rules({"do": "reply", "when": "slow", "delay_s": 0.3})
    engine = engine_of(server, 1, timeout_s=0.15, attempts=1)

    async def run() -> list[Reply]:
        slow = await engine.ask(request("slow"))
        await asyncio.sleep(0.3)
        replies = [slow, await engine.ask(request("next"))]
        await engine.close()
        return replies

    slow, following = asyncio.run(run())
    assert isinstance(slow, Failure) and texts([following]) == ["next"]


def test_a_request_cancelled_by_its_caller_makes_room_for_the_next(server: MockServer) -> None:
    server.set_rules({"do": "hang", "when": "hang"})
    engine = engine_of(server, 1)

    async def run() -> Reply:
        hanging = asyncio.create_task(engine.ask(request("hang")))
        waiting = asyncio.create_task(engine.ask(request("text")))
        while not engine.counters.in_flight:
            await asyncio.sleep(0.01)
        hanging.cancel()
        reply = await waiting
        await engine.close()
        return reply

    assert texts([asyncio.run(run())]) == ["text"]
    assert server.stats()["lost"] == 1


def test_it_works_from_one_event_loop_after_another(server: MockServer) -> None:
    engine = engine_of(server)
    for _ in range(2):
        prompts = [Conversation((), [(f"text {n}", "")]) for n in range(20)]
        assert [reply.text for reply in generate(engine, prompts, Sampling())] == [
            f"text {n}" for n in range(20)
        ]


def test_moving_to_another_event_loop_without_closing_is_an_error(server: MockServer) -> None:
    engine, first = engine_of(server), asyncio.new_event_loop()
    first.run_until_complete(engine.ask(request("text")))
    with pytest.raises(RuntimeError, match="close"):
        asyncio.run(engine.ask(request("text")))
    first.run_until_complete(engine.close())
    first.close()


def test_an_idle_connection_that_the_server_closed_is_replaced(server: MockServer) -> None:
    raw = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}"
    server.set_rules({"do": "raw", "body": raw})
    engine = engine_of(server)

    async def run() -> None:
        for _ in range(3):
            assert texts([await engine.ask(request("text"))]) == ["seven"]
            await asyncio.sleep(0.05)
        await engine.close()

    asyncio.run(run())
    assert not engine.counters.retries and server.stats()["connections"] == 4


FRAMES = {
    "chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    f"a;why=not\r\n{BODY[:10]}\r\n{len(BODY) - 10:X}\r\n{BODY[10:]}\r\n0\r\nTrailer: 1\r\n\r\n",
    "ended by closing": f"HTTP/1.0 200 OK\r\n\r\n{BODY}",
    "after early hints": "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 \r\n"
    f"CONTENT-LENGTH:{len(BODY)}\r\nConnection: Close\r\n\r\n{BODY}",
}


@pytest.mark.parametrize("frame", FRAMES)
def test_answers_of_every_framing_are_read(frame: str, server: MockServer) -> None:
    server.set_rules({"do": "raw", "body": FRAMES[frame], "keep": frame == "chunked"})
    engine = engine_of(server, 1)
    assert ask_all(engine, [request("a"), request("b")]) == 2 * [Completion("seven", 2, True, 5, 4)]
    assert not engine.counters.retries


def test_token_counts_come_from_the_usage_and_add_up(server: MockServer) -> None:
    engine = engine_of(server)
    cut = request("one two three four", sampling=Sampling(max_new_tokens=3))
    replies = ask_all(engine, [request("one two three four"), cut])
    assert replies == [
        Completion("one two three four", 4, True, 4, 2),
        Completion("one two three four", 4, False, 4, 2),
    ]
    counters = engine.counters
    assert (counters.prompt_tokens, counters.cached_tokens, counters.output_tokens) == (8, 4, 8)
    assert completion(json.dumps({"choices": ANSWER["choices"]}).encode()) == Completion("seven", 0, True)


def sent(server: MockServer, asked: Request, images: Any = "data", **settings: Any) -> Mapping[str, Any]:
    ask_all(engine_of(server, images=images, **settings), [asked])
    return server.requests()[-1]["body"]


def test_the_payload_says_what_was_asked_and_no_more(server: MockServer) -> None:
    turns = [("How many?", "Three."), ("Sure? é \u2028 \U0001f600", "")]
    prompt = Conversation((), turns)
    assert sent(server, Request("k", prompt, Sampling(seed=5, max_new_tokens=9))) == {
        "model": "m",
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": turns[1][0]},
        ],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 9,
        "stream": False,
    }
    drawn = Sampling(0.7, 0.9, 1.05, 9, seed=2**63 - 1)
    body = sent(server, Request("k", prompt, drawn, SCHEMA), extra={"min_p": 0.1})
    assert {key: body[key] for key in ("temperature", "top_p", "repetition_penalty", "seed", "min_p")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "seed": 2**63 - 1,
        "min_p": 0.1,
    }
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert "seed" not in sent(server, Request("k", prompt, drawn), seeded=False)


def test_a_prompt_must_be_open() -> None:
    engine = OpenAIEngine("http://127.0.0.1:1/v1", "m")
    with pytest.raises(ValueError, match="open"):
        asyncio.run(engine.ask(Request("k", Conversation((), [("a", "b")]), Sampling())))


def test_images_come_first_and_files_are_sent_byte_for_byte(server: MockServer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    Image.new("L", (9, 7), 100).save(tmp_path / "b.jpg")
    content = sent(server, request("Which?", ["a.png", "b.jpg"]), tmp_path)["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == "Which?"
    for part, name, kind in zip(content, ("a.png", "b.jpg"), ("png", "jpeg"), strict=False):
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.effect_noise((8, 6), 50).convert("RGB").save(out, "JPEG", exif=exif)
    return out.getvalue()


def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


UNLIKE: dict[str, Callable[[], bytes]] = {
    "turned by EXIF": turned,
    "transparent": lambda: saved(Image.new("RGBA", (5, 4), (255, 0, 0, 100)), "PNG"),
    "16 bits": lambda: saved(Image.new("I;16", (5, 4), 30_000), "PNG"),
    "of a format that servers need not know": lambda: saved(Image.new("RGB", (5, 4), "blue"), "TIFF"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_file_that_a_server_could_read_otherwise_is_sent_as_the_picture_we_see(
    kind: str, tmp_path: Path
) -> None:
    data = UNLIKE[kind]()
    (tmp_path / "a").write_bytes(data)
    seen = open_image(tmp_path, "a")
    head, _, encoded = data_url(data, "a").partition(",")
    got = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert head == "data:image/png;base64"
    assert (got.mode, got.size, got.tobytes()) == ("RGB", seen.size, seen.tobytes())


def test_an_image_is_read_once_while_there_is_room(server: MockServer) -> None:
    opened: list[str] = []

    def source(name: str) -> Image.Image:
        opened.append(name)
        return Image.new("RGB", (8, 8), name)

    asked = [request(f"text {n}", [("red", "blue")[n % 2]]) for n in range(40)]
    ask_all(engine_of(server, 8, source), asked)
    assert sorted(opened) == ["blue", "red"]
    opened.clear()
    assert all(
        isinstance(reply, Completion)
        for reply in ask_all(engine_of(server, 1, source, image_bytes=10), asked)
    )
    assert len(opened) == 40


def test_an_image_that_cannot_be_used_fails_its_request_only(server: MockServer, tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    names = ["good.png", "bad.png", "none.png", "../good.png"]
    replies = ask_all(engine_of(server, 2, tmp_path), [request(name, [name]) for name in names])
    assert [getattr(reply, "reason", "fine") for reply in replies] == [
        "fine",
        "image unreadable",
        "image missing",
        "image outside the folder",
    ]
    (reply,) = ask_all(engine_of(server, 2, {"a": 1}.__getitem__), [request("b", ["b"])])
    assert isinstance(reply, Failure) and reply.reason == "image unreadable"
    assert server.stats()["calls"] == 1


def test_a_text_that_is_no_text_fails_its_request_only(server: MockServer) -> None:
    bad, good = ask_all(engine_of(server), [request("half \ud800"), request("whole")])
    assert isinstance(bad, Failure) and bad.reason == "prompt is not JSON"
    assert texts([good]) == ["whole"]
