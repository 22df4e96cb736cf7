"""A chat-completions server without a model: answers after a delay, counts its calls, misbehaves on demand.

    python -m benchmarks.mock_server --port 8000 --delay-s 0.05

The answer is the last user text; with a json_schema, the smallest value that fits it. A rule of `--rules`, or
of a later `PUT /rules`, says how some calls are treated instead; the first that fits a call is taken:

    [{"do": "status", "status": 503, "retry_after": "1", "times": 2}, {"do": "hang", "share": 0.001},
     {"do": "status", "status": 500, "when": "poison"}]

do: status | drop (close at once) | cut (close in the middle of the answer) | garbage (200 with `body`) |
hang | raw (`body` is the whole answer; keep: leave the connection open) | reply (`body` as text).
delay_s: for these calls. times: how often, always if left out. when: text that the request's body must hold.
share: of the calls that fit.
`GET /stats`, `GET /requests` (the last ones), `GET /health`, `GET /v1/models`. One process, one thread,
HTTP/1.1 with Content-Length only: 0.1 ms a call, so that it is not what a benchmark of clients measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from benchmarks.results import ROOT

KEPT_REQUESTS = 32
IMAGE_TOKENS = 64
BACKLOG = 4096
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    429: "Too Many Requests",
    503: "Service Unavailable",
}


class Service:
    """What all connections share: the rules, the counts, the last requests."""

    def __init__(self, delay_s: float = 0.0, rules: Sequence[Mapping[str, Any]] = (), seed: int = 0) -> None:
        self.delay_s = delay_s
        self.random = random.Random(seed)
        self.stats = dict.fromkeys(("calls", "in_flight", "most_in_flight", "connections", "open", "lost"), 0)
        self.requests: deque[tuple[str, bytes]] = deque(maxlen=KEPT_REQUESTS)
        self.set_rules(rules)

    def set_rules(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """The counts begin anew."""
        self.rules = [dict(rule) for rule in rules]
        self.stats |= {"calls": 0, "most_in_flight": self.stats["in_flight"], "connections": 0, "lost": 0}
        self.requests.clear()

    def rule(self, body: bytes) -> Mapping[str, Any]:
        """What to do with a call; uses up one of the rule's times."""
        for rule in self.rules:
            fits = rule.get("times", 1) > 0 and rule.get("when", "").encode() in body
            if fits and ("share" not in rule or self.random.random() < rule["share"]):
                if "times" in rule:
                    rule["times"] -= 1
                return rule
        return {"do": "reply"}


class Connection(asyncio.Protocol):
    """One client; requests on it are answered one after the other."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.buffer = bytearray()
        self.open_calls = 0
        self.last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.service.stats["connections"] += 1
        self.service.stats["open"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.service.stats["open"] -= 1
        self.service.stats["lost"] += self.open_calls
        self._ended(self.open_calls)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in head[1:])}
            length = end + 4 + int(headers.get("content-length", 0))
            if len(self.buffer) < length:
                return
            body = bytes(self.buffer[end + 4 : length])
            del self.buffer[:length]
            method, path, _ = head[0].split(" ", 2)
            self.last = headers.get("connection", "").lower() == "close"
            if path.endswith("/chat/completions") and method == "POST":
                self._call(headers.get("authorization", ""), body)
            else:
                self._control(method, path, body)

    def _control(self, method: str, path: str, body: bytes) -> None:
        if (method, path) == ("PUT", "/rules"):
            self.service.set_rules(json.loads(body))
            self._send(200, b"{}")
        elif path == "/stats":
            self._send(200, orjson.dumps(self.service.stats))
        elif path == "/requests":
            seen = [{"authorization": key, "body": json.loads(body)} for key, body in self.service.requests]
            self._send(200, orjson.dumps(seen))
        elif path == "/v1/models":
            self._send(200, b'{"object":"list","data":[{"id":"mock","object":"model"}]}')
        else:
            self._send(200 if path == "/health" else 404, b"{}")

    def _call(self, authorization: str, body: bytes) -> None:
        stats = self.service.stats
        stats["calls"] += 1
        stats["in_flight"] += 1
        stats["most_in_flight"] = max(stats["most_in_flight"], stats["in_flight"])
        self.open_calls += 1
        self.service.requests.append((authorization, body))
        rule = self.service.rule(body)
        if rule["do"] != "hang":
            delay = rule.get("delay_s", self.service.delay_s)
            asyncio.get_running_loop().call_later(delay, self._answer, rule, body)

    def _answer(self, rule: Mapping[str, Any], body: bytes) -> None:
        if self.transport.is_closing():
            return
        self._ended(1)
        do = rule["do"]
        if do == "drop":
            self.transport.abort()
        elif do == "raw":
            self.transport.write(rule["body"].encode())
            if not rule.get("keep"):
                self.transport.close()
        elif do == "status":
            extra = f"Retry-After: {rule['retry_after']}\r\n" if "retry_after" in rule else ""
            text = rule.get("body", '{"error":{"message":"as told"}}')
            self._send(rule["status"], text.encode(), extra)
        elif do == "garbage":
            self._send(200, rule.get("body", "<html>").encode())
        elif not (request := orjson.loads(body))["messages"]:
            self._send(400, b'{"error":{"message":"messages: at least one"}}')
        else:
            self._send(200, completion(request, rule.get("body")), cut=do == "cut")

    def _ended(self, calls: int) -> None:
        self.open_calls -= calls
        self.service.stats["in_flight"] -= calls

    def _send(self, status: int, body: bytes, extra: str = "", cut: bool = False) -> None:
        head = (
            f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\nContent-Type: application/json\r\n"
            f"{extra}Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + (body[: len(body) // 2] if cut else body))
        if cut or self.last:
            self.transport.close()


def completion(request: Mapping[str, Any], text: str | None = None) -> bytes:
    """The body of an answer as vLLM gives it; a word counts as a token, an image as IMAGE_TOKENS."""
    messages = request["messages"]
    if text is None:
        form = request.get("response_format")
        text = json.dumps(smallest(form["json_schema"]["schema"])) if form else user_text(messages[-1])
    prompt, words = sum(map(prompt_tokens, messages)), len(text.split())
    return orjson.dumps(
        {
            "id": "chatcmpl-mock",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if words < request["max_tokens"] else "length",
                }
            ],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": words,
                "total_tokens": prompt + words,
                "prompt_tokens_details": {"cached_tokens": prompt // 2},
            },
        }
    )


def user_text(message: Mapping[str, Any]) -> str:
    """The text of a chat message, its images left out."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def prompt_tokens(message: Mapping[str, Any]) -> int:
    """Of one message."""
    parts = message["content"] if isinstance(message["content"], list) else []
    images = sum(part["type"] == "image_url" for part in parts)
    return len(user_text(message).split()) + IMAGE_TOKENS * images


def smallest(schema: Mapping[str, Any]) -> Any:
    """A value that follows a JSON schema of objects, strings, enums and numbers."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {name: smallest(part) for name, part in schema.get("properties", {}).items()}
    if schema.get("type") == "array":
        return [smallest(schema["items"])] * schema.get("minItems", 0)
    least = schema.get("minimum", 0)
    return {"integer": least, "number": least, "boolean": False}.get(schema.get("type", ""), "text")


class MockServer:
    """The server as a process of its own, for as long as the `with` block. It keeps its port over stop and
    start; its counts begin anew."""

    def __init__(self, delay_s: float = 0.0, rules: Sequence[Mapping[str, Any]] = ()) -> None:
        self.delay_s, self.rules, self.port = delay_s, list(rules), 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> MockServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it listens."""
        options = {"--port": self.port, "--delay-s": self.delay_s, "--rules": json.dumps(self.rules)}
        command = [sys.executable, "-m", "benchmarks.mock_server"]
        command += [str(word) for pair in options.items() for word in pair]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        """At once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def set_rules(self, *rules: Mapping[str, Any]) -> None:
        """From the next call on, in place of those before; the counts begin anew."""
        self.rules = list(rules)
        self._ask("/rules", json.dumps(self.rules).encode())

    def stats(self) -> dict[str, int]:
        """calls, in_flight, most_in_flight; connections ever and open; calls lost (the client went away)."""
        return self._ask("/stats")

    def requests(self) -> list[dict[str, Any]]:
        """The last calls: {"authorization": header, "body": payload}."""
        return self._ask("/requests")

    def _ask(self, path: str, data: bytes | None = None) -> Any:
        method = "GET" if data is None else "PUT"
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=10) as response:
            return json.load(response)


async def serve(service: Service, port: int) -> None:
    """Until SIGTERM or SIGINT. The port is the first line on stdout."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(service), "127.0.0.1", port, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--delay-s", type=float, default=0.05)
    parser.add_argument("--rules", type=json.loads, default=[])
    parser.add_argument("--seed", type=int, default=0, help="of the rules with a share")
    args = parser.parse_args()
    asyncio.run(serve(Service(args.delay_s, args.rules, args.seed), args.port))


if __name__ == "__main__":
    main()
