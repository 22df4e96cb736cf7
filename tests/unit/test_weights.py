"""Which weights are to be served, and whether an engine serves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from models.engines.base import Completion, EngineError, Failure, Reply, Request, Sampling, Scored
from models.engines.openai import ClientSettings, completion, payload
from models.engines.pictures import Pictures
from models.engines.vllm_channel import payload as told
from models.engines.vllm_channel import reply_in
from models.engines.weights import (
    Adapter,
    Disagreement,
    Probing,
    Weights,
    adapter_arguments,
    default_tolerance,
    served_weights,
)
from models.probe import Probe
from models.vlm import Conversation

PROBE = Probe("data:image/png;base64,AA==", [("x", "")], [7, 8, 9], [-1.0, -2.0, -3.0])
REPLY = Scored("", 1, False, prompt_log_probs=[(1, -9.0), (7, -1.0), (8, -2.0), (9, -3.0)])


class Says:
    """An engine with one reply."""

    capacity, independent = 1, True

    def __init__(self, reply: Reply) -> None:
        self.reply, self.closed = reply, False

    async def ask(self, request: Request) -> Reply:
        assert request.log_probs and list(request.prompt.images) == [PROBE.image]
        return self.reply

    async def close(self) -> None:
        self.closed = True


def with_log_probs(*values: float, tokens: tuple[int, ...] = (7, 8, 9)) -> Scored:
    return replace(REPLY, prompt_log_probs=list(zip(tokens, values, strict=True)))


def test_rounding_is_allowed_and_more_is_an_error_with_figures() -> None:
    probing, engine = Probing(PROBE, 0.1), Says(with_log_probs(-1.1, -2.1, -3.05))
    probing.check(engine)
    assert engine.closed and probing.distance(Says(REPLY)) == 0
    with pytest.raises(Disagreement, match=r"0\.2000 a token"):
        probing.check(Says(with_log_probs(-1.2, -2.2, -2.8)))
    with pytest.raises(Disagreement):
        probing.check(Says(with_log_probs(float("nan"), -2.0, -3.0)))
    Probing(None, 0.1).check(Says(Failure("never asked")))


def test_other_tokens_are_no_matter_of_rounding() -> None:
    for reply in (with_log_probs(-1, -2, -3, tokens=(7, 8, 10)), replace(REPLY, prompt_log_probs=[])):
        with pytest.raises(Disagreement, match="chat template"):
            Probing(PROBE, 9.0).check(Says(reply))


@pytest.mark.parametrize(
    ("reply", "message"),
    [(Failure("timeout", "600 s"), r"timeout \(600 s\)"), (Completion("", 1, True), "no log-probs")],
)
def test_an_engine_that_does_not_say_them_is_an_error(reply: Reply, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Probing(PROBE, 0.1).check(Says(reply))


def test_half_precision_is_allowed_more() -> None:
    assert default_tolerance(["--dtype", "float32"]) == default_tolerance(["--x", "--dtype=float32"])
    assert (
        default_tolerance([])
        == default_tolerance(["--dtype", "bfloat16"])
        > default_tolerance(["--dtype", "float32"])
    )


def test_both_kinds_of_engine_ask_for_log_probs_and_read_them() -> None:
    asked = Request("probe", Conversation([], [("x", "")]), Sampling(), log_probs=True)
    usual = Request("q", Conversation([], [("x", "")]), Sampling())
    assert payload(asked, "m", [], ClientSettings())["prompt_logprobs"] == 0
    assert "prompt_logprobs" not in payload(usual, "m", [], ClientSettings())
    assert told(1, asked, True)["sampling"]["prompt_logprobs"] == 0
    assert "prompt_logprobs" not in told(1, usual, True)["sampling"]
    body: dict[str, Any] = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
    scored = completion(json.dumps({**body, "prompt_logprobs": [None, {"7": {"logprob": -1.5}}]}).encode())
    assert isinstance(scored, Scored) and list(scored.prompt_log_probs) == [(7, -1.5)]
    assert not isinstance(completion(json.dumps(body).encode()), Scored)
    with pytest.raises(ValueError, match="log-probs"):
        completion(json.dumps({**body, "prompt_logprobs": [None, {"7": None}]}).encode())
    line = {"id": 3, "text": "a", "finished": True, "tokens": 1, "prompt_log_probs": [[7, -1.5]]}
    assert reply_in(json.dumps(line).encode()) == (3, Scored("a", 1, True, prompt_log_probs=[(7, -1.5)]))


def test_a_picture_may_be_its_own_name() -> None:
    (part,) = Pictures("nowhere", 0).read([PROBE.image])
    assert PROBE.image in orjson.dumps(part).decode()


def fingerprint(path: str) -> str:
    return f"of {Path(path).name}"


def write_adapter(folder: Path, **fields: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 12, **fields}))
    return str(folder)


def test_an_adapter_is_served_by_a_name_of_its_own_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    weights = served_weights(folder, lambda path: "0123456789abcdef" if path == folder else fingerprint(path))
    assert weights == Weights(
        str(tmp_path / "base"), "of base", Adapter("adapter-0123456789ab", str(Path(folder).resolve()), 16)
    )
    assert str(weights.folder) == folder
    assert adapter_arguments(weights.adapter, []) == ["--enable-lora", "--max-lora-rank", "16"]
    assert adapter_arguments(weights.adapter, ["--enable-lora", "--max-lora-rank", "64"]) == []
    assert adapter_arguments(None, []) == []


def test_a_checkpoint_and_a_hub_id_are_served_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "r1").mkdir()
    assert served_weights(str(tmp_path / "r1"), fingerprint) == Weights(str(tmp_path / "r1"), "of r1")
    assert served_weights("owner/name", fingerprint) == Weights("owner/name", "owner/name")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, "names '' as its base"),
        ({"base_model_name_or_path": "artifacts/gone"}, "dvc pull"),
        ({"base_model_name_or_path": "a/b", "r": 4096}, "no LoRA adapter that vLLM can serve"),
        ({}, "no LoRA adapter that vLLM can serve"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_named(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        served_weights(write_adapter(tmp_path / "a", **fields), fingerprint)
