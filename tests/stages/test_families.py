"""Every family of models: reasoning SFT, two rounds and two-agent inference on a tiny random instance."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.agents import answer_with_agents, reason_prompt
from models.engines.base import Sampling, generate
from models.engines.local import LocalEngine
from models.families import FAMILIES, THOUGHTS, FamilyError, of_model, of_processor, of_type
from models.preference import PreferenceExample, PreferenceLoss, train_preference
from models.sft import train_sft
from models.training import Budget
from models.vlm import IGNORE, Conversation, Encoder, load, messages, pad, save, stack_pixels
from tests.support.tiny_families import TINY, chain, has_torchvision, picture, questions

BUDGET = Budget(epochs=1, batch_size=3, learning_rate=1e-2)
CONVERSATIONS = [
    Conversation(["square 1"], [("What is the sum of row 1?", "it is 16")]),
    Conversation(["wide 1"], [("Read.", "3 5 8"), ("Sum?", "")]),
    Conversation(["tall 1", "large 2"], [("Which is larger?", "the first"), ("Why?", "9 > 5")]),
    Conversation([], [("What is 3 + 5?", "8"), ("And 2 more?", "")]),
]


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    """processor, and model(seed)."""
    tiny = TINY[request.param]
    processor = tiny.make_processor()
    of_processor(processor).settle(processor)
    return SimpleNamespace(
        tiny=tiny, processor=processor, model=lambda seed=0: tiny.make_model(processor, seed)
    )


def weights(model: Any) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, Any], model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not bool((p.detach() == before[name]).all())}


def logits(model: Any, processor: Any, conversations: list[Conversation]) -> Any:
    """Of all tokens of a batch [rows, tokens, vocabulary]."""
    import torch

    from models.families import token_types

    encoder = Encoder(processor, picture)
    ids = pad([encoder.encode(c)[0] for c in conversations], processor.tokenizer.pad_token_id, left=False)
    pixels = stack_pixels(encoder, [c.images for c in conversations])
    with torch.inference_mode():
        return model(input_ids=ids, **token_types(processor, ids), **pixels).logits


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_are_those_of_the_processor_and_image_tokens_equal_images(family: Any, number: int) -> None:
    conversation, processor = CONVERSATIONS[number], family.processor
    text = processor.tokenizer.apply_chat_template(
        messages(conversation),
        tokenize=False,
        add_generation_prompt=not conversation.turns[-1][1],
        chat_template=processor.chat_template,
    )
    images = {"images": [[picture(name) for name in conversation.images]]} if conversation.images else {}
    expected = list(processor(text=[text], **images, add_special_tokens=False)["input_ids"][0])
    ids, labels = Encoder(processor, picture).encode(conversation)
    assert processor.tokenizer.decode(expected[len(ids) :]).strip() == "" and ids == expected[: len(ids)]
    assert ids.count(processor.image_token_id) >= 4 * len(conversation.images)
    end = processor.tokenizer.eos_token
    said = processor.tokenizer.decode([label for label in labels if label != IGNORE])
    assert said.replace(f"{end} ", end).strip() == "".join(a + end for _, a in conversation.turns if a)
    assert len(logits(family.model(), processor, [conversation])) == 1  # as many features as tokens


def test_a_prompt_and_an_answer_are_the_conversation(family: Any) -> None:
    encoder = Encoder(family.processor, picture)
    asked = questions()[0].question
    prompt = encoder.prompt(Conversation(["wide 1"], [(asked, "")]))
    whole, _ = encoder.encode(Conversation(["wide 1"], [(asked, "it is 16")]))
    assert prompt + encoder.answer_ids("it is 16") == whole
    begin = family.processor.tokenizer.bos_token_id
    if family.tiny.model_type == "llava_next":  # what the tokenizer would write stands in the template now
        assert whole[0] == begin != whole[1]


def test_rows_of_a_batch_see_their_own_images(family: Any) -> None:
    import torch

    model, rows = family.model(), [CONVERSATIONS[number] for number in (0, 2, 3)]
    together = logits(model, family.processor, rows)
    for row, found in zip(rows, together, strict=True):
        alone = logits(model, family.processor, [row])[0]
        torch.testing.assert_close(found[: len(alone)], alone, rtol=1e-3, atol=1e-4)
    other = logits(model, family.processor, [Conversation(["square 9"], rows[0].turns)])[0]
    assert not torch.allclose(other[-1], together[0][len(other) - 1])


def test_greedy_texts_are_those_of_generate_also_where_a_conversation_goes_on(family: Any) -> None:
    import torch

    from models.families import token_types

    model, processor = family.model(3), family.processor
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # texts that differ by picture
    engine = LocalEngine(model, processor, picture)
    prompts = [Conversation(c.images, [*c.turns[:-1], (c.turns[-1][0], "")]) for c in CONVERSATIONS]
    found = generate(engine, prompts, Sampling(max_new_tokens=6))
    for prompt, reply in zip(prompts, found, strict=True):
        ids = torch.tensor([engine.encoder.prompt(prompt)])
        pixels = stack_pixels(engine.encoder, [prompt.images])
        out = model.generate(
            input_ids=ids, **token_types(processor, ids), **pixels, do_sample=False, max_new_tokens=6,
            eos_token_id=engine.end,
        )  # fmt: skip
        text = processor.tokenizer.decode(out[0, ids.shape[1] :]).removesuffix(processor.tokenizer.eos_token)
        assert reply.text == text


def test_reasoning_sft_two_rounds_and_two_agents(family: Any, tmp_path: Path) -> None:
    processor, policy, asked = family.processor, family.model(), questions()
    frozen = {name for name in weights(policy) if re.match(of_model(policy).vision, name)}

    @contextmanager
    def moves_all_but_vision() -> Iterator[None]:
        before = weights(policy)
        yield
        assert frozen and moved(before, policy) == before.keys() - frozen

    def prompt(question: Any) -> Conversation:
        return reason_prompt("short", question)

    def lesson(question: Any) -> Conversation:
        return Conversation(question.images, [(prompt(question).turns[0][0], chain(question))])

    chains = [lesson(question) for question in asked]
    budget = Budget(epochs=60, batch_size=6, learning_rate=1e-2)
    with moves_all_but_vision():
        train_sft(policy, processor, chains, budget, tmp_path / "sft", 0, picture)
    summariser = copy.deepcopy(policy)
    for number in (1, 2):
        sampled = generate(
            LocalEngine(policy, processor, picture),
            [prompt(question) for question in asked],
            Sampling(max_new_tokens=8, temperature=1.0),
        )
        pairs = [
            PreferenceExample(prompt(question), chain(question), reply.text + "?")
            for question, reply in zip(asked, sampled, strict=True)
        ]
        folder, reference = tmp_path / f"r{number}", copy.deepcopy(policy)
        budget = Budget(max_steps=2, batch_size=3, learning_rate=1e-4)
        with moves_all_but_vision():
            train_preference(
                policy, reference, processor, pairs, PreferenceLoss(), budget, folder, 0, picture
            )
    reasoner, summariser = (LocalEngine(model, processor, picture) for model in (policy, summariser))
    answer = asyncio.run(answer_with_agents(reasoner, summariser, asked[0], "short", 64, 8))
    assert answer.reasoning is not None and answer.answer
    assert answer.reasoning.strip() in {chain(question) for question in asked}

    expected = logits(policy, processor, CONVERSATIONS)
    if type(processor).__name__ == "ImageOnly":
        from transformers import AutoModelForImageTextToText

        policy.save_pretrained(tmp_path / "saved")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    else:
        save(policy, processor, tmp_path / "saved")
        model, processor = load(tmp_path / "saved")
    assert bool((logits(model, processor, CONVERSATIONS) == expected).all())


def test_lora_targets_are_all_linear_layers_of_the_language_model(family: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = family.model()
    of = of_model(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name for name in linear if re.fullmatch(of.lora, name)}
    assert len(found) == 7 * model.config.get_text_config().num_hidden_layers
    outside, projectors = linear - found - {"lm_head"}, of.projectors(model)
    assert all(re.match(of.vision, name) or name.startswith(tuple(projectors)) for name in outside)
    adapted = get_peft_model(model, LoraConfig(target_modules=of.lora, modules_to_save=projectors))
    training = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in training)
    assert {
        name.split(".lora_")[0].removeprefix("base_model.model.") for name in training if "lora_" in name
    } == found


def test_thoughts_survive_the_tokenizer_and_skipped_special_tokens(family: Any) -> None:
    tokenizer = family.processor.tokenizer
    ids = Encoder(family.processor, picture).answer_ids(chain(questions()[0]))
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == chain(questions()[0])
    assert not set(THOUGHTS) & set(tokenizer.all_special_tokens)


def test_the_end_of_turn_is_found_in_the_chat_template() -> None:
    processor = TINY["llava_next"].make_processor()
    of_processor(processor).settle(processor)
    assert processor.tokenizer.eos_token == "<|eot_id|>"
    processor.chat_template = processor.chat_template.replace("<|eot_id|>", "###")
    with pytest.raises(FamilyError, match="ends an assistant's turn with '###'"):
        of_processor(processor).settle(processor)


def test_families_that_are_not_known_are_named() -> None:
    with pytest.raises(FamilyError, match=r"type 'mllama'; known: idefics3"):
        of_type("mllama")
    assert {name for f in FAMILIES for name in f.model_types} >= set(TINY)


@pytest.mark.skipif(has_torchvision(), reason="torchvision is there: processors are whole")
def test_what_needs_torchvision_is_tested_without_its_video_processor() -> None:
    kinds = {name: type(tiny.make_processor()).__name__ for name, tiny in TINY.items()}
    assert {name for name, kind in kinds.items() if kind == "ImageOnly"} == {
        "smolvlm",
        *(name for f in FAMILIES if f.needs_torchvision for name in f.model_types if name in TINY),
    }
