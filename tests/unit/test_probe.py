"""The probe of a checkpoint: what the trainer's forward says, in bytes that do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.images import decode_image
from models.probe import FILE, TURNS, Probe, picture, picture_url, read_probe, save_with_probe, take
from models.vlm import Conversation, Encoder, load
from tests.support import tiny_vlm


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_vlm.processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> Any:
    return tiny_vlm.lively(tiny_vlm.model(processor))


def distance(one: Probe, other: Probe) -> float:
    pairs = zip(one.log_probs, other.log_probs, strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tokens)


def test_the_checkpoint_read_back_says_the_same_in_the_same_bytes(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    save_with_probe(model, processor, tmp_path / "a")
    again, its_processor = load(tmp_path / "a")
    save_with_probe(again, its_processor, tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert read_probe(tmp_path / "a") == take(model, processor)


def test_it_holds_the_end_of_the_prompt_behind_the_picture(model: Any, processor: Any) -> None:
    probe = take(model, processor)
    encoder = Encoder(processor, lambda name: picture())
    encoder.prepare(["x"])
    ids = encoder.prompt(Conversation(["x"], TURNS))
    assert probe.tokens == ids[-len(probe.tokens) :] and processor.image_token_id not in probe.tokens
    assert len(probe.tokens) >= 24 and all(value < 0 for value in probe.log_probs)


def test_other_weights_and_another_picture_show(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = take(model, processor)
    assert distance(probe, take(tiny_vlm.lively(tiny_vlm.model(processor, 1)), processor)) > 0.05
    monkeypatch.setattr("models.probe.picture", lambda: tiny_vlm.picture("another"))
    assert distance(probe, take(model, processor)) > 0.001


def test_a_model_in_training_is_left_in_training(model: Any, processor: Any) -> None:
    model.train()
    try:
        take(model, processor)
        assert model.training
    finally:
        model.eval()


def test_the_picture_travels_with_it(model: Any) -> None:
    import base64

    data = base64.b64decode(picture_url().partition(",")[2])
    assert decode_image(data, "probe").tobytes() == picture().tobytes()


def test_a_checkpoint_without_one_has_none_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert read_probe(tmp_path) is None and read_probe("owner/name") is None
    (tmp_path / FILE).write_text('{"tokens": []}')
    with pytest.raises(ValueError, match=r"probe\.json is no probe"):
        read_probe(tmp_path)
