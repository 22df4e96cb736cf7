"""datatrove's inference runner against a running server, with or without its checkpoints.

python benchmarks/peers/datatrove_peer.py URL CALLS IN_FLIGHT FOLDER [plain]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from workload import MAX_TOKENS, MODEL, arguments, measured, prompt, report


def main() -> None:
    """One document a call, its runner's own defaults besides."""
    from datatrove.data import Document
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.writers import JsonlWriter
    from loguru import logger

    logger.remove()
    plain = sys.argv[-1] == "plain" and bool(sys.argv.pop())
    url, calls, in_flight, folder = arguments()

    async def ask(document: Document, generate):
        messages = [{"role": "user", "content": document.text}]
        return await generate({"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.7})

    runner = InferenceRunner(
        rollout_fn=ask,
        config=InferenceConfig(
            server_type="endpoint",
            model_name_or_path=MODEL,
            endpoint_url=url.removesuffix("/v1"),
            max_concurrent_generations=in_flight,
        ),
        output_writer=JsonlWriter(f"{folder}/out", "${rank}_${chunk_index}.jsonl", compression=None),
        checkpoints_local_dir=None if plain else f"{folder}/checkpoints",
    )
    with measured() as figures:
        runner.run(Document(text=prompt(n), id=str(n)) for n in range(calls))
    rows = [json.loads(line) for file in Path(folder, "out").iterdir() for line in file.open()]
    report(figures, [row["metadata"]["rollout_results"][0]["text"] for row in rows])


if __name__ == "__main__":
    main()
