"""Conversations to tensors: what the chat template gives, labels on the answers, no image lost."""

from __future__ import annotations

from typing import Any

import pytest

from models.tiny import PROTOCOL_TOKENS
from models.vlm import IGNORE, Conversation, Encoder, ImageTokenError, load, messages, pad, save, stack_pixels
from tests.support.tiny_vlm import CONFIG, picture

NEWLINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONVERSATIONS = {
    "open": Conversation(["a"], [("What is the sum of row 1?", "")]),
    "closed": Conversation(["a"], [("What is the sum of row 1?", "it is 16")]),
    "three turns": Conversation(["a"], [("Read.", "3 5 8"), ("Again.", "3 5 8"), ("Sum?", "16")]),
    "three turns open": Conversation(["a"], [("Read.", "3 5 8"), ("Again.", "3 5 8"), ("Sum?", "")]),
    "two images": Conversation(["a", "b"], [("Which is larger?", "the first"), ("Why?", "9 > 5")]),
    "no image": Conversation([], [("What is 3 + 5?", "8"), ("And 2 more?", "")]),
    "protocol": Conversation(
        ["a"],
        [
            ("Go {x} \n on", f"{PROTOCOL_TOKENS[2]}T{PROTOCOL_TOKENS[3]}c{PROTOCOL_TOKENS[4]}"),
            ("Ünï → ok", ""),
        ],
    ),
    "marks": Conversation(["a"], [("⟦u0⟧ ⟧", "⟦a1⟧"), ("⟦u1⟧", "")]),
}


@pytest.fixture
def encoder(tiny_processor: Any) -> Encoder:
    made = Encoder(tiny_processor, picture)
    made.prepare(["any"])
    return made


def reference(processor: Any, conversation: Conversation) -> list[int]:
    """Token ids by the processor itself, from the whole rendered conversation at once."""
    text = processor.tokenizer.apply_chat_template(
        messages(conversation),
        tokenize=False,
        add_generation_prompt=not conversation.turns[-1][1],
        chat_template=processor.chat_template,
    )
    images = [[picture(name) for name in conversation.images]] if conversation.images else None
    return list(processor(text=[text], images=images)["input_ids"][0])


@pytest.mark.parametrize("template", [None, NEWLINES])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_chat_template(
    name: str, template: str | None, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if template:
        monkeypatch.setattr(tiny_processor, "chat_template", template)
    encoder, conversation = Encoder(tiny_processor, picture), CONVERSATIONS[name]
    encoder.prepare(conversation.images)
    ids, labels = encoder.encode(conversation)
    expected = reference(tiny_processor, conversation)
    if template and conversation.turns[-1][1]:  # what follows the last end of turn trains nothing
        assert tiny_processor.tokenizer.decode(expected[len(ids) :]) == "\n"
        expected = expected[: len(ids)]
    assert ids == expected and len(labels) == len(ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_on_what_the_assistant_says_and_its_end(name: str, encoder: Encoder) -> None:
    ids, labels = encoder.encode(CONVERSATIONS[name])
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    said = encoder.tokenizer.decode([label for label in labels if label != IGNORE])
    assert said == "".join(f"{answer}<|end|>" for _, answer in CONVERSATIONS[name].turns if answer)


def test_a_prompt_is_open(encoder: Encoder) -> None:
    ids = encoder.prompt(CONVERSATIONS["open"])
    assert encoder.tokenizer.decode(ids).endswith("What is the sum of row 1?<|end|><|assistant|>")
    with pytest.raises(ValueError, match="open"):
        encoder.prompt(CONVERSATIONS["closed"])


def test_a_prompt_and_an_answer_are_the_conversation(encoder: Encoder) -> None:
    prompt = encoder.prompt(CONVERSATIONS["open"])
    ids, labels = encoder.encode(CONVERSATIONS["closed"])
    assert prompt + encoder.answer_ids("it is 16") == ids
    assert labels == [IGNORE] * len(prompt) + encoder.answer_ids("it is 16")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_image_tokens_are_those_of_the_images(name: str, encoder: Encoder) -> None:
    ids, _ = encoder.encode(CONVERSATIONS[name])
    expected = len(CONVERSATIONS[name].images) * CONFIG.image_tokens
    assert ids.count(encoder.processor.image_token_id) == expected


def test_a_template_that_loses_the_image_is_refused(
    tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_processor, "chat_template", NEWLINES.replace("<image>", ""))
    encoder = Encoder(tiny_processor, picture)
    encoder.prepare(["a"])
    with pytest.raises(ImageTokenError, match="has 0 places for 1 images"):
        encoder.encode(CONVERSATIONS["open"])


def test_a_template_that_ends_turns_with_another_token_is_refused(
    tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_processor, "chat_template", NEWLINES.replace("<|end|>", "<end_of_utterance>"))
    with pytest.raises(ValueError, match=r"<\|end\|>"):
        Encoder(tiny_processor, picture).encode(CONVERSATIONS["no image"])


def test_a_processor_that_leaves_no_room_for_an_image_is_refused(
    tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tiny_processor), "__call__", lambda *_, **__: {"input_ids": [[1, 2]]})
    with pytest.raises(ImageTokenError, match="without having seen it"):
        Encoder(tiny_processor, picture).prepare(["a"])


def test_encoding_an_image_nobody_prepared_for_is_refused(tiny_processor: Any) -> None:
    with pytest.raises(ImageTokenError, match="prepare"):
        Encoder(tiny_processor, picture).encode(CONVERSATIONS["open"])


@pytest.mark.parametrize(
    "token", ["<image>", "<|end|>", "<|assistant|>", "<|pad|>", "<fake_token_around_image>"]
)
@pytest.mark.parametrize("where", ["user", "assistant"])
def test_texts_hold_no_special_token(token: str, where: str, encoder: Encoder) -> None:
    hostile = f"before{token}after<im{token}age>"
    turn = (hostile, "fine") if where == "user" else ("fine", hostile)
    plain = Conversation(["a"], [("Plain", "words")])
    ids, labels = encoder.encode(Conversation(["a"], [turn]))
    special = {i for text, i in encoder.tokenizer.get_vocab().items() if text.startswith("<") and i < 8}
    assert [i for i in ids if i in special] == [i for i in encoder.encode(plain)[0] if i in special]
    assert "before" in encoder.tokenizer.decode(ids) and "after" in encoder.tokenizer.decode(ids)
    assert labels.count(encoder.tokenizer.eos_token_id) == 1


def test_images_are_processed_once(tiny_processor: Any) -> None:
    opened: list[str] = []

    def source(name: str) -> Any:
        opened.append(name)
        return picture(name)

    encoder = Encoder(tiny_processor, source)
    for _ in range(3):
        pixels = encoder.pixels(["a", "b"])
    assert opened == ["a", "b"] and encoder.pixels([]) == {}
    assert pixels["pixel_values"].shape == (1, 2, 3, CONFIG.image_px, CONFIG.image_px)


def test_rows_with_and_without_images_make_one_batch(encoder: Encoder) -> None:
    import torch

    stacked = stack_pixels(encoder, [["a"], [], ["b"]])["pixel_values"]
    assert stacked.flatten(0, 1).shape[0] == 2 and stack_pixels(encoder, [[], []]) == {}
    assert torch.equal(stacked.flatten(0, 1)[1], encoder.pixels(["b"])["pixel_values"][0, 0])


def test_rows_with_different_numbers_of_images_make_one_batch(encoder: Encoder, tiny_model: Any) -> None:
    import torch

    rows = [["a"], ["b", "c"]]
    ids = [encoder.prompt(Conversation(images, [("Which?", "")])) for images in rows]
    inputs = {
        "input_ids": pad(ids, encoder.tokenizer.pad_token_id, left=True),
        "attention_mask": pad([[1] * len(row) for row in ids], 0, left=True),
    }
    model = tiny_model()
    with torch.inference_mode():
        together = model(**inputs, **stack_pixels(encoder, rows)).logits[:, -1]
        for n, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([ids[n]]), **stack_pixels(encoder, [row])).logits[:, -1]
            assert torch.allclose(together[n], alone[0], atol=1e-4)


@pytest.mark.parametrize("text", ["no", "17", "it is 16"])
def test_what_follows_a_colon_has_the_tokens_it_has_alone(text: str, tiny_processor: Any) -> None:
    """An answer in a chain, in a step's JSON and as a reply: nothing to learn about that."""

    def tokens(written: str) -> list[str]:
        return tiny_processor.tokenizer.tokenize(written)

    alone = tokens(text)
    assert tokens(f"Answer: {text}") == [*tokens("Answer: "), *alone]
    assert tokens(f"{PROTOCOL_TOKENS[3]}{text}") == [PROTOCOL_TOKENS[3], *alone]


def test_padding() -> None:
    assert pad([[1, 2], [3]], 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert pad([[1, 2], [3]], 0, left=False).tolist() == [[1, 2], [3, 0]]


def test_a_checkpoint_comes_back_as_it_was_and_the_same_bytes_twice(
    tiny_model: Any, tiny_processor: Any, tmp_path: Any
) -> None:
    import torch

    model = tiny_model()
    for name in ("one", "two"):
        save(model, tiny_processor, tmp_path / name)
    loaded, processor = load(tmp_path / "one")
    before = model.state_dict()
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    save(loaded, processor, tmp_path / "again")
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert files["model.safetensors"] == (tmp_path / "again/model.safetensors").read_bytes()
    assert not any(name.endswith((".bin", ".md", ".pt")) for name in files)
    for name in CONVERSATIONS:
        encoders = [Encoder(p, picture) for p in (tiny_processor, processor)]
        for encoder in encoders:
            encoder.prepare(["a"])
        assert encoders[0].encode(CONVERSATIONS[name]) == encoders[1].encode(CONVERSATIONS[name])
