"""Shared prompts: the numbers of plain TRL, the reference once, features of a frozen tower once, and a way
back."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.batches import bucketed, in_parts, padded_tokens
from models.frozen_vision import FeatureCache, frozen_vision, number
from models.guard import Guard, callback
from models.pairs import PreferenceCollator, PreferenceExample, SharedCollator, encode_pairs
from models.preference import PreferenceLoss, train_preference
from models.preference_trainer import pair_size, shared_tokens
from models.reference import ReferenceLog, digest
from models.shared_prompt import difference, obstacle, positions, shared_prompt
from models.training import Budget, arguments, freeze_vision, run_trainer
from models.vlm import Conversation, Encoder
from tests.support.tiny_vlm import picture

BUDGET = Budget(max_steps=20, batch_size=3, learning_rate=1e-3, save_steps=100)
PAIRS = [
    PreferenceExample(
        Conversation([f"picture {n}"], [("What is the sum of row 1?" + " and more" * (n % 4), "")]),
        f"it is {n}" + " and more" * (n % 3),
        f"it is {n + 1} or more" + " and more" * (n % 5),
    )
    for n in range(9)
]
LOSSES = {
    "dpo": PreferenceLoss(["sigmoid"], [1.0]),
    "mpo": PreferenceLoss(),
    "ipo": PreferenceLoss(["ipo"], [1.0]),
    "length-normalised": PreferenceLoss(["sigmoid_norm"], [1.0]),
}


@pytest.fixture
def rows(tiny_processor: Any) -> tuple[Encoder, list[dict[str, Any]]]:
    encoder = Encoder(tiny_processor, picture)
    return encoder, encode_pairs(encoder, PAIRS, 512)[0]


def plain_trl(model: Any, reference: Any, processor: Any, loss: PreferenceLoss, folder: Path) -> list[float]:
    """The losses of TRL's own trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    encoder, losses = Encoder(processor, picture), []
    collate = PreferenceCollator(encoder)

    def plain(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate([{**row, "pictures": row["images"]} for row in rows])
        return {key: value for key, value in batch.items() if key != "image_ids"}

    rows = [{**row, "images": row["pictures"]} for row in encode_pairs(encoder, PAIRS, 512)[0]]
    freeze_vision(model)
    guard = Guard(model)
    trainer = bucketed(DPOTrainer)(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **arguments(BUDGET, folder, 7, len(rows)),
            loss_type=loss.types,
            loss_weights=loss.weights,
            beta=loss.beta,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=plain,
        callbacks=[callback(guard, lambda numbers, *_: losses.append(numbers["loss"]))],
    )
    run_trainer(trainer, guard, folder)
    return losses


@pytest.fixture
def train(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> Any:
    """train(loss, budget, reference, folder): the losses of our run, and its numbers."""

    def run(
        loss: PreferenceLoss | None = None,
        budget: Budget = BUDGET,
        reference: Any = None,
        folder: str = "ours",
        stop: int = 0,
    ) -> tuple[list[float], dict[str, float]]:
        losses: list[float] = []

        def report(numbers: dict[str, float], step: int, steps: int) -> None:
            losses.append(numbers["loss"])
            assert "pairs_per_second" in numbers or step == 1
            if step == stop:
                raise KeyboardInterrupt

        numbers = train_preference(
            tiny_model(),
            reference,
            tiny_processor,
            PAIRS,
            loss or PreferenceLoss(),
            budget,
            tmp_path / folder,
            7,
            picture,
            report,
        )
        return losses, numbers

    return run


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_plain_trl(
    name: str, train: Any, tiny_model: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    theirs = plain_trl(tiny_model(), tiny_model(3), tiny_processor, LOSSES[name], tmp_path / "plain")
    ours, numbers = train(LOSSES[name], reference=tiny_model(3))
    assert numbers["shared_prompt"] == 1 and len(ours) == 20
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[0] != pytest.approx(ours[-1], abs=1e-2)


def test_a_model_is_its_own_reference(train: Any, tiny_model: Any) -> None:
    assert train(folder="none")[0] == train(reference=tiny_model(), folder="itself")[0]


def test_log_probabilities_are_those_of_plain_rows(tiny_model: Any, rows: Any) -> None:
    encoder, encoded = rows
    model = tiny_model()
    before = model.config.get_text_config()._attn_implementation
    with frozen_vision(model, 1 << 20), shared_prompt(model):
        batches = PreferenceCollator(encoder)(encoded), SharedCollator(encoder)(encoded)
        assert difference(model, *batches) < 1e-4
        batches[1]["pair_ids"][0, 12] += 1
        assert difference(model, *batches) > 1e-4
    assert model.config.get_text_config()._attn_implementation == before
    assert "forward" not in vars(model.base_model)


def other_family(name: str) -> tuple[Any, Any]:
    """A tiny model of the family from its config class, and an encoder's part in a batch of two pictures."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    if name == "llava":
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", **vision},
            image_token_id=9,
        )
        pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 24, "num_heads": 2,
                  "depth": 2, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        config = AutoConfig.for_model(
            "qwen2_5_vl",
            text_config={**text, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=9,
            vision_start_token_id=8,
        )
        pixels = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    model = AutoModelForImageTextToText.from_config(config).eval()
    known = {"llava": "LlavaNextProcessor", "qwen2.5-vl": "Qwen2_5_VLProcessor"}[name]
    processor = type(known, (SimpleNamespace,), {})(image_token_id=9)  # a family is known by its name
    tokenizer = SimpleNamespace(pad_token_id=0)
    return model, SimpleNamespace(pixels=lambda images: pixels, tokenizer=tokenizer, processor=processor)


TOWERS = {"llava": "vision_tower", "qwen2.5-vl": "visual"}


@pytest.mark.parametrize("family", TOWERS)
def test_other_families_share_prompts(family: str) -> None:
    import torch

    model, encoder = other_family(family)
    seen = [8, 9, 9, 9, 9, 10]
    pairs = [
        {"pictures": ["one"], "prompt": [*seen, 11, 12, 13], "chosen": [14, 15], "rejected": [16, 17, 18]},
        {"pictures": ["one"], "prompt": [20, *seen, 21], "chosen": [22, 23, 24, 25], "rejected": [26]},
    ]
    assert obstacle(model) is None
    plain, shared = PreferenceCollator(encoder)(pairs), SharedCollator(encoder)(pairs)
    model.base_model.get_submodule(TOWERS[family]).requires_grad_(False)
    with frozen_vision(model, 1 << 20) as cache, shared_prompt(model):
        assert difference(model, plain, shared) < 1e-4
        kept = model.base_model(**{k: v for k, v in shared.items() if k != "completion_mask"})
    assert cache.encoded == (1 if family == "llava" else 0)  # Qwen's tower takes patches, not images
    shared.pop("image_ids", None)
    with shared_prompt(model):
        new = model.base_model(**{k: v for k, v in shared.items() if k != "completion_mask"})
    torch.testing.assert_close(kept.last_hidden_state, new.last_hidden_state)


def test_an_adapter_is_trained_against_the_model_without_it(
    tiny_model: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    budget = replace(BUDGET, learning_rate=1e-2)
    numbers = train_preference(
        model, None, tiny_processor, PAIRS, PreferenceLoss(), budget, tmp_path, 7, picture
    )
    assert numbers["shared_prompt"] == 1 and numbers["implicit_reward_margin"] > 0


def test_a_model_that_cannot_share_is_trained_with_plain_rows_and_says_so(
    train: Any, tiny_model: Any, caplog: Any, monkeypatch: Any
) -> None:
    windowed = tiny_model()
    windowed.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    assert obstacle(windowed) == "its text model has layers of sliding_attention"
    shared, _ = train(folder="shared")
    wrong = {
        "its log-probabilities differ by": lambda *args, **images: positions(*args, **images) * 2,
        "its forward pass fails (RuntimeError": lambda *args, **images: positions(*args, **images)[:, 1:],
    }
    for reason, broken in wrong.items():
        monkeypatch.setattr("models.shared_prompt.positions", broken)
        with caplog.at_level(logging.WARNING):
            plain, numbers = train(folder="plain")
        assert (
            f"Idefics3ForConditionalGeneration does not share prompts, each is read twice: {reason}"
            in caplog.text
        )
        assert numbers["shared_prompt"] == 0 and plain == pytest.approx(shared, abs=1e-4)


def test_the_reference_is_not_computed_again_after_a_kill(train: Any, monkeypatch: Any) -> None:
    from trl import DPOTrainer

    computed: list[int] = []
    real = DPOTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(len(inputs["completion_mask"]) // 2)
        return real(self, model, inputs)

    whole, numbers = train(folder="whole")
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", counted)
    with pytest.raises(KeyboardInterrupt):
        train(folder="killed")
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        train(folder="killed", stop=5)
    assert computed == [3]  # of three batches two had been computed
    computed.clear()
    assert train(folder="killed") == (whole, numbers) and not computed


def test_a_line_that_a_kill_cut_off_is_computed_again(tmp_path: Path) -> None:
    log = ReferenceLog(tmp_path, "x")
    log.fill([[0, 2], [1]], lambda batch: ([-1.5 - i for i in batch], [-0.1] * len(batch)))
    log.path.write_bytes(log.path.read_bytes()[:-4])
    again = ReferenceLog(tmp_path, "x")
    again.fill(again.missing([[0, 2], [1]]), lambda batch: ([-1.5 - i for i in batch], [-0.1] * len(batch)))
    assert again.computed == 1 and again.values == {0: (-1.5, -0.1), 2: (-3.5, -0.1), 1: (-2.5, -0.1)}
    assert ReferenceLog(tmp_path, "x", rank=1).values == again.values
    assert [len(json.loads(line)) for line in again.path.read_text().splitlines()] == [2, 1]


def test_other_weights_and_other_pairs_are_another_reference(tiny_processor: Any, rows: Any) -> None:
    _, encoded = rows
    other = [{**encoded[0], "chosen": [5]}, *encoded[1:]]
    names = {digest(model, pairs, tiny_processor) for model in "ab" for pairs in (encoded, other)}
    assert len(names) == 4


def test_features_of_a_frozen_tower_are_computed_once_and_are_bounded(tiny_model: Any, rows: Any) -> None:
    import torch

    encoder, encoded = rows
    model, collate = tiny_model(), PreferenceCollator(encoder)
    batch = {key: value for key, value in collate(encoded[:4]).items() if key != "completion_mask"}
    plain = {key: value for key, value in batch.items() if key != "image_ids"}
    with torch.no_grad():
        expected = model(**plain).logits
    with frozen_vision(model, 1 << 20) as cache:
        model(**batch)
        assert cache.encoded == 0  # the tower trains: its features change
    freeze_vision(model)
    with frozen_vision(model, 1 << 20) as cache:
        for _ in range(2):
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        assert cache.encoded == 4
        each = cache.bytes // 4
    with frozen_vision(model, 2 * each) as cache:
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        assert cache.bytes == 2 * each
    torch.testing.assert_close(model(**plain).logits, expected)


def test_the_least_recently_used_features_go_first() -> None:
    import torch

    cache = FeatureCache(2 * 4 * 8)
    for image in (1, 2):
        cache.put(image, (torch.zeros(8),))
    assert cache.get(1) is not None
    cache.put(3, (torch.zeros(8),))
    assert cache.get(2) is None and cache.get(1) is not None
    assert len({number("a.png", 0), number("b.png", 0), number("a.png", 1)}) == 3


def test_a_batch_in_parts_is_the_same_step(train: Any) -> None:
    whole, _ = train(LOSSES["dpo"], folder="whole")
    parts, _ = train(LOSSES["dpo"], budget=replace(BUDGET, batch_tokens=120), folder="parts")
    assert parts == pytest.approx(whole, abs=1e-4)


def test_parts_hold_no_more_tokens_than_allowed_and_every_row_once() -> None:
    sizes = [(30, 10), (4, 3), (200, 50), (20, 10), (10, 5), (15, 15)]
    pairs = [{"prompt": [0] * p, "chosen": [0] * c, "rejected": [0] * (c - 1)} for p, c in sizes]
    assert [pair_size(pair) for pair in pairs] == sizes
    assert in_parts(sizes, shared_tokens, rows=3, tokens=120) == [[2], [0, 5], [3, 4, 1]]
    assert in_parts(sizes, shared_tokens, rows=2, tokens=0) == [[2, 0], [5, 3], [4, 1]]
    assert in_parts([5, 9, 4], padded_tokens, rows=9, tokens=10) == [[1], [0, 2]]


def test_the_cache_of_features_changes_no_number(train: Any) -> None:
    some = replace(BUDGET, max_steps=4)
    assert train(budget=some, folder="kept")[0] == pytest.approx(
        train(budget=replace(some, vision_cache_mb=0), folder="not kept")[0], abs=1e-5
    )
