"""Training: what is to move moves and nothing else, empty runs fail, resumed == uninterrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.batches import LengthBuckets, bucketed
from models.encoded import CHUNK, encoded
from models.guard import Guard, TrainingError
from models.muon import ITERATIONS, NEWTON_SCHULZ, orthogonalised
from models.pairs import PreferenceCollator, PreferenceExample, encode_pairs
from models.preference import PreferenceLoss, train_preference
from models.sft import SftCollator, encode_rows, train_sft
from models.training import Budget, arguments, freeze_vision
from models.vlm import Conversation, Encoder
from tests.support.tiny_vlm import lessons, pairs, picture

BUDGET = Budget(epochs=2, batch_size=4, learning_rate=1e-3, save_steps=2)
PAIRS = pairs(6)


def weights(model: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, Any], model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not bool((p.detach() == before[name]).all())}


def same(one: Any, other: Any) -> bool:
    return not moved(weights(one), other)


def in_vision(name: str) -> bool:
    return ".vision_model." in name


@pytest.fixture
def sft(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> Any:
    """sft(budget, conversations, model, folder, report): one run on the lessons, unless told otherwise."""

    def train(
        budget: Budget = BUDGET,
        conversations: Any = None,
        model: Any = None,
        folder: str = "steps",
        report: Any = None,
    ) -> tuple[Any, dict[str, float]]:
        model = model if model is not None else tiny_model()
        data = lessons() if conversations is None else conversations
        return model, train_sft(
            model, tiny_processor, data, budget, tmp_path / folder, 7, picture, report=report
        )

    return train


@pytest.fixture
def dpo(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> Any:
    """dpo(budget, pairs, loss): one run of preference training from a random policy."""

    def train(
        budget: Budget = BUDGET,
        pairs: Any = PAIRS,
        loss: PreferenceLoss | None = None,
        folder: str = "steps",
        report: Any = None,
    ) -> tuple[Any, dict[str, float]]:
        model, reference = tiny_model(), tiny_model()
        before = weights(reference)
        numbers = train_preference(
            model,
            reference,
            tiny_processor,
            pairs,
            loss or PreferenceLoss(),
            budget,
            tmp_path / folder,
            7,
            picture,
            report=report,
        )
        assert not moved(before, reference)
        return model, numbers

    return train


def test_sft_moves_all_that_trains_and_nothing_that_is_frozen(
    sft: Any, tiny_model: Any, tmp_path: Path
) -> None:
    before = weights(tiny_model())
    model, numbers = sft(replace(BUDGET, epochs=8))
    assert moved(before, model) == {name for name in before if not in_vision(name)}
    assert numbers["steps"] == 24 and numbers["examples"] == 12 and numbers["too_long"] == 0
    assert numbers["last_loss"] < numbers["first_loss"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "steps").exists() and model.config.use_cache


def test_muon_moves_all_that_trains_and_nothing_that_is_frozen(sft: Any, tiny_model: Any) -> None:
    before = weights(tiny_model())
    model, _ = sft(replace(BUDGET, optimizer="muon", max_steps=1))
    assert moved(before, model) == {name for name in before if not in_vision(name)}


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_newton_schulz_brings_every_singular_value_near_one(shape: tuple[int, int]) -> None:
    import torch

    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    for before, after in zip(matrices, orthogonalised(matrices), strict=True):
        assert after.shape == before.shape
        values = torch.linalg.svdvals(after)
        assert 0.5 < float(values.median()) < 1.3 and float(values.max()) < 1.4
        assert float((before * after).sum()) > 0


def test_newton_schulz_on_the_gram_matrix_is_newton_schulz() -> None:
    import torch

    torch.manual_seed(0)
    matrices = torch.randn(3, 32, 96) * torch.rand(3, 32, 1)
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalised(matrices), x, rtol=1e-3, atol=1e-4)


def test_padding_changes_no_row_of_a_batch(tiny_model: Any, tiny_processor: Any) -> None:
    import torch

    encoder = Encoder(tiny_processor, picture)
    rows, _ = encode_rows(encoder, lessons(4), 512)
    assert len({row["length"] for row in rows}) > 1
    collate, model = SftCollator(encoder), tiny_model()
    with torch.no_grad():
        together = model(**collate(rows)).logits
        for row, logits in zip(rows, together, strict=True):
            alone = model(**collate([row])).logits[0]
            torch.testing.assert_close(logits[: row["length"]], alone, rtol=1e-4, atol=1e-5)


def test_rows_on_disk_are_those_that_were_encoded(tiny_processor: Any, tmp_path: Path) -> None:
    """More than are encoded at a time, of which the first have no pictures, some too long."""
    encoder = Encoder(tiny_processor, picture)
    long = Conversation([], [("Tell me", "a word " * 100)])
    conversations = [Conversation([], lesson.turns) for lesson in lessons(CHUNK)] + [long] + lessons(4)
    rows, too_long = encoded(encode_rows, encoder, conversations, 128, tmp_path)
    expected, _ = encode_rows(encoder, conversations, 128)
    assert too_long == 1 and len(rows) == CHUNK + 4
    assert list(rows) == expected
    assert rows.cache_files, "mapped from a file, not held in memory"
    assert encoded(encode_rows, encoder, [long], 128, tmp_path)[1] == 1


def test_vision_trains_when_told_to(sft: Any, tiny_model: Any) -> None:
    before = weights(tiny_model())
    model, _ = sft(replace(BUDGET, train_vision=True))
    assert moved(before, model) >= {name for name in before if not name.endswith("bias")}


def test_the_same_seed_gives_the_same_weights(sft: Any) -> None:
    assert same(sft(folder="one")[0], sft(folder="two")[0])


def test_conversations_without_an_answer_fail(sft: Any) -> None:
    silent = [Conversation(c.images, [(c.turns[0][0], "")]) for c in lessons()]
    with pytest.raises(TrainingError, match="gradients were zero"):
        sft(conversations=silent)


@pytest.mark.parametrize(
    ("budget", "conversations", "advice"),
    [
        (BUDGET, [], "nothing to train on: 0 conversations"),
        (replace(BUDGET, max_tokens=5), None, "nothing to train on: 12 conversations, 12 longer than 5"),
        (replace(BUDGET, learning_rate=0.0), None, "learning rate zero"),
    ],
)
def test_a_run_that_trains_nothing_fails(sft: Any, budget: Budget, conversations: Any, advice: str) -> None:
    with pytest.raises(TrainingError, match=advice):
        sft(budget, conversations)


def test_conversations_that_are_too_long_are_left_out_and_counted(sft: Any) -> None:
    long = Conversation(["x"], [("What is the sum of row 1?", "and more " * 200)])
    _, numbers = sft(replace(BUDGET, max_tokens=150), [*lessons(), long])
    assert numbers["examples"] == 12 and numbers["too_long"] == 1


def test_one_step_is_a_step(sft: Any) -> None:
    """Warm-up never eats the whole of a short run."""
    _, numbers = sft(replace(BUDGET, epochs=1, batch_size=16))
    assert numbers["steps"] == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40, 1000])
def test_warm_up_leaves_a_step_of_full_rate(steps: int, tmp_path: Path) -> None:
    given = arguments(replace(BUDGET, epochs=1, batch_size=1), tmp_path, 0, steps)
    assert given["warmup_steps"] == min(steps - 1, -(-steps // 20))


def test_weights_that_are_not_finite_fail(sft: Any, tiny_model: Any) -> None:
    broken = tiny_model()
    broken.get_input_embeddings().weight.data[20:] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite|is nan"):
        sft(model=broken)


def test_a_rate_that_blows_up_fails(sft: Any) -> None:
    with pytest.raises(TrainingError, match=r"not finite|is nan|is inf"):
        sft(replace(BUDGET, learning_rate=1e30, max_grad_norm=1e30, warmup=0.0))


def test_the_guard_sees_a_nan_that_no_log_has_shown(tiny_model: Any) -> None:
    model = tiny_model()
    guard = Guard(model)
    for parameter in model.parameters():
        parameter.data.add_(1e-3)
    guard.finish(model, 1)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        guard.finish(model, 1)


def test_the_guard_names_a_tensor_that_stayed(tiny_model: Any) -> None:
    model = tiny_model()
    guard = Guard(model)
    for name, parameter in model.named_parameters():
        if "connector" not in name:
            parameter.data.add_(1e-3)
    with pytest.raises(TrainingError, match=r"connector.*freeze them"):
        guard.finish(model, 1)
    with pytest.raises(TrainingError, match="no training step"):
        guard.finish(model, 0)
    guard.norms = [0.0]
    with pytest.raises(TrainingError, match="gradients were zero"):
        guard.finish(model, 1)


class Killed(BaseException):
    """Nothing catches it, like a signal."""


def kill_at(step: int) -> Any:
    def report(numbers: dict[str, float], at: int, steps: int) -> None:
        if at >= step:
            raise Killed

    return report


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(sft: Any, name: Any) -> None:
    """Six steps, three an epoch, a checkpoint every two: killed before the first, and later twice."""
    budget = replace(BUDGET, optimizer=name)
    whole, numbers = sft(budget, folder="whole")
    for at in (1, 3, 5):
        with pytest.raises(Killed):
            sft(budget, folder=f"killed {at}", report=kill_at(at))
        seen: list[int] = []
        resumed, again = sft(
            budget,
            folder=f"killed {at}",
            report=lambda n, step, steps: seen.append(step),  # noqa: B023
        )
        assert seen[0] == at  # it went on from checkpoint 2 or 4
        assert same(whole, resumed) and again == numbers


def test_numbers_do_not_depend_on_a_kill_between_two_logs(sft: Any) -> None:
    """100 steps log every second one: a checkpoint at step 99 would split the last mean."""
    budget = Budget(max_steps=100, batch_size=1, learning_rate=1e-3, save_steps=33)
    few = lessons(4, 1)
    whole, numbers = sft(budget, few, folder="whole")
    with pytest.raises(Killed):
        sft(budget, few, folder="killed", report=kill_at(100))
    resumed, again = sft(budget, few, folder="killed")
    assert same(whole, resumed) and again == numbers


def test_a_checkpoint_cut_off_by_a_kill_is_passed_over(sft: Any, tmp_path: Path) -> None:
    whole, numbers = sft(folder="whole")
    with pytest.raises(Killed):
        sft(folder="killed", report=kill_at(3))
    half = tmp_path / "killed/checkpoint-4"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").write_text('{"global_st')
    resumed, again = sft(folder="killed")
    assert same(whole, resumed) and again == numbers


def test_the_loss_falls_on_what_it_learns_by_heart(sft: Any) -> None:
    _, numbers = sft(replace(BUDGET, max_steps=30, learning_rate=5e-3), lessons(4, 1))
    assert numbers["last_loss"] < 0.5 * numbers["first_loss"]


def plain_sft(model: Any, processor: Any, budget: Budget, folder: Path) -> list[float]:
    """Losses of TRL's own trainer on rows that are padded, in its own order."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    encoder = Encoder(processor, picture)
    rows, _ = encode_rows(encoder, lessons(), budget.max_tokens)
    freeze_vision(model)

    def collate(some: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in SftCollator(encoder)(some).items() if name != "image_ids"}

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(budget, folder, 7, len(rows)), dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        data_collator=collate,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_steps_in_parts_have_the_losses_of_plain_trl(
    sft: Any, tiny_model: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    """The same rows a step in the same order, four at a time there, in parts of at most 90 tokens here."""
    budget, losses = replace(BUDGET, batch_size=2, accumulate=2, epochs=4), []
    theirs = plain_sft(tiny_model(), tiny_processor, budget, tmp_path / "plain")
    _, numbers = sft(replace(budget, batch_tokens=90), report=lambda n, step, steps: losses.append(n["loss"]))
    assert numbers["steps"] == len(theirs) == len(losses) == 12
    assert losses == pytest.approx(theirs, abs=1e-5) and losses[0] - losses[-1] > 1e-2


def test_a_killed_run_in_parts_ends_with_the_same_bits(sft: Any) -> None:
    budget = replace(BUDGET, batch_size=2, accumulate=2, batch_tokens=90)
    whole, numbers = sft(budget, folder="whole")
    with pytest.raises(Killed):
        sft(budget, folder="killed", report=kill_at(3))
    resumed, again = sft(budget, folder="killed")
    assert same(whole, resumed) and numbers == again


@pytest.mark.parametrize("loss", [PreferenceLoss(), PreferenceLoss(["sigmoid"], [1.0])], ids=["mpo", "dpo"])
def test_preference_training_moves_all_that_trains(dpo: Any, tiny_model: Any, loss: PreferenceLoss) -> None:
    before = weights(tiny_model())
    model, numbers = dpo(replace(BUDGET, epochs=4), loss=loss)
    assert moved(before, model) == {name for name in before if not in_vision(name)}
    assert numbers["pairs"] == 6 and numbers["steps"] == 8
    assert numbers["implicit_reward_margin"] > 0 and numbers["implicit_reward_accuracy"] == 1


def test_one_preference_step_is_a_step(dpo: Any) -> None:
    _, numbers = dpo(Budget(epochs=1, batch_size=16, learning_rate=5e-7))
    assert numbers["steps"] == 1


def test_no_pairs_fail_with_advice(dpo: Any) -> None:
    with pytest.raises(TrainingError, match=r"no preference pairs.*raise the temperature"):
        dpo(pairs=[])
    with pytest.raises(TrainingError, match=r"6 given, 6 too long"):
        dpo(replace(BUDGET, max_tokens=5))


def test_a_preference_run_at_rate_zero_fails(dpo: Any) -> None:
    with pytest.raises(TrainingError, match="learning rate zero"):
        dpo(replace(BUDGET, learning_rate=0.0))


def test_killed_preference_training_ends_with_the_same_bits(dpo: Any) -> None:
    budget = replace(BUDGET, epochs=2)
    whole, numbers = dpo(budget, folder="whole")
    with pytest.raises(Killed):
        dpo(budget, folder="killed", report=kill_at(3))
    resumed, again = dpo(budget, folder="killed")
    assert same(whole, resumed) and again == numbers


def test_pictures_reach_the_preference_loss(dpo: Any) -> None:
    shuffled = [replace(pair, prompt=Conversation(["other"], pair.prompt.turns)) for pair in PAIRS]
    budget = replace(BUDGET, max_steps=2)
    assert not same(dpo(budget, folder="one")[0], dpo(budget, pairs=shuffled, folder="two")[0])


def test_the_chosen_side_wins(dpo: Any, tiny_model: Any, tiny_processor: Any) -> None:
    """Measured without the trainer: chosen gains on rejected against the reference."""
    import torch

    from models.vlm import Encoder

    encoder = Encoder(tiny_processor, picture)
    encoder.prepare(["any"])

    def log_probability(model: Any, pair: PreferenceExample, text: str) -> float:
        prompt, said = encoder.prompt(pair.prompt), encoder.answer_ids(text)
        with torch.inference_mode():
            ids = torch.tensor([prompt + said])
            logits = model(input_ids=ids, **encoder.pixels(pair.prompt.images)).logits[
                0, len(prompt) - 1 : -1
            ]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum())

    def margin(model: Any) -> float:
        return sum(log_probability(model, p, p.chosen) - log_probability(model, p, p.rejected) for p in PAIRS)

    for loss in (PreferenceLoss(["sigmoid"], [1.0]), PreferenceLoss()):
        model, _ = dpo(loss=loss)
        assert margin(model.eval()) > margin(tiny_model()) + 1


def test_a_shared_beginning_is_read_and_not_trained_on(tiny_processor: Any) -> None:
    encoder = Encoder(tiny_processor, picture)
    whole = PreferenceExample(PAIRS[0].prompt, "row 1 is 3\nsum is 3", "row 1 is 3\nsum is 4 or more")
    cut = replace(
        whole, prefix="row 1 is 3\n", chosen="sum is 3", rejected="sum is 4\n", rejected_goes_on=True
    )
    (row, other), _ = encode_pairs(encoder, [cut, whole], 1000)
    prompt, end = encoder.prompt(PAIRS[0].prompt), encoder.tokenizer.eos_token_id
    assert row["prompt"] + row["chosen"] == other["prompt"] + other["chosen"]
    assert row["prompt"][: len(prompt)] == prompt and len(row["prompt"]) > len(prompt)
    assert row["chosen"][-1] == end and end not in row["rejected"]
    trained = PreferenceCollator(encoder)([row])["completion_mask"].sum(1).tolist()
    assert trained == [len(row["chosen"]), len(row["rejected"])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"learning_rate": 0.0}, "learning rate zero"), ({"learning_rate": 1e30}, "not finite|is nan|is inf"),
     ({"steps": 0}, "trains nothing")],
)  # fmt: skip
def test_vision_pretraining_that_teaches_nothing_fails(
    tiny_model: Any, settings: dict[str, Any], message: str
) -> None:
    import torch

    from models.alignment import Alignment, align_vision

    model = tiny_model()
    vision = model.config.vision_config
    cells = (vision.image_size // vision.patch_size // model.config.scale_factor) ** 2
    images = torch.randn(6, 3, vision.image_size, vision.image_size)
    digits = torch.arange(6 * cells).reshape(6, cells) % 10
    with pytest.raises(TrainingError, match=message):
        align_vision(
            model, lambda chosen: images[chosen], digits, replace(Alignment(3, 2), **settings), seed=0
        )


def test_an_encoder_that_has_met_the_pictures_opens_none_again(
    tiny_model: Any, tiny_processor: Any, tmp_path: Path
) -> None:
    from models.vlm import Encoder

    opened: list[str] = []

    def noted(name: str) -> Any:
        opened.append(name)
        return picture(name)

    encoder, models = Encoder(tiny_processor, noted), [tiny_model(), tiny_model()]
    seen = []
    for number, model in enumerate(models):
        train_sft(model, tiny_processor, lessons(), BUDGET, tmp_path / str(number), 0, encoder)
        seen.append(len(opened))
    assert same(*models) and 0 < seen[0] == seen[1]


def test_batches_hold_rows_of_like_length_and_every_epoch_has_its_own_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(20, 300, size=403)]
    sampler = LengthBuckets(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(403)) and len(sampler) == 403
    batches = [[lengths[i] for i in first[start : start + 8]] for start in range(0, 403, 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and list(sampler) == second
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_batch_of_short_rows_weighs_its_tokens_as_any_other() -> None:
    """The loss of a batch is divided by the tokens to be expected of its rows, not by its own."""
    import torch

    class Plain:
        args = SimpleNamespace(average_tokens_across_devices=False)
        accelerator = SimpleNamespace(num_processes=1)

        def get_batch_samples(self, batches: list[Any]) -> tuple[list[Any], Any]:
            return batches, torch.tensor(sum(int((b["labels"] != -100).sum()) for b in batches))

    labels = torch.tensor([[-100, 1, 2, 3, 4], [-100, -100, 1, 2, 3]])
    batch = {"input_ids": torch.zeros(2, 5), "labels": labels}
    assert bucketed(Plain)().get_batch_samples([batch])[1] == 7
    calibrated = bucketed(Plain, tokens_per_row=40.0)()
    assert calibrated.get_batch_samples([batch])[1] == 80
    assert calibrated.get_batch_samples([batch, batch])[1] == 160
