"""LoRA (arXiv 2106.09685) and QLoRA (arXiv 2305.14314): a small adapter trains, the model under it does not.

    model, processor = load_for_training("artifacts/foundation/base", Lora(rank=64))
    train_sft(model, processor, ...)
    save(finished(model), processor, folder)        # models.vlm: adapter, processor, name of the base

A checkpoint folder with an adapter is read by `models.vlm.load` as the whole model, adapter merged, and
served by name over its base (models.engines.weights). Trained further it goes on as the same adapter: that
is how rounds are chained.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.adapter_base import ADAPTER_CONFIG, base_of, is_adapter
from models.families import of_model
from models.guard import TrainingError
from models.vlm import load, load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Lora:
    """An adapter on all linear layers of the language model, as QLoRA found to be needed (its figure 2).

    rank; alpha: the adapter counts alpha / rank times; dropout: of what goes into it (preference training has
    none). projector: the layers between vision and language train whole, too; vLLM serves no such adapter, so
    that the checkpoint is the merged model. quantized: the model under it lies in memory as nf4, its
    constants quantised as well, computing in bfloat16 on a GPU: 0.52 bytes a parameter instead of 2 or 4.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0
    projector: bool = False
    quantized: bool = False


def load_for_training(
    checkpoint: str | Path, lora: Lora | None, seed: int = 0, bf16: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a checkpoint, all of it to train; or with a new adapter on it, or with the adapter that
    the checkpoint is. Raises TrainingError where that is another than `lora` says, or bitsandbytes is
    missing; BaseChangedError for an adapter whose base is another one now. seed: of a new adapter's random
    factor; bf16: what lies under an adapter, and neither trains nor is saved, is loaded in 16 bits."""
    if lora is None:
        return load(checkpoint)
    if lora.projector and lora.quantized:
        raise TrainingError("an adapter on a quantised model cannot be merged: `projector` or `quantized`")
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    goes_on = is_adapter(checkpoint)
    if goes_on:
        _refuse_another(checkpoint, lora)
    base = base_of(checkpoint) if goes_on else str(checkpoint)
    dtype = "bfloat16" if bf16 and not lora.projector else "float32"
    model, _ = load(base, dtype, **_quantised(base) if lora.quantized else {})
    if goes_on:
        adapted = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    else:
        family = of_model(model)
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=rf".*{family.lora}",
                modules_to_save=family.projectors(model) if lora.projector else None,
                base_model_name_or_path=base,
            ),
        )
    if lora.quantized:  # TRL trains them so; what the guard sees before is then what it sees after
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.bfloat16()
    return adapted.eval(), load_processor(checkpoint)


def finished(model: Any) -> Any:
    """What is to be saved of a trained model: where a projector has trained, too, all of it, merged."""
    configs = getattr(model, "peft_config", {})
    merged = any(config.modules_to_save for config in configs.values())
    return model.merge_and_unload() if merged else model


def _refuse_another(checkpoint: str | Path, lora: Lora) -> None:
    settings = json.loads((Path(checkpoint) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    found, wanted = (settings["r"], settings["lora_alpha"]), (lora.rank, lora.alpha)
    if found != wanted or lora.projector:
        more = " with the projector" if lora.projector else ""
        raise TrainingError(
            f"{checkpoint} is an adapter of rank {found[0]} and alpha {found[1]:g}, to go on as one of rank "
            f"{wanted[0]} and alpha {wanted[1]:g}{more}: give all stages that train it the same `lora`, or "
            "none to train it merged"
        )


def _quantised(base: str) -> dict[str, Any]:
    """How transformers is to load the language model: nf4 with double quantisation. Vision tower, projector
    and head stay as they are."""
    import torch

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise TrainingError("`quantized` needs bitsandbytes: pip install 'longview[qlora]'") from None
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
    lora = of_model(model).lora
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    computing = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computing,
            llm_int8_skip_modules=[name for name in linear if not re.fullmatch(lora, name)],
        )
    }
