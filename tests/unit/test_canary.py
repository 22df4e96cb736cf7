"""The canary: an engine that ignores the schema or the image is found out before the stage begins."""

from __future__ import annotations

import asyncio
import json
import threading
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.engines import canary
from models.engines.base import Completion, EngineError, Failure, Reply, Request
from models.engines.openai import OpenAIEngine
from models.images import folder_images
from models.vlm import Conversation

PROMPT = Conversation(["images/a.png"], [("Which row has the largest sum?", "")])
OTHER = ["images/b.png"]


@dataclass
class Server:
    """An engine that behaves as told. image_tokens: what an image adds to the prompt; sees: its text depends
    on the image; flaky: and on chance."""

    constrains: bool = True
    sees: bool = True
    image_tokens: int = 64
    usage: bool = True
    takes_no_image: bool = True
    flaky: bool = False
    constrained_reply: Reply | None = None
    capacity: int = 4
    independent: bool = True
    asked: list[Request] = field(default_factory=list)

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        noise = f" {len(self.asked)}" if self.flaky else ""
        await asyncio.sleep(0)
        images = request.prompt.images
        if not images and not self.takes_no_image:
            return Failure("HTTP 400", "an image is missing")
        prompt_tokens = (20 + self.image_tokens * len(images)) if self.usage else 0
        if request.schema is not None and self.constrained_reply is not None:
            return self.constrained_reply
        if request.schema is not None and self.constrains:
            return Completion(self._constrained(request.schema), 12, True, prompt_tokens)
        seen = f"I see {images[0]}" if self.sees and images else "I see"
        return Completion(f"{request.prompt.turns[-1][0]} {seen}{noise}", 8, False, prompt_tokens)

    async def close(self) -> None: ...

    def _constrained(self, schema: Any) -> str:
        return json.dumps({name: value["enum"][0] for name, value in schema["properties"].items()}, indent=1)


def check(server: Server, prompt: Conversation = PROMPT, **options: Any) -> canary.Findings:
    return asyncio.run(canary.check(server, prompt, **{"other_images": OTHER, **options}))


def test_a_good_server_passes_without_a_warning() -> None:
    server = Server()
    assert check(server) == canary.Findings(True, 64, True, True)
    assert all(request.sampling.temperature == 0 for request in server.asked)
    assert len({request.key for request in server.asked}) == len(server.asked)
    texts = [user for request in server.asked for user, _ in request.prompt.turns]
    assert "kestrel" not in " ".join(texts)  # only the schema knows


def test_a_server_that_ignores_the_schema_is_refused_before_anything_else_is_asked() -> None:
    server = Server(constrains=False)
    with pytest.raises(EngineError, match=r"not constrained.*said 'Which row.*guided_json"):
        check(server)
    assert len(server.asked) == 1
    assert check(server, constrained=False).constrained is None


@pytest.mark.parametrize(
    "text",
    [
        'Sure! {"canary": "kestrel-4711"}',
        '{"canary": "kestrel-4712"}',
        '{"canary": "kestrel-4711", "more": 1}',
        '{"canary": "kest',
        "",
        "[" * 100_000,
    ],
)
def test_only_exactly_that_json_will_do(text: str) -> None:
    with pytest.raises(EngineError, match="not constrained"):
        check(Server(constrained_reply=Completion(text, 9, True)))
    check(Server(constrained_reply=Completion('\n{ "canary" :"kestrel-4711"}\n', 9, True)))


def test_tokens_spent_on_white_space_are_told_from_a_schema_that_is_ignored() -> None:
    for text in ("{ " + " \n" * 90, '{\n "canary": ' + "\n" * 90, ""):
        with pytest.raises(EngineError, match=r"is constrained.*disable_any_whitespace"):
            check(Server(constrained_reply=Completion(text, 96, False)))
    with pytest.raises(EngineError, match="not constrained"):
        check(Server(constrained_reply=Completion("{ I think that", 96, False)))


def test_a_refused_schema_shows_the_server_s_reason() -> None:
    with pytest.raises(EngineError, match=r"HTTP 400 \(no grammar backend\)"):
        check(Server(constrained_reply=Failure("HTTP 400", "no grammar backend")))


def test_a_dropped_image_is_found_by_the_tokens_it_does_not_take() -> None:
    with pytest.raises(EngineError, match=r"takes 0 tokens more.*same text.*chat template"):
        check(Server(sees=False, image_tokens=0))
    with pytest.raises(EngineError, match="takes 3 tokens more"):  # the word <image> in its place
        check(Server(sees=False, image_tokens=3))


def test_a_dropped_image_is_found_by_the_texts_where_tokens_are_not_told() -> None:
    for blind in (Server(sees=False, usage=False), Server(sees=False, takes_no_image=False)):
        with pytest.raises(EngineError, match=r"does not say how many tokens.*same text"):
            check(blind)
    for seeing in (Server(usage=False), Server(takes_no_image=False)):
        assert check(seeing) == canary.Findings(True, None, True, True)
    assert check(Server(image_tokens=0)).image_matters  # usage that counts the text alone


def test_texts_that_do_not_depend_on_the_image_are_a_warning_where_it_takes_its_tokens() -> None:
    found = check(Server(sees=False))
    assert (found.image_tokens, found.image_matters) == (64, False)
    assert len(found.warnings) == 1 and "64 tokens" in found.warnings[0] and "not proved" in found.warnings[0]


def test_without_another_image_only_the_tokens_are_evidence() -> None:
    found = check(Server(), other_images=[])
    assert found.image_matters is None and "could not be compared" in found.warnings[0]
    with pytest.raises(EngineError, match="nothing shows"):
        check(Server(usage=False), other_images=[])


def test_texts_that_change_by_chance_do_not_pass_for_seeing() -> None:
    found = check(Server(sees=False, flaky=True))
    assert not found.repeatable and found.image_matters is None
    assert len(found.warnings) == 2 and "two texts" in found.warnings[0]
    with pytest.raises(EngineError, match="could not be compared"):
        check(Server(sees=False, flaky=True, image_tokens=0))


def test_a_question_that_any_picture_answers_alike_is_made_up_for_by_a_description() -> None:
    class YesMan(Server):
        async def ask(self, request: Request) -> Reply:
            reply = await super().ask(request)
            described = request.prompt.turns[-1][0] == canary.DESCRIBE
            return reply if described or request.schema else Completion("yes", 1, True, reply.prompt_tokens)

    assert check(YesMan()).image_matters


def test_a_prompt_that_the_server_refuses_ends_the_stage() -> None:
    class Refusing(Server):
        async def ask(self, request: Request) -> Reply:
            return await super().ask(request) if request.schema else Failure("timeout", "after 60 s")

    with pytest.raises(
        EngineError, match=r"gave up on the first prompt of the stage: timeout \(after 60 s\)"
    ):
        check(Refusing())


def test_a_prompt_without_an_image_is_not_asked_about_one() -> None:
    server = Server(image_tokens=0)
    assert check(server, Conversation([], PROMPT.turns)) == canary.Findings(True, None, None, True)
    assert not any(request.prompt.images for request in server.asked)


class Handler(BaseHTTPRequestHandler):
    """vLLM's chat completions in small. `ignores`: "schema" or "image", silently."""

    protocol_version = "HTTP/1.1"
    ignores = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        content = body["messages"][0]["content"]
        parts = content if isinstance(content, list) else []
        pictures = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        seen = [] if self.ignores == "image" else pictures
        text = f"It shows {zlib.crc32(''.join(seen).encode())}."
        if schema and self.ignores != "schema":
            text = json.dumps({name: value["enum"][0] for name, value in schema["properties"].items()})
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 20 + 64 * len(seen), "completion_tokens": 9}
        answer = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None: ...


def check_served(ignores: str, folder: Path) -> canary.Findings:
    """The canary through HTTP, with noise made on the spot as the other image."""
    Image.new("RGB", (32, 32), "white").save(folder / "a.png")
    handler = type("Handler", (Handler,), {"ignores": ignores})

    async def run(url: str) -> canary.Findings:
        engine = OpenAIEngine(url, "model", canary.with_noise(folder_images(folder)))
        try:
            prompt = Conversation(["a.png"], PROMPT.turns)
            return await canary.check(engine, prompt, canary.noise_names(prompt.images))
        finally:
            await engine.close()

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            return asyncio.run(run(f"http://127.0.0.1:{server.server_port}/v1"))
        finally:
            server.shutdown()


def test_a_server_is_found_out_through_http(tmp_path: Path) -> None:
    assert check_served("", tmp_path) == canary.Findings(True, 64, True, True)
    with pytest.raises(EngineError, match=r"not constrained.*said 'It shows \d+"):
        check_served("schema", tmp_path)
    with pytest.raises(EngineError, match="takes 0 tokens more"):
        check_served("image", tmp_path)


def test_noise_has_the_size_of_the_image_and_is_always_the_same() -> None:
    images = {"images/a.png": Image.new("RGB", (48, 40), "white")}
    source = canary.with_noise(images.__getitem__)
    assert source("images/a.png") is images["images/a.png"]
    (name,) = canary.noise_names(["images/a.png"])
    noise = source(name)
    assert noise.size == (48, 40) and noise.mode == "RGB"
    assert len(set(noise.resize((8, 8)).tobytes())) > 64
    assert noise.tobytes() == source(name).tobytes()
