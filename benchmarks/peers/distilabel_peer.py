"""distilabel against a running server.

python benchmarks/peers/distilabel_peer.py URL CALLS IN_FLIGHT FOLDER
"""

from __future__ import annotations

import os

from workload import MAX_TOKENS, MODEL, arguments, measured, prompt, report


def main() -> None:
    """Batches of as many rows as calls may be in flight."""
    url, calls, in_flight, folder = arguments()
    os.environ.update({"HOME": folder, "HF_HUB_OFFLINE": "1"})
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    with measured() as figures:
        with Pipeline(name="calls", cache_dir=folder) as pipeline:
            load = LoadDataFromDicts(
                data=[{"instruction": prompt(n)} for n in range(calls)], batch_size=in_flight
            )
            llm = OpenAILLM(
                model=MODEL,
                base_url=url,
                api_key="none",
                generation_kwargs={"max_new_tokens": MAX_TOKENS, "temperature": 0.7},
            )
            load >> TextGeneration(llm=llm, input_batch_size=in_flight)
        answered = pipeline.run(use_cache=False)
    report(figures, [row["generation"] or "" for row in answered["default"]["train"]])


if __name__ == "__main__":
    main()
