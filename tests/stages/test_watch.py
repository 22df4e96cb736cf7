"""Watching training: all layouts of a batch are counted alike, a run that diverges keeps what was good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.adapters import Lora, load_for_training
from models.batches import PartedCollator, padded_tokens
from models.guard import Diverged
from models.pairs import PreferenceCollator, SharedCollator, encode_pairs
from models.preference import PreferenceLoss, train_preference
from models.sft import SftCollator, encode_rows, row_length, train_sft
from models.stop_rules import StopRules
from models.training import Budget, freeze_vision
from models.vlm import Encoder, load, save
from models.watch import Counts, Work, pair_counts, sft_counts
from tests.support.tiny_vlm import lessons, pairs, picture

PAIRS = pairs(8)
WORK = Work(parameters=10, trained=4, layers=2, width=8)


def counted(collate: Any, rows: Any, read: Any) -> dict[str, float]:
    counts = Counts(WORK, read, "pairs")
    counts.begin()
    counts.counted(collate)(rows)
    counts.fetched(1, 0.5)
    return counts.numbers(processes=1)


def test_padding_is_counted_in_every_layout(tiny_processor: Any) -> None:
    encoder = Encoder(tiny_processor, picture)
    rows, _ = encode_rows(encoder, lessons(), 512)
    lengths = [row["length"] for row in rows]
    numbers = counted(SftCollator(encoder), rows, sft_counts)
    assert numbers["padding_share"] == pytest.approx(1 - sum(lengths) / (len(rows) * max(lengths)))
    assert numbers["length"] == pytest.approx(sum(lengths) / len(rows))
    alone = PartedCollator(SftCollator(encoder), row_length, padded_tokens, 1)
    assert counted(alone, rows, sft_counts)["padding_share"] == 0

    pairs, _ = encode_pairs(encoder, PAIRS, 512)
    prompt, chosen, rejected = (
        [len(pair[side]) for pair in pairs] for side in ("prompt", "chosen", "rejected")
    )
    said = sum(chosen) + sum(rejected)
    shared = counted(SharedCollator(encoder), pairs, pair_counts)
    longest = max(prompt) + 2 * max(chosen + rejected)
    assert shared["padding_share"] == pytest.approx(1 - (sum(prompt) + said) / (len(pairs) * longest))
    assert shared["rejected_length"] == pytest.approx(sum(rejected) / len(pairs))
    twice = counted(PreferenceCollator(encoder), pairs, pair_counts)
    longest = max(p + max(c, r) for p, c, r in zip(prompt, chosen, rejected, strict=True))
    assert twice["padding_share"] == pytest.approx(1 - (2 * sum(prompt) + said) / (2 * len(pairs) * longest))
    assert "mfu" not in twice


def test_work_counts_what_a_token_passes_through(tiny_model: Any) -> None:
    model = tiny_model()
    freeze_vision(model)
    text = model.config.get_text_config()
    sizes = {name: p.numel() for name, p in model.named_parameters() if ".vision_model." not in name}
    embedding = "model.text_model.embed_tokens.weight"
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = sum(size for name, size in sizes.items() if name != embedding or tied)
    work = Work.of(model)
    assert work.parameters == work.trained == expected and work.layers == text.num_hidden_layers
    assert WORK.flops(tokens=20, rows=2) == 20 * (2 * 4 + 4 * 10 + 12 * 2 * 8 * 10)


def test_adapters_train_less_than_they_cost(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    save(tiny_model(), tiny_processor, tmp_path)
    model, _ = load_for_training(tmp_path, Lora(rank=4))
    freeze_vision(model)
    work = Work.of(model)
    assert 0 < work.trained < work.parameters / 10


def test_what_is_logged(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    budget = Budget(epochs=1, batch_size=4, learning_rate=1e-3)
    train_preference(
        tiny_model(), None, tiny_processor, PAIRS, PreferenceLoss(), budget, tmp_path, 0, picture,
        lambda numbers, *_: seen.append(numbers),
    )  # fmt: skip
    assert len(seen) == 2
    for numbers in seen:
        assert numbers["tokens_per_second"] > numbers["pairs_per_second"] > 0
        assert 0 < numbers["data_wait_share"] < 1 and 0 < numbers["memory_gb"] < 24 and numbers["tflops"] > 0
        assert {"rewards/margins", "logps/chosen", "chosen_length", "grad_norm"} <= numbers.keys()


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint_from_before(
    tiny_model: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    budget = Budget(
        max_steps=24, batch_size=8, learning_rate=5.0, warmup=0.5, schedule="linear", save_steps=1
    )
    losses: list[float] = []
    with pytest.raises(Diverged, match="lower `learning_rate`") as error:
        train_sft(tiny_model(), tiny_processor, lessons(), budget, tmp_path / "steps", 0, picture,
                  lambda numbers, *_: losses.append(numbers["loss"]))  # fmt: skip
    (kept,) = (tmp_path / "steps").glob("checkpoint-*")
    assert str(kept) in str(error.value)
    good = int(kept.name.removeprefix("checkpoint-"))
    assert len(losses) == good + StopRules().patience
    load(kept)
    sound = replace(budget, learning_rate=1e-3, warmup=0.1)
    train_sft(tiny_model(), tiny_processor, lessons(), sound, tmp_path / "other", 0, picture)
