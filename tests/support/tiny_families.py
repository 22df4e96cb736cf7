"""A tiny random model of every family, from its own config class, with a processor and its chat format.

    from tests.support.tiny_families import TINY
    model, processor = TINY["llava_next"].build()

Processors are the families' own on PIL's image processors. Those of Qwen and SmolVLM2 also want a video
processor, which needs torchvision: `image_only` makes them without.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.reasoning import thoughts
from models.records import Question, Step

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
IMAGE_PX, PATCH_PX = 32, 8
SIZES = {"square": (32, 32), "wide": (64, 32), "tall": (32, 48), "large": (64, 64)}


@dataclass(frozen=True)
class Tiny:
    """special: tokens of the family, the padding token first and the end of text second; template: the form
    of its chat template; processor: made with a tokenizer; config: made with a processor."""

    model_type: str
    special: tuple[str, ...]
    template: str
    processor: Callable[[Any], Any]
    config: Callable[[Any], Any]

    def make_processor(self) -> Any:
        """The processor with a tokenizer that knows the lessons' words; not settled."""
        texts = [text for q in questions() for text in (q.question, q.answer, chain(q))]
        tokenizer = _tokenizer(texts)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.pad_token, tokenizer.eos_token = self.special[:2]
        tokenizer.chat_template = self.template
        processor = self.processor(tokenizer)
        processor.chat_template = self.template
        return processor

    def make_model(self, processor: Any, seed: int = 0) -> Any:
        """A random model in eval mode."""
        import torch
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(self.config(processor)).eval()


def _tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE with GPT-2's words, which begin with their space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def questions(count: int = 6) -> list[Question]:
    """Questions about pictures of several sizes."""
    return [
        Question(f"q{n}", [f"{size} {n}"], f"What is the sum of row {n % 3 + 1}?", str(7 + n))
        for n, size in zip(range(count), [*SIZES] * count, strict=False)
    ]


def chain(question: Question) -> str:
    """A chain that answers a question."""
    said = f"The answer is {question.answer}."
    return thoughts([Step("Read the row", "It is 3 5 8."), Step("Answer", said, "final_answer")])


def picture(name: str) -> Any:
    """A picture by name, whose first word is a key of SIZES: noise that the name fixes."""
    import numpy as np
    from PIL import Image

    width, height = SIZES.get(name.split()[0], (32, 32))
    noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, size=(height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


def _common(processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return TEXT | special | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.eos_token_id}


def image_only(cls: type, images: Any, tokenizer: Any, **attributes: Any) -> Any:
    """A processor of a class that would also want a video processor, for images alone."""
    from transformers import ProcessorMixin

    class ImageOnly(cls):  # type: ignore[misc]
        def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
            ProcessorMixin.__init__(self, image_processor, tokenizer)
            for name, value in attributes.items():
                setattr(self, name, value)

    return ImageOnly(images, tokenizer)


def _idefics3_images(cls: type) -> Any:
    return cls(
        do_image_splitting=True,
        size={"longest_edge": 2 * IMAGE_PX},
        max_image_size={"longest_edge": IMAGE_PX},
    )


def _idefics3_processor(tokenizer: Any) -> Any:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    return Idefics3Processor(
        _idefics3_images(Idefics3ImageProcessorPil), tokenizer, image_seq_len=(IMAGE_PX // PATCH_PX // 2) ** 2
    )


def _smolvlm_processor(tokenizer: Any) -> Any:
    from transformers import SmolVLMImageProcessorPil, SmolVLMProcessor

    names = {
        "image_token": "<image>",
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "video_token": "<video>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_seq_len": (IMAGE_PX // PATCH_PX // 2) ** 2,
    }
    return image_only(SmolVLMProcessor, _idefics3_images(SmolVLMImageProcessorPil), tokenizer, **names)


def _idefics3_config(kind: str) -> Callable[[Any], Any]:
    def config(processor: Any) -> Any:
        from transformers import CONFIG_MAPPING

        vision = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_PX,
            "patch_size": PATCH_PX,
        }
        return CONFIG_MAPPING[kind](
            text_config=_common(processor) | {"model_type": "llama"},
            vision_config=vision,
            scale_factor=2,
            image_token_id=processor.image_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )

    return config


def _llava_next_processor(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    tokenizer.bos_token = "<|begin_of_text|>"  # written by the tokenizer, as Llama 3's does
    begin = ("<|begin_of_text|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    side = IMAGE_PX
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
    )
    return LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next_config(processor: Any) -> Any:
    from transformers import LlavaNextConfig

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_PX,
        "patch_size": PATCH_PX,
        "projection_dim": 16,
    }
    return LlavaNextConfig(
        text_config=_common(processor) | {"model_type": "llama"},
        vision_config=vision,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _qwen_processor(kind: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        patch = 16 if kind == "Qwen3VLProcessor" else 14
        size = {"shortest_edge": 16 * patch**2, "longest_edge": 64 * patch**2}
        images = transformers.Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)
        cls = getattr(transformers, kind)
        if has_torchvision():
            video = transformers.Qwen2VLVideoProcessor
            if kind == "Qwen3VLProcessor":
                video = transformers.Qwen3VLVideoProcessor
            return cls(images, tokenizer, video())
        names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
        return image_only(cls, images, tokenizer, **names, **ids)

    return make


def _qwen_config(kind: str) -> Callable[[Any], Any]:
    def config(processor: Any) -> Any:
        from transformers import CONFIG_MAPPING

        vision: dict[str, Any] = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
        vision["intermediate_size"] = 24
        if kind == "qwen3_vl":
            vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64, "patch_size": 16}
        else:
            vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        return CONFIG_MAPPING[kind](
            text_config=_common(processor) | {"rope_parameters": rope},
            vision_config=vision,
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            vision_start_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )

    return config


def has_torchvision() -> bool:
    """Whether the processors that need it can be built."""
    from transformers.utils import is_torchvision_available

    return bool(is_torchvision_available())


_PARTS = (
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"
)
_IDEFICS3 = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}"
    + _PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    + _PARTS.replace("IMAGE", "<image>\n")
    + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + _PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_IDEFICS3_TOKENS = (
    "<|im_end|>",
    "<end_of_utterance>",
    "<|im_start|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *_TILES,
)
_QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_LLAMA3_TOKENS = (
    "<pad>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<image>",
)
TINY = {
    tiny.model_type: tiny
    for tiny in (
        Tiny("idefics3", _IDEFICS3_TOKENS, _IDEFICS3, _idefics3_processor, _idefics3_config("idefics3")),
        Tiny("smolvlm", _IDEFICS3_TOKENS, _IDEFICS3, _smolvlm_processor, _idefics3_config("smolvlm")),
        Tiny("llava_next", _LLAMA3_TOKENS, _LLAMA3, _llava_next_processor, _llava_next_config),
        Tiny(
            "qwen2_5_vl",
            _QWEN_TOKENS,
            _CHATML,
            _qwen_processor("Qwen2_5_VLProcessor"),
            _qwen_config("qwen2_5_vl"),
        ),
        Tiny(
            "qwen3_vl", _QWEN_TOKENS, _CHATML, _qwen_processor("Qwen3VLProcessor"), _qwen_config("qwen3_vl")
        ),
    )
}
