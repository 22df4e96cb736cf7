"""Before a stage samples for hours: does the engine constrain its decoding, and does it see the image?

    findings = await check(engine, prompt, other_images=["images/another.png"])

Servers fail silently here: vLLM answers 200 to the `guided_json` it no longer knows, gateways drop images.
What an engine that returns text and usage only can prove:

- Decoding is constrained: a schema that allows one unlikely literal, not found in the prompt, gives it.
- The image is seen: a text with the one image differs from that with another, each asked twice to rule out
  chance.
- Failing that, the prompt takes more tokens with the image than without: it has its place in the prompt, and
  no more than that is proved. Equal texts prove nothing (a poor model says the same to any picture), so they
  are an error only where the tokens do not speak for the image either; else a warning.

Ask the engine itself: a journal in between would replay the answers of an earlier run.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.engines.base import Completion, Engine, EngineError, Failure, Reply, Request, Sampling
from models.images import ImageSource
from models.vlm import Conversation

if TYPE_CHECKING:
    from PIL.Image import Image

EXPECTED = {"canary": "kestrel-4711"}
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"canary": {"type": "string", "enum": ["kestrel-4711"]}},
    "required": ["canary"],
    "additionalProperties": False,
}
SCHEMA_TOKENS = 96
"""Enough for EXPECTED at one character a token, with white space."""
TEXT_TOKENS = 48
DESCRIBE = "Describe this image in one sentence."
MIN_IMAGE_TOKENS = 8
"""A word like <image> left in the text takes up to 5 tokens; the smallest image we know of takes 9."""
NOISE = "noise/"


@dataclass(frozen=True)
class Findings:
    """What the canary saw. image_tokens: of the prompt, by usage; image_matters: whether the text depends on
    the image. None: not asked, or not to be told."""

    constrained: bool | None
    image_tokens: int | None
    image_matters: bool | None
    repeatable: bool
    warnings: tuple[str, ...] = ()


async def check(
    engine: Engine, prompt: Conversation, other_images: Sequence[str] = (), constrained: bool = True
) -> Findings:
    """Try the engine with a prompt of the stage. Raises EngineError that says what is wrong and what to do.

    other_images: to show in place of the prompt's own, any that the engine can open: of another record, or
    noise_names(prompt.images) where it opens them through with_noise. constrained: False for an engine that
    does not claim to be.
    """
    if constrained:
        _prove_constrained(await engine.ask(_request("constrained", prompt, SCHEMA_TOKENS, SCHEMA)))
    replies = await _replies(engine, prompt, other_images)
    own = replies["asked", "own", 0]
    if isinstance(own, Failure):
        raise EngineError(f"the engine gave up on the first prompt of the stage: {own.reason} ({own.detail})")
    pairs = _pairs(replies)
    repeatable = all(first == second for first, second in pairs.values())
    warnings = [] if repeatable else [UNREPEATABLE]
    tokens, matters = None, None
    if prompt.images:
        tokens, matters = _image_tokens(own, replies.get(("asked", "none", 0))), _image_matters(pairs)
        warnings += _prove_seen(tokens, matters, own.text)
    return Findings(constrained or None, tokens, matters, repeatable, tuple(warnings))


def noise_names(images: Sequence[str]) -> list[str]:
    """Names under which with_noise gives noise of the size of each image."""
    return [NOISE + name for name in images]


def with_noise(images: ImageSource) -> ImageSource:
    """An image source that also opens noise_names: coarse blocks of colour, always the same, so that scaling
    does not average them away."""

    def opened(name: str) -> Image:
        if not name.startswith(NOISE):
            return images(name)
        from PIL import Image as pillow

        blocks = pillow.frombytes("RGB", (8, 8), random.Random(0).randbytes(192))
        return blocks.resize(images(name.removeprefix(NOISE)).size, pillow.Resampling.NEAREST)

    return opened


UNREPEATABLE = (
    "the same greedy request gave two texts: what is journalled stays, but sampling anew will not give the "
    "same (vLLM: VLLM_BATCH_INVARIANT=1 where the hardware allows it)"
)

Key = tuple[str, str, int]


def _request(
    name: str, prompt: Conversation, max_new_tokens: int, schema: Mapping[str, Any] | None = None
) -> Request:
    return Request(f"canary/{name}", prompt, Sampling(max_new_tokens=max_new_tokens), schema)


async def _replies(engine: Engine, prompt: Conversation, other_images: Sequence[str]) -> dict[Key, Reply]:
    """Replies by (question, picture, repetition), all asked at once."""
    questions = {"asked": prompt.turns}
    pictures = {"own": prompt.images}
    requests: dict[Key, Request] = {}
    if prompt.images:
        questions["described"] = [(DESCRIBE, "")]
        pictures |= {"other": other_images} if other_images else {}
        requests["asked", "none", 0] = _request("asked/none", Conversation([], prompt.turns), 1)
    for question, turns in questions.items():
        for picture, images in pictures.items():
            for n in range(2):
                name = f"{question}/{picture}/{n}"
                requests[question, picture, n] = _request(name, Conversation(images, turns), TEXT_TOKENS)
    replies = await asyncio.gather(*map(engine.ask, requests.values()))
    return dict(zip(requests, replies, strict=True))


def _prove_constrained(reply: Reply) -> None:
    wanted = json.dumps(EXPECTED, separators=(",", ":"))
    if isinstance(reply, Failure):
        raise EngineError(
            f"the engine gave up on a request with a JSON schema: {reply.reason} ({reply.detail}). If it is "
            "the schema that it refuses, its backend for structured outputs is missing or too old"
        )
    try:
        if json.loads(reply.text) == EXPECTED:
            return
    except (ValueError, RecursionError):
        pass
    if not reply.finished and wanted.startswith("".join(reply.text.split())):
        raise EngineError(
            f"decoding is constrained, but {SCHEMA_TOKENS} tokens did not hold {wanted}: the model spends "
            "them on white space. Start vLLM with "
            "--structured-outputs-config '{\"disable_any_whitespace\": true}'"
        )
    raise EngineError(
        f"decoding is not constrained: where the schema allows only {wanted}, the engine said "
        f"{_shown(reply.text)}. The schema goes into response_format (json_schema), or structured_outputs of "
        "vLLM, which ignores guided_json since 0.12 and says nothing. Ask the server itself if there is a "
        "gateway in between, and start it without --reasoning-parser, under which text can escape the schema"
    )


def _pairs(replies: Mapping[Key, Reply]) -> dict[tuple[str, str], tuple[str, str]]:
    """The two texts of every (question, picture) that was answered twice."""
    pairs = {}
    for question, picture, n in replies:
        first, second = replies[question, picture, 0], replies.get((question, picture, 1))
        if n == 1 and isinstance(first, Completion) and isinstance(second, Completion):
            pairs[question, picture] = first.text, second.text
    return pairs


def _image_tokens(own: Completion, blind: Reply | None) -> int | None:
    """What the image adds to the prompt; None if the engine does not count or takes no prompt without one."""
    if not isinstance(blind, Completion) or not own.prompt_tokens or not blind.prompt_tokens:
        return None
    return own.prompt_tokens - blind.prompt_tokens


def _image_matters(pairs: Mapping[tuple[str, str], tuple[str, str]]) -> bool | None:
    """Whether some question that is answered alike twice is answered otherwise for the other picture."""
    stable = {key: first for key, (first, second) in pairs.items() if first == second}
    differs = [
        stable[question, "own"] != stable[question, "other"]
        for question, picture in stable
        if picture == "own" and (question, "other") in stable
    ]
    return any(differs) if differs else None


def _prove_seen(tokens: int | None, matters: bool | None, text: str) -> list[str]:
    """Warnings. Raises EngineError if neither texts nor tokens speak for the image."""
    if matters:
        return []
    same = f"two different pictures get the same text ({_shown(text)})"
    texts = same if matters is False else "the texts for two different pictures could not be compared"
    if tokens is not None and tokens >= MIN_IMAGE_TOKENS:
        return [f"the image takes {tokens} tokens of the prompt, but {texts}: that it is seen is not proved"]
    taken = "the engine does not say how many tokens a prompt takes"
    if tokens is not None:
        taken = f"the prompt takes {tokens} tokens more with the image than without it"
    raise EngineError(
        f"nothing shows that the engine sees the image: {taken}, and {texts}. See whether the model "
        "served takes images, whether its chat template has a place for them, whether a gateway drops them"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
