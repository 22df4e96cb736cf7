"""A server with vLLM's interface in development mode whose "weights" are one number: the log-prob of every
token.

    command = (sys.executable, "tests/support/stand_in_vllm.py")
    folder = checkpoint(tmp_path / "r1", weights=-0.5)

Its checkpoint holds the number in model.safetensors, and a probe that expects it. In the environment:
STALE=1, it reloads nothing; OFF=0.3, it is always so far from its weights; CALLS, a file that gets a line for
every call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKENS = [11, 7, 5]


def checkpoint(folder: Path, weights: float, probe: bool = True, config: str = "{}") -> Path:
    """A folder that the stand-in can serve."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(str(weights))
    (folder / "config.json").write_text(config)
    if probe:
        write_probe(folder, weights)
    return folder


def adapter(folder: Path, base: Path, weights: float) -> Path:
    """A LoRA adapter of it, which adds a number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": 12, "peft_type": "LORA"})
    )
    (folder / "adapter_model.safetensors").write_text(str(weights))
    write_probe(folder, float((base / "model.safetensors").read_text()) + weights)
    return folder


def write_probe(folder: Path, log_prob: float) -> None:
    fields = {"image": "data:image/png;base64,AA==", "turns": [["x", ""]], "tokens": TOKENS}
    (folder / "probe.json").write_text(json.dumps({**fields, "log_probs": [log_prob] * len(TOKENS)}))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"pid": os.getpid()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        with Path(os.environ["CALLS"]).open("a") as file:
            print(os.getpid(), self.path, json.dumps(body.get("kwargs") or body.get("lora_name")), file=file)
        try:
            self._answer(200, self._call(self.path.partition("?")[0], body))
        except KeyError as error:
            self._answer(404, {"error": f"no {error}"})

    def _call(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc" and os.environ.get("STALE") != "1":
            STATE["base"] = read(body["kwargs"]["weights_path"], "model")
        elif path == "/v1/load_lora_adapter":
            STATE["adapters"][body["lora_name"]] = read(body["lora_path"], "adapter_model")
        elif path == "/v1/unload_lora_adapter":
            del STATE["adapters"][body["lora_name"]]
        elif path == "/v1/chat/completions":
            return self._chat(body)
        return {"success": True}

    def _chat(self, body: dict[str, Any]) -> Any:
        more = 0.0 if body["model"] == ARGUMENTS.served_model_name else STATE["adapters"][body["model"]]
        value = STATE["base"] + more + float(os.environ.get("OFF", "0"))
        text = f"{value:g}"
        return {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "prompt_logprobs": [None, *({str(token): {"logprob": value}} for token in TOKENS)],
        }

    def _answer(self, status: int, fields: Any) -> None:
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def read(folder: str, name: str) -> float:
    return float((Path(folder) / f"{name}.safetensors").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("--model", "--host", "--served-model-name", "--worker-extension-cls", "--max-lora-rank"):
        parser.add_argument(option)
    parser.add_argument("--port", type=int)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--lora-modules", nargs="*", default=[])
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--enable-prompt-tokens-details", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--fail", action="store_true")
    ARGUMENTS = parser.parse_args()
    if ARGUMENTS.fail:
        sys.exit("out of memory")
    time.sleep(ARGUMENTS.load_s)
    named = dict(module.split("=", 1) for module in ARGUMENTS.lora_modules)
    STATE: dict[str, Any] = {
        "base": read(ARGUMENTS.model, "model"),
        "adapters": {name: read(folder, "adapter_model") for name, folder in named.items()},
    }
    ThreadingHTTPServer((ARGUMENTS.host, ARGUMENTS.port), Handler).serve_forever()
