"""Families of vision-language models: what training and decoding must know of each, in one place.

    from models.families import of_model
    family = of_model(model)
    family.freeze_vision(model)

A family is known by the `model_type` of its config and the class of its processor. What a checkpoint says
itself (chat template, image token, sizes) is asked of the checkpoint. To add a family: an entry in FAMILIES,
and a tiny instance in tests/support/tiny_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

THOUGHTS = ("<thoughts>", "</thoughts>")
"""The marks of a chain (METHOD 1.5). They are text to a pretrained model: no new embedding has to be learnt,
and they stay when special tokens are skipped."""
_ANSWER = "\u27e6answer\u27e7"


class FamilyError(ValueError):
    """A model of a family that is not known, or a checkpoint that is not as its family is."""


@dataclass(frozen=True)
class Family:
    """vision, projector and lora are regular expressions of names. vision: the beginning of the weights of
    the vision tower, which stay frozen (METHOD 1.4). projector: the modules from vision to language, trained
    whole, beside adapters too. lora: the modules that take adapters (peft's `target_modules`): all linear
    layers of the language model.

    end_of_turn: tokens that may end an assistant's turn where the tokenizer's end of text does not.
    one_length: whether a processor gives every image the same tokens whatever its size.
    spatial_positions: a token's position has three parts, time, row and column (M-RoPE, arXiv 2409.12191).
    needs_torchvision: its processor cannot be loaded without.
    """

    name: str
    model_types: tuple[str, ...]
    processors: tuple[str, ...]
    vision: str
    projector: str
    lora: str
    end_of_turn: tuple[str, ...]
    one_length: Callable[[Any], bool] = lambda processor: False
    spatial_positions: bool = False
    needs_torchvision: bool = False

    def freeze_vision(self, model: PreTrainedModel) -> list[str]:
        """Freeze the vision tower, not the projector; the names of its weights.

        Raises FamilyError if there are none.
        """
        frozen = self.vision_names(model)
        if not frozen:
            raise FamilyError(f"no weight of {type(model).__name__} has a name like {self.vision}")
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        return frozen

    def vision_names(self, model: PreTrainedModel) -> list[str]:
        """The names of the vision tower's weights. peft puts its own names before them."""
        pattern = re.compile(rf"(^|\.){self.vision}")
        return [name for name, _ in model.named_parameters() if pattern.search(name)]

    def projectors(self, model: PreTrainedModel) -> list[str]:
        """The names of the projector's modules (peft's `modules_to_save`)."""
        return [name for name, _ in model.named_modules() if re.fullmatch(self.projector, name)]

    def settle(self, processor: ProcessorMixin) -> None:
        """Bring a processor to the one form that the rest reads: the end token ends the assistant's turns,
        the chat template writes the begin token, there is a padding token. Saved, a checkpoint has this form:
        a server reads prompts as training did.

        Raises FamilyError where a processor cannot be brought to it.
        """
        tokenizer = processor.tokenizer
        tokenizer.eos_token = self._end_of_turn(processor)
        if tokenizer.pad_token is None:
            raise FamilyError(f"the tokenizer of this {self.name} has no padding token")
        begin = tokenizer.bos_token
        writes_begin = begin and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        if writes_begin and not _rendered(processor).startswith(begin):
            processor.chat_template = "{{ bos_token }}" + processor.chat_template
        for mark in THOUGHTS:
            ids = tokenizer.encode(mark, add_special_tokens=False)
            if tokenizer.decode(ids, skip_special_tokens=True) != mark:
                raise FamilyError(f"{mark} is lost by the tokenizer of this {self.name}")

    def _end_of_turn(self, processor: ProcessorMixin) -> str:
        ends = processor.tokenizer.eos_token, *self.end_of_turn
        after = _rendered(processor).partition(_ANSWER)[2]
        for end in ends:
            if end and after.startswith(end):
                return end
        known = ", ".join(end for end in ends if end)
        raise FamilyError(f"the chat template ends an assistant's turn with {after[:20]!r}, not with {known}")


def _rendered(processor: ProcessorMixin) -> str:
    """A conversation of one answered turn, by the chat template."""
    chat = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "question"), ("assistant", _ANSWER))
    ]
    return str(
        processor.tokenizer.apply_chat_template(chat, tokenize=False, chat_template=processor.chat_template)
    )


def _unsplit(processor: Any) -> bool:
    return not processor.image_processor.do_image_splitting


FAMILIES = (
    Family(  # the embedded model, SmolVLM-256M and -500M; SmolVLM2 has a config of its own
        name="Idefics3",
        model_types=("idefics3", "smolvlm"),
        processors=("Idefics3Processor", "SmolVLMProcessor"),
        vision=r"model\.vision_model\.",
        projector=r"model\.connector",
        lora=r"model\.text_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        end_of_turn=("<end_of_utterance>",),
        one_length=_unsplit,
    ),
    Family(
        name="LLaVA-NeXT",
        model_types=("llava_next",),
        processors=("LlavaNextProcessor",),
        vision=r"model\.vision_tower\.",
        projector=r"model\.multi_modal_projector",
        lora=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        end_of_turn=("<|eot_id|>", "<|im_end|>", "</s>"),
    ),
    Family(
        name="Qwen2.5-VL",
        model_types=("qwen2_vl", "qwen2_5_vl"),
        processors=("Qwen2VLProcessor", "Qwen2_5_VLProcessor"),
        vision=r"model\.visual\.(?!merger\.)",
        projector=r"model\.visual\.merger",
        lora=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        end_of_turn=("<|im_end|>",),
        spatial_positions=True,
        needs_torchvision=True,
    ),
    Family(
        name="Qwen3-VL",
        model_types=("qwen3_vl",),
        processors=("Qwen3VLProcessor",),
        vision=r"model\.visual\.(?!merger\.|deepstack_merger_list\.)",
        projector=r"model\.visual\.(merger|deepstack_merger_list\.\d+)",
        lora=r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        end_of_turn=("<|im_end|>",),
        spatial_positions=True,
        needs_torchvision=True,
    ),
)


def of_model(model: PreTrainedModel) -> Family:
    """The family of a model. FamilyError names the known ones."""
    return of_type(model.config.model_type)


def of_type(model_type: str) -> Family:
    """The family of a config's `model_type`. FamilyError names the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise FamilyError(f"models/families.py has no family of type {model_type!r}; known: {known}")


def of_processor(processor: ProcessorMixin) -> Family:
    """The family of a processor. FamilyError names the known ones."""
    classes = {cls.__name__ for cls in type(processor).__mro__}
    for family in FAMILIES:
        if classes & set(family.processors):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.processors)
    raise FamilyError(f"models/families.py has no family with {type(processor).__name__}; known: {known}")


def token_types(processor: ProcessorMixin, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model with spatial positions needs to tell image tokens (1) from text (0): without, it takes
    an image for a line of text and says nothing. Empty for the others. input_ids: [rows, tokens]."""
    if not of_processor(processor).spatial_positions:
        return {}
    return {"mm_token_type_ids": (input_ids == processor.image_token_id).int()}


def positions(
    model: PreTrainedModel, processor: ProcessorMixin, mask: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Positions of tokens [rows, tokens], or [3, rows, tokens] where they are spatial. mask: [rows, tokens],
    0 on padding; inputs: input_ids of that shape, and the image tensors of all rows."""
    if not of_processor(processor).spatial_positions:
        return mask.cumsum(-1).sub(1).clamp(min=0)
    ids, grid = inputs["input_ids"].to(mask.device), inputs.get("image_grid_thw")
    types = token_types(processor, ids)["mm_token_type_ids"]
    grid = None if grid is None else grid.to(mask.device)
    index = model.model.get_rope_index(ids, types, image_grid_thw=grid, attention_mask=mask)
    found: torch.Tensor = index[0]
    return found
