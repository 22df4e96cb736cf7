"""What the stages of a preference round share: the round's number, its policy and its folders.

python -m tasks.sample --round r1        # like score, dpo, and evaluate --system r1
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks import params

ROUNDS = Path("artifacts/rounds")
REASONING_SFT = Path("artifacts/reasoning_sft/checkpoint")


@dataclass(frozen=True)
class Round:
    """t: 1, 2, …; policy: folder of the stage whose checkpoint this round starts from; trainer: the section
    of params.yaml that trains it."""

    t: int
    policy: str
    trainer: Literal["dpo", "grpo"] = "dpo"

    @property
    def checkpoint(self) -> Path:
        """M_t, the policy that is sampled and then trained."""
        return Path(self.policy) / "checkpoint"

    def folder(self, stage: str) -> Path:
        """Output folder of one of the round's stages."""
        return ROUNDS / f"r{self.t}" / stage

    @property
    def trained(self) -> Path:
        """M_{t+1}."""
        return self.folder("dpo") / "checkpoint"

    @property
    def parent(self) -> str:
        """Name of the generation the round starts from."""
        return "reasoning_sft" if self.t == 1 else f"dpo_r{self.t - 1}"


def load(key: str) -> Round:
    """A round of params.yaml by its key, e.g. "r2"."""
    return params.load(f"rounds.{key}", Round)


def from_arguments(doc: str | None) -> Round:
    """The round that `--round` names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round", required=True, help="a key of `rounds` in params.yaml, such as r1")
    return load(parser.parse_args().round)
