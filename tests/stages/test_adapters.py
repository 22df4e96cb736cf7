"""LoRA and QLoRA: only the adapter moves, rounds go on with it, and its folder is a checkpoint like any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.adapter_base import BaseChangedError
from models.adapters import Lora, finished, load_for_training
from models.engines.base import EngineError
from models.engines.weights import served_weights
from models.families import FAMILIES, of_model
from models.guard import TrainingError
from models.preference import PreferenceLoss, train_preference
from models.probe import read_probe, save_with_probe, take
from models.sft import train_sft
from models.training import Budget
from models.vlm import load, save
from tests.stages.test_training import PAIRS, Killed, kill_at, moved, weights
from tests.support.tiny_families import TINY
from tests.support.tiny_vlm import lessons, lively, picture

LORA = Lora(rank=4, alpha=8)
BUDGET = Budget(epochs=2, batch_size=4, learning_rate=1e-2, save_steps=2)


@pytest.fixture
def base(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> Path:
    save(lively(tiny_model()), tiny_processor, tmp_path / "base")
    return tmp_path / "base"


def sft(start: Path, out: Path, lora: Lora = LORA, report: Any = None) -> dict[str, float]:
    model, processor = load_for_training(start, lora)
    before = weights(model)
    numbers = train_sft(model, processor, lessons(), BUDGET, out / "steps", 7, picture, report)
    trains = {name for name in before if "lora_" in name or "modules_to_save.default" in name}
    assert moved(before, model) == trains and len(trains) >= 28
    save_with_probe(finished(model), processor, out / "checkpoint")
    return numbers


def preference_round(start: Path, out: Path, reference: Any = None, report: Any = None) -> dict[str, float]:
    model, processor = load_for_training(start, LORA)
    numbers = train_preference(
        model, reference, processor, PAIRS, PreferenceLoss(), BUDGET, out / "steps", 7, picture, report
    )
    save_with_probe(finished(model), processor, out / "checkpoint")
    return numbers


def test_rounds_go_on_with_the_adapter_of_sft(base: Path, tmp_path: Path) -> None:
    """SFT and two rounds, the second against the reasoning agent; the base is as it was."""
    before = (base / "model.safetensors").read_bytes()
    folders = [tmp_path / name for name in ("sft", "r1", "r2")]
    sft(base, folders[0])
    first = preference_round(folders[0] / "checkpoint", folders[1])
    second = preference_round(folders[1] / "checkpoint", folders[2], load(folders[0] / "checkpoint")[0])
    assert first["shared_prompt"] == second["shared_prompt"] == 1
    assert second["implicit_reward_margin"] > first["implicit_reward_margin"] > 0
    assert (base / "model.safetensors").read_bytes() == before
    for folder in folders:
        checkpoint = folder / "checkpoint"
        assert not {"model.safetensors", "README.md", "training_args.bin", "ref"} & {
            path.name for path in checkpoint.iterdir()
        }
        served = served_weights(str(checkpoint), lambda path: path)
        assert served.model == str(base) and served.adapter and served.adapter.rank == 8
        model, processor = load(checkpoint)
        assert type(model).__name__ == "Idefics3ForConditionalGeneration"
        assert take(model, processor).log_probs == pytest.approx(
            read_probe(checkpoint).log_probs,
            abs=2e-4,  # type: ignore[union-attr]
        )


def test_the_reference_of_a_round_is_the_adapter_as_it_came(base: Path, tmp_path: Path) -> None:
    """Against itself, before the first step, a policy has no margin."""
    sft(base, tmp_path / "sft")
    model, processor = load_for_training(tmp_path / "sft/checkpoint", LORA)
    logged: list[dict[str, float]] = []
    train_preference(
        model, None, processor, PAIRS, PreferenceLoss(), BUDGET, tmp_path / "steps", 7, picture,
        lambda numbers, step, steps: logged.append(numbers),
    )  # fmt: skip
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(logged[-1]["rewards/margins"]) > 0.01
    assert list(model.peft_config) == ["default"]


def test_a_killed_adapter_goes_on(base: Path, tmp_path: Path) -> None:
    sft(base, tmp_path / "whole")
    with pytest.raises(Killed):
        sft(base, tmp_path / "killed", report=kill_at(3))
    sft(base, tmp_path / "killed")
    files = [tmp_path / name / "checkpoint/adapter_model.safetensors" for name in ("whole", "killed")]
    one, other = (file.read_bytes() for file in files)
    assert one == other


def test_a_projector_that_trains_is_saved_merged(base: Path, tmp_path: Path) -> None:
    sft(base, tmp_path / "sft", replace(LORA, projector=True))
    assert not (tmp_path / "sft/checkpoint/adapter_config.json").exists()
    before, after = load(base)[0], load(tmp_path / "sft/checkpoint")[0]
    still = {name for name in weights(before) if name not in moved(weights(before), after)}
    assert not any("connector" in name or "_proj" in name for name in still if "vision" not in name)
    assert all(name in still for name in weights(before) if "vision" in name)


def test_only_what_neither_trains_nor_is_saved_is_held_in_16_bits(base: Path, tmp_path: Path) -> None:
    """A projector in 16 bits would round its updates away, and merging would round the base."""
    import torch

    model, processor = load_for_training(base, LORA, bf16=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    save_with_probe(finished(model), processor, tmp_path / "adapter")
    probe = read_probe(tmp_path / "adapter")
    assert probe
    assert take(load(tmp_path / "adapter")[0], processor).log_probs == pytest.approx(
        probe.log_probs, abs=2e-4
    )
    model, _ = load_for_training(base, replace(LORA, projector=True), bf16=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_quantised_model_trains_an_adapter(base: Path, tmp_path: Path) -> None:
    """bitsandbytes for real: the linear layers of the language model lie in memory as 4 bits."""
    import torch

    model, _ = load_for_training(base, replace(LORA, quantized=True))
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14 and not any("vision" in name for name in packed)
    sft(base, tmp_path / "sft", replace(LORA, quantized=True))
    again, _ = load_for_training(tmp_path / "sft/checkpoint", replace(LORA, quantized=True))
    assert any(p.requires_grad for p in again.parameters())
    served, processor = load(tmp_path / "sft/checkpoint")
    probe = read_probe(tmp_path / "sft/checkpoint")
    assert probe and take(served, processor).log_probs == pytest.approx(probe.log_probs, abs=2e-4)


def test_another_rank_is_refused(base: Path, tmp_path: Path) -> None:
    sft(base, tmp_path / "sft")
    with pytest.raises(TrainingError, match="of rank 4 and alpha 8, to go on as one of rank 16 and alpha 8"):
        load_for_training(tmp_path / "sft/checkpoint", replace(LORA, rank=16))
    settings = json.loads((tmp_path / "sft/checkpoint/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)


def test_an_adapter_is_not_put_on_another_base(base: Path, tmp_path: Path) -> None:
    """Neither to answer, nor to train, nor to be served."""
    checkpoint = tmp_path / "sft/checkpoint"
    model, processor = load_for_training(base, LORA)
    save(model, processor, checkpoint)
    served_weights(str(checkpoint), lambda path: path)
    another, _ = load(base)
    another.get_input_embeddings().weight.data.mul_(1.01)
    save(another, processor, base)
    other = "an adapter trained on other weights than .*base holds now"
    with pytest.raises(BaseChangedError, match=other):
        load(checkpoint)
    with pytest.raises(BaseChangedError, match=other):
        load_for_training(checkpoint, LORA)
    with pytest.raises(EngineError, match=other):
        served_weights(str(checkpoint), lambda path: path)


def test_a_killed_round_goes_on(base: Path, tmp_path: Path) -> None:
    """With the reference as it came, which is the same adapter, and to the same bytes."""
    sft(base, tmp_path / "sft")
    start = tmp_path / "sft/checkpoint"
    preference_round(start, tmp_path / "whole")
    with pytest.raises(Killed):
        preference_round(start, tmp_path / "killed", report=kill_at(3))
    preference_round(start, tmp_path / "killed")
    one, other = (tmp_path / name / "checkpoint/adapter_model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("kind", [kind for family in FAMILIES for kind in family.model_types if kind in TINY])
def test_every_family_has_its_linear_layers(kind: str) -> None:
    """Seven a layer, of the language model alone."""
    import re

    model = TINY[kind].make_model(TINY[kind].make_processor())
    lora = of_model(model).lora
    found = [name for name, _ in model.named_modules() if re.fullmatch(f".*{lora}", name)]
    assert len(found) == 7 * model.config.get_text_config().num_hidden_layers
