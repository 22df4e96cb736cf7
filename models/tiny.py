"""The embedded model: a small Idefics3 (SigLIP-style vision tower, pixel shuffle, Llama text model) and its
tokenizer, built from config and corpus and saved as an ordinary Hugging Face checkpoint.

    python -c "from models.tiny import build_model, TinyConfig; \
        print(sum(p.numel() for p in build_model(TinyConfig()).parameters()))"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]
PROTOCOL_TOKENS = [
    "<thoughts>\n",
    "\n</thoughts>",
    '{"title":"',
    '","content":"',
    '","next_action":"continue"}',
    '","next_action":"final_answer"}',
]
"""Fixed strings of the step protocol that are one token each,
so that a step costs what it says and not its quotes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS = r": | ?[A-Za-z]+| ?[0-9]{1,2}|\n| ?[^A-Za-z0-9\s]|\s+"


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the embedded model. Heads are 32 wide: the smallest that vLLM's CPU attention takes."""

    vocabulary: int = 576
    hidden: int = 160
    layers: int = 4
    intermediate: int = 480
    vision_hidden: int = 64
    vision_layers: int = 2
    image_px: int = 48
    patch_px: int = 8
    pixel_shuffle: int = 2
    max_positions: int = 1024

    @property
    def image_tokens(self) -> int:
        """Tokens one image takes after the pixel shuffle."""
        return (self.image_px // self.patch_px) ** 2 // self.pixel_shuffle**2


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a number to 99 may be one token, trained on the corpus;
    the same corpus gives the same bytes.

    A colon keeps the space behind it, so that what follows has the same tokens as where it stands alone: a
    step's content in `Title: content` and in its JSON, an answer at the end of a chain and as a reply. A
    model of this size does not learn from little data that two tokens mean one word.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(PROTOCOL_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PROTOCOL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, config: TinyConfig) -> Idefics3Processor:
    """Idefics3's processor for one unsplit image of `config.image_px` pixels."""
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        do_resize=True,
        size={"longest_edge": config.image_px},
        max_image_size={"longest_edge": config.image_px},
        do_pad=True,
    )
    return Idefics3Processor(
        images, tokenizer, image_seq_len=config.image_tokens, chat_template=CHAT_TEMPLATE
    )


def build_model(
    config: TinyConfig, tokenizer: PreTrainedTokenizerFast | None = None
) -> Idefics3ForConditionalGeneration:
    """The untrained model, float32; seed torch first."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    def token(name: str, default: int) -> int:
        return tokenizer.convert_tokens_to_ids(name) if tokenizer is not None else default

    pad, end, image = token("<|pad|>", 0), token("<|end|>", 1), token("<image>", 4)
    head = 32
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={
                "model_type": "llama",
                "vocab_size": len(tokenizer) if tokenizer is not None else config.vocabulary,
                "hidden_size": config.hidden,
                "intermediate_size": config.intermediate,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.hidden // head,
                "num_key_value_heads": config.hidden // head,
                "head_dim": head,
                "max_position_embeddings": config.max_positions,
                "pad_token_id": pad,
                "bos_token_id": end,
                "eos_token_id": end,
                "tie_word_embeddings": True,
            },
            vision_config={
                "hidden_size": config.vision_hidden,
                "intermediate_size": 2 * config.vision_hidden,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_hidden // head,
                "image_size": config.image_px,
                "patch_size": config.patch_px,
            },
            scale_factor=config.pixel_shuffle,
            image_token_id=image,
            pad_token_id=pad,
            tie_word_embeddings=True,
        )
    )
