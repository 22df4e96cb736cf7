"""Preference training with ms-swift, of a model and pairs that benchmarks.preference has written.

    python benchmarks/peers/swift_peer.py FOLDER

FOLDER holds model/, pairs.jsonl (rows of ms-swift's own form, in the order in which they are trained on) and
settings.json. The embedded model has a chat template of its own, which is registered as a user of ms-swift
registers one: the tokens are those that the other trainers read. Prints what it measured as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "USE_HF": "1"}


def register() -> None:
    """The template of models/tiny.py."""
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.idefics3 import Idefics3Template
    from swift.template.utils import align_image_inputs

    class Tiny(Idefics3Template):
        def _encode(self, inputs: Any) -> dict[str, Any]:
            encoded = super(Idefics3Template, self)._encode(inputs)
            image = self.processor(
                text=self.processor.decode(encoded["input_ids"]),
                images=inputs.images,
                return_tensors="pt",
                add_special_tokens=False,
            )
            encoded["input_ids"], encoded["labels"] = align_image_inputs(
                encoded["input_ids"],
                encoded["labels"],
                image["input_ids"][0],
                self.processor.image_token_id,
            )
            encoded["pixel_values"] = image["pixel_values"]
            return encoded

    register_template(
        TemplateMeta(
            "longview_tiny",
            prefix=[],
            prompt=["<|user|>{{QUERY}}<|end|><|assistant|>"],
            chat_sep=["<|end|>"],
            suffix=["<|end|>"],
            template_cls=Tiny,
        )
    )


def main() -> None:
    """One epoch in the order of the file."""
    from swift import RLHFArguments
    from swift.pipelines.train.rlhf import SwiftRLHF
    from transformers import TrainerCallback

    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    register()
    began = time.perf_counter()
    times: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                times.append(time.perf_counter())
                losses.append(float(logs["loss"]))

    class Watched(SwiftRLHF):
        def train(self, trainer: Any) -> Any:
            trainer.add_callback(Watch())
            return super().train(trainer)

    pipeline = Watched(
        RLHFArguments(
            rlhf_type="dpo",
            model=str(folder / "model"),
            model_type="idefics3",
            template="longview_tiny",
            dataset=[str(folder / "pairs.jsonl")],
            output_dir=str(folder / "out"),
            tuner_type="full",
            freeze_aligner=False,
            torch_dtype="float32",
            bf16=False,
            fp16=False,
            loss_type=settings["types"],
            loss_weights=settings["weights"],
            beta=settings["beta"],
            learning_rate=settings["learning_rate"],
            weight_decay=0.0,
            adam_beta2=0.999,  # as in transformers
            warmup_ratio=0.05,
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            num_train_epochs=1,
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=1,
            gradient_checkpointing=False,
            max_length=4096,
            split_dataset_ratio=0.0,
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            dataloader_num_workers=0,
            dataset_num_proc=1,
            attn_impl="sdpa",
            logging_steps=1,
            save_strategy="no",
            report_to=["none"],
            use_cpu=True,
        )
    )
    pipeline.main()
    warm_up, rows = settings["warm_up"], settings["batch_size"]
    print(
        json.dumps(
            {
                "pairs_per_second": rows * (len(times) - warm_up) / (times[-1] - times[warm_up - 1]),
                "seconds": time.perf_counter() - began,
                "losses": losses,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
