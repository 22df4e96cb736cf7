"""vLLM's engine in a process of its own: requests on stdin, replies on stdout, one line of JSON each.

    PYTHON models/engines/vllm_worker.py --model artifacts/foundation/generator --max-model-len 4096

models/engines/vllm.py is the other end. This one runs in the environment that has vLLM 0.32, whose pins are
not ours: it imports vLLM and the standard library. Arguments are those of vLLM's engine. It is told

    {"image": "a.png", "part": {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}}
    {"id": 1, "messages": [...], "images": ["a.png"], "sampling": {"max_tokens": 64, ...}, "schema": {...}}
    {"forget": "a.png"}    {"cancel": 1}

(the images stand before the first message's text; with `--adapter NAME=FOLDER` a LoRA adapter answers), and
it says

    {"ready": "0.32.0"}
    {"id": 1, "text": "...", "finished": true, "tokens": 9, "prompt_tokens": 200, "cached_tokens": 192}
    {"id": 1, "failed": "bad request", "detail": "..."}
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]  # it holds vllm.py and http.py

import asyncio  # noqa: E402
import base64  # noqa: E402
import contextlib  # noqa: E402
import hashlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402
from collections import OrderedDict  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from typing import Any, BinaryIO  # noqa: E402

DEFAULTS = ("--disable-log-stats",)
"""Before the arguments, which may say otherwise."""
LINE_BYTES = 2**30
DECODED_BYTES = 2**30
"""Of decoded images that are kept; what vLLM makes of them it keeps itself (--mm-processor-cache-gb)."""
BAD_REQUEST, ENGINE_ERROR = "bad request", "engine error"
"""Asked again, the first will fail again; the second may not."""
File = tuple[str, bytes]
"""Hash and bytes of an image file."""


def main() -> None:
    requests, replies = take_the_pipes()
    import uvloop

    uvloop.run(serve(sys.argv[1:], requests, replies))


def take_the_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Our stdin and stdout, for requests and replies alone: what is printed from here on goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


async def serve(arguments: list[str], requests: BinaryIO, replies: BinaryIO) -> None:
    """Until nobody asks any more."""
    worker = Worker(*open_engine(arguments), replies)
    import vllm

    lines = asyncio.StreamReader(limit=LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), requests)
    worker.say(ready=vllm.__version__)
    while line := await lines.readline():
        worker.take(json.loads(line))
    worker.engine.shutdown()


def open_engine(arguments: list[str]) -> tuple[Any, Any]:
    """vLLM's asynchronous engine, and the LoRARequest of the adapter if there is one; exits with vLLM's
    message for an argument that it does not know."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vLLM's engine"))
    parser.add_argument("--adapter")
    parsed = parser.parse_args([*DEFAULTS, *arguments])
    name, _, folder = (parsed.adapter or "").partition("=")
    adapter = LoRARequest(name, 1, folder) if name else None
    return AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parsed)), adapter


class Refused(Exception):
    """A request that never reached the engine; its cause says why."""


class Worker:
    """Takes one line after another; every request is a task of its own."""

    def __init__(self, engine: Any, adapter: Any, replies: BinaryIO) -> None:
        self.engine, self.adapter, self.replies, self.images = engine, adapter, replies, Images()
        self._chat = chat_parameters(engine)
        self._under_way: dict[int, asyncio.Task[None]] = {}

    def say(self, **fields: Any) -> None:
        """One line."""
        self.replies.write(json.dumps(fields).encode() + b"\n")
        self.replies.flush()

    def take(self, line: dict[str, Any]) -> None:
        """What we were told."""
        if "image" in line:
            self.images.keep(line["image"], line["part"]["image_url"]["url"])
        elif "forget" in line:
            self.images.forget(line["forget"])
        elif "cancel" in line:
            if task := self._under_way.pop(line["cancel"], None):
                task.cancel()
        else:
            files = [self.images.file(name) for name in line["images"]]
            self._under_way[line["id"]] = asyncio.create_task(self._answer(line, files))

    async def _answer(self, line: dict[str, Any], files: list[File]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            reply = await self._generate(line, files)
        except EngineDeadError:
            traceback.print_exc()
            os._exit(1)  # whoever asked starts another of us
        except Exception as error:
            reply = failure(error)
        self._under_way.pop(line["id"], None)
        self.say(id=line["id"], **reply)

    async def _generate(self, line: dict[str, Any], files: list[File]) -> dict[str, Any]:
        messages = line["messages"]
        try:
            if files:
                text = {"type": "text", "text": messages[0]["content"]}
                messages[0]["content"] = [*await self.images.parts(files), text]
            _, (prompt,) = await self.engine.renderer.render_chat_async([messages], *self._chat)
            parameters = sampling_parameters(line["sampling"], line["schema"])
        except Exception as error:
            raise Refused from error
        given = {"lora_request": self.adapter} if self.adapter else {}
        async for output in self.engine.generate(prompt, parameters, str(line["id"]), **given):
            last = output
        return completion(last)


def chat_parameters(engine: Any) -> tuple[Any, Any]:
    """How messages become tokens, as vllm.LLM.chat has it."""
    from vllm.renderers.params import ChatParams
    from vllm.utils.mistral import is_mistral_tokenizer

    renderer = engine.renderer
    tokenize = is_mistral_tokenizer(renderer.tokenizer) or engine.model_config.enable_prompt_embeds
    template = {"add_generation_prompt": True, "continue_final_message": False, "tokenize": tokenize}
    # the template writes the special tokens
    return ChatParams(chat_template_kwargs=template), renderer.default_chat_tok_params.with_kwargs(
        add_special_tokens=False
    )


def sampling_parameters(sampling: dict[str, Any], schema: dict[str, Any] | None) -> Any:
    """vLLM's; one output, when it is whole. Made for one request, so that vLLM need not copy it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    form = StructuredOutputsParams(json=schema) if schema is not None else None
    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**sampling, structured_outputs=form, output_kind=kind, skip_clone=True)


def completion(output: Any) -> dict[str, Any]:
    """What we say of vLLM's RequestOutput."""
    choice = output.outputs[0]
    if choice.finish_reason not in ("stop", "length"):
        return {"failed": ENGINE_ERROR, "detail": f"vLLM ended it: {choice.finish_reason}"}
    scored = {"prompt_log_probs": log_probs(output.prompt_logprobs)} if output.prompt_logprobs else {}
    return {
        **scored,
        "text": choice.text,
        "finished": choice.finish_reason == "stop",
        "tokens": len(choice.token_ids),
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "cached_tokens": output.num_cached_tokens or 0,
    }


def log_probs(positions: Any) -> list[tuple[int, float]]:
    """(token id, log-prob) of the prompt's tokens; vLLM has none for the first."""
    return [(token, said.logprob) for position in positions if position for token, said in position.items()]


def failure(error: Exception) -> dict[str, Any]:
    """What we say of a request that vLLM refused, or lost; errors of the one kind may wrap the other."""
    from vllm.exceptions import VLLMClientError

    never_sent, cause = isinstance(error, Refused), error.__cause__
    for each in (cause,) if never_sent else (error, cause):
        if never_sent or isinstance(each, (ValueError, VLLMClientError)):
            return {"failed": BAD_REQUEST, "detail": f"{type(each).__name__}: {each}"}
    traceback.print_exception(error)
    return {"failed": ENGINE_ERROR, "detail": f"{type(cause or error).__name__}: {cause or error}"}


class Images:
    """Image files as they were sent, by name, until they are to be forgotten; of the decoded images the last
    DECODED_BYTES are kept. vLLM knows an image by the hash of its file: it need not look at the pixels."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._decoded: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1, "images")

    def keep(self, name: str, url: str) -> None:
        """url: a data URL."""
        data = base64.b64decode(url.partition(",")[2])
        self._files[name] = hashlib.blake2b(data, digest_size=16).hexdigest(), data

    def file(self, name: str) -> File:
        """What was sent under the name."""
        return self._files[name]

    def forget(self, name: str) -> None:
        """Whoever has the file keeps it."""
        self._files.pop(name, None)

    async def parts(self, files: list[File]) -> list[dict[str, Any]]:
        """Images as vLLM takes them in a message; decoded in one thread, so that each is decoded once."""
        return [
            {"type": "image_pil", "image_pil": await self._image(uuid, data), "uuid": uuid}
            for uuid, data in files
        ]

    async def _image(self, uuid: str, data: bytes) -> Any:
        if (image := self._decoded.get(uuid)) is None:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._decode, uuid, data)
        with contextlib.suppress(KeyError):  # the thread may just have dropped it
            self._decoded.move_to_end(uuid)
        return image

    def _decode(self, uuid: str, data: bytes) -> Any:
        from PIL import Image

        if (image := self._decoded.get(uuid)) is None:  # nobody has asked for it meanwhile
            image = self._decoded[uuid] = Image.open(io.BytesIO(data)).convert("RGB")
            self._bytes += _bytes(image)
        while self._bytes > DECODED_BYTES and len(self._decoded) > 1:
            self._bytes -= _bytes(self._decoded.popitem(last=False)[1])
        return image


def _bytes(image: Any) -> int:
    return image.width * image.height * 3


if __name__ == "__main__":
    main()
