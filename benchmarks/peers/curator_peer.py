"""bespokelabs-curator against a running server.

python benchmarks/peers/curator_peer.py URL CALLS IN_FLIGHT FOLDER
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from workload import MAX_TOKENS, MODEL, arguments, measured, prompt, report

OFFLINE = {
    "TELEMETRY_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    "CURATOR_DISABLE_RICH_DISPLAY": "1",
}


def main() -> None:
    """A row a call, no limits but that of calls in flight."""
    url, calls, in_flight, folder = arguments()
    tokenizers = Path(find_spec("litellm").origin).parent / "litellm_core_utils" / "tokenizers"
    os.environ.update({**OFFLINE, "HOME": folder, "TIKTOKEN_CACHE_DIR": str(tokenizers)})
    from bespokelabs.curator import LLM

    with measured() as figures:
        llm = LLM(
            model_name=MODEL,
            backend="openai",
            generation_params={"max_tokens": MAX_TOKENS, "temperature": 0.7},
            backend_params={
                "base_url": url,
                "api_key": "none",
                "max_concurrent_requests": in_flight,
                "max_requests_per_minute": 10**7,
                "max_tokens_per_minute": 10**11,
            },
        )
        answered = llm([prompt(n) for n in range(calls)], working_dir=folder)
    report(figures, [row["response"] for row in answered.dataset])


if __name__ == "__main__":
    main()
