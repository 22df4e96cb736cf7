"""vLLM's own offline interface, told line by line what to run. Runs where vLLM is installed.

    PYTHON benchmarks/peers/vllm_peer.py --model FOLDER [arguments of vLLM's engine]

On stdin, a line a run: {"calls": FILE, "how": "one" or "all"}; FILE holds a line of JSON a call:
{"messages": [...], "images": [FILE], "max_tokens": 24, "schema": {...}, "temperature": 0.7, "top_p": 0.95}

one: a call is made when the one before it has come back. all: all are submitted at once. On stdout, a line a
run: {"seconds", "calls", "tokens", "prompt_tokens", "cached_tokens"}; what precedes the first call (reading
the calls, opening the images) is not counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """One run after another until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to stderr
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        calls = [json.loads(call) for call in Path(told["calls"]).read_text().splitlines()]
        print(json.dumps(run(llm, calls, told["how"])), file=replies, flush=True)


def run(llm: Any, calls: list[dict[str, Any]], how: str) -> dict[str, float]:
    """All calls."""
    chats = [chat(call) for call in calls]
    parameters = [sampling(call) for call in calls]
    began = time.perf_counter()
    if how == "all":
        outputs = llm.chat(chats, parameters, use_tqdm=False)
    else:
        outputs = [
            llm.chat(one, [its], use_tqdm=False)[0] for one, its in zip(chats, parameters, strict=True)
        ]
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "calls": len(outputs),
        "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
    }


def chat(call: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages with their images, which are open."""
    from PIL import Image

    first, *others = call["messages"]
    images = [
        {"type": "image_pil", "image_pil": Image.open(name).convert("RGB"), "uuid": name}
        for name in call["images"]
    ]
    content = [*images, {"type": "text", "text": first["content"]}]
    return [{**first, "content": content}, *others]


def sampling(call: dict[str, Any]) -> Any:
    """vLLM's parameters."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = call["schema"]
    return SamplingParams(
        temperature=call["temperature"],
        top_p=call["top_p"],
        max_tokens=call["max_tokens"],
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


if __name__ == "__main__":
    main()
