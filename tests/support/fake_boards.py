"""A checkout of boards with engines that need no model: every stage that samples runs in a moment.

from tests.support.fake_boards import Engines, make_workspace
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows import profile
from models.engines.base import Completion, Reply, Request
from models.reasoning import step_json, thoughts
from models.records import Step, read_jsonl
from models.vlm import Conversation

REPOSITORY = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Nothing catches it, like a signal."""


class BoardEngine:
    """Plays every role from the records' truth: an answer is right, wrong or unreadable by hash and seed.

    requests: prompts answered so far; kill_after: raise Killed once so many have been asked for.
    """

    independent = False

    def __init__(self, records: str | Path, batch_size: int = 8, kill_after: int | None = None) -> None:
        self.truth = {(row["images"][0], row["question"]): row["answer"] for row in read_jsonl(records)}
        self.capacity, self.kill_after, self.requests = batch_size, kill_after, 0

    async def ask(self, request: Request) -> Reply:
        """At once; a word counts as a token."""
        self.requests += 1
        if self.kill_after is not None and self.requests > self.kill_after:
            raise Killed
        text = self._reply(request.prompt, request.sampling.seed)
        return Completion(text, len(text.split()), True)

    async def close(self) -> None:
        """Holds nothing."""

    def _reply(self, prompt: Conversation, seed: int) -> str:
        asked, said = prompt.turns[0][0], prompt.turns[-1][0]
        question = asked.split("?")[0] + "?"
        truth = self.truth[prompt.images[0], question]
        luck = zlib.crc32(f"{question}{prompt.images}{seed}{len(prompt.turns)}".encode()) % 10
        answer = truth if luck < 6 else "7" if truth != "7" else "8"
        if said.endswith("Step by step:"):
            return step_json(Step("Read", f"I look at it {luck}")) if luck else "unreadable"
        if said == "Next.":
            return step_json(Step("Answer", answer, "final_answer")) if luck else "unreadable"
        if said.endswith("Think:"):
            steps = [Step("Read", f"I look at it {luck}"), Step("Answer", answer)]
            return thoughts(steps) if luck else "unreadable"
        return answer  # answer, direct and summary prompts


class Engines:
    """Stands in for tasks.engines.open_engine: one BoardEngine for all roles, and which were asked for."""

    def __init__(self, records: str | Path, kill_after: int | None = None) -> None:
        self.engine = BoardEngine(records, kill_after=kill_after)
        self.checkpoints: list[str] = []

    @contextmanager
    def __call__(self, role: str, checkpoint: str | Path, *_: Any) -> Iterator[BoardEngine]:
        """As open_engine."""
        self.checkpoints.append(Path(checkpoint).as_posix())
        yield self.engine


OVERRIDES: dict[str, Any] = {
    "instruct": {"boards": 12, "demonstrations": 12, "graded": 12},
    "foundation": {
        "sizes": {"hidden": 64, "layers": 1, "intermediate": 64},
        "vision": {"steps": 2, "batch_size": 4},
        **{role: {"epochs": 1, "batch_size": 8, "learning_rate": 1.0e-3} for role in ("base", "generator")},
    },
    "generate": {"questions": 12, "samples": 2, "chunk": 4},
    "assess": {"agreement_questions": 4},
    "reasoning_sft": {"budget": {"epochs": 1, "batch_size": 8}},
    "summary_data": {"questions": 8},
    "summary_sft": {"budget": {"epochs": 1, "batch_size": 8}},
    "sample": {"questions": 12, "samples": 4},
    "dpo": {"budget": {"epochs": 1, "batch_size": 4}},
    "evaluate": {"limit": 6},
}


def make_workspace(folder: Path, questions: int = 24, overrides: Mapping[str, Any] = OVERRIDES) -> Path:
    """data/ with a few questions a part, and params.yaml: the tiny profile with smaller budgets still."""
    from tasks import boards

    parts = tuple(boards.Part(p.name, p.scans, p.split, p.set, questions, p.pool) for p in boards.PARTS)
    boards.build(folder / "data", parts)
    tree = profile.build(REPOSITORY, "tiny")
    _override(tree, overrides)
    profile._write(folder / "params.yaml", profile._dump(tree))
    return folder


def _override(tree: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and key in tree:
            _override(tree[key], value)
        else:
            tree[key] = value


def stand_in(folder: Path, *paths: str) -> None:
    """Folders that stages only fingerprint, such as a checkpoint that no model is loaded from."""
    for path in paths:
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps({"stand-in": path}))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
