"""A checkpoint of the embedded kind that has learnt the step protocol, in seconds: its steps end.

from tests.support.taught import teach
teach(Path("artifacts/foundation/generator"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.sft import train_sft
from models.tiny import TinyConfig, build_model, build_processor, train_tokenizer
from models.training import Budget
from models.vlm import Conversation, save

CONFIG = TinyConfig(400, 64, layers=2, intermediate=128, vision_hidden=32, vision_layers=1, max_positions=512)
BUDGET = Budget(max_steps=120, batch_size=8, learning_rate=4e-3, optimizer="muon", train_vision=True)
BOARDS = 200


def teach(folder: Path) -> None:
    """Train a model on chains of two steps about boards, and save it as a checkpoint in `folder`."""
    import torch

    conversations, boards = demonstrations()
    texts = [text for conversation in conversations for turn in conversation.turns for text in turn]
    tokenizer = train_tokenizer(texts, CONFIG.vocabulary)
    processor = build_processor(tokenizer, CONFIG)
    torch.manual_seed(0)
    model = build_model(CONFIG, tokenizer)
    train_sft(model, processor, conversations, BUDGET, folder.with_name("steps"), 0, boards.__getitem__)
    save(model, processor, folder)


def demonstrations() -> tuple[list[Conversation], dict[str, Any]]:
    """Chains in the step protocol, and their boards by name."""
    import numpy as np
    from PIL import Image

    from models.boards.chains import chain
    from models.boards.questions import ask
    from models.boards.scans import draw_board, pick_scans
    from models.prompts import fill, prompt
    from models.reasoning import step_json

    generator = np.random.default_rng(0)
    conversations, boards = [], {}
    for number in range(BOARDS):
        question = ask(generator)
        board = draw_board(pick_scans(question.digits, "generate", generator))
        boards[str(number)] = Image.fromarray(board).convert("RGB")
        asked = [fill("short", "step", question=question.text), prompt("short", "next")]
        said = [step_json(step) for step in chain(question, "brief")]
        turns = [*zip(asked, said, strict=True), (prompt("short", "answer"), question.answer)]
        conversations.append(Conversation([str(number)], turns))
    return conversations, boards
