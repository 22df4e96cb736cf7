"""Profiles: overlays, rounds, comments, and edits that are never lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flows import profile
from tasks import params
from tests.support.imports import REPOSITORY

EMBEDDED = """\
profile: embedded
seed: 0
# how long
judge:
  steps: 3  # of training
  rate: 1e-3
rounds: 3
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/embedded.yaml").write_text(EMBEDDED)
    (tmp_path / "profiles/big.yaml").write_text("judge: {rate: 1e-5}\nrounds: 2\n")
    return tmp_path


def test_overlay_changes_only_what_it_names(root: Path) -> None:
    profile.activate(root, "big")
    found = params.read(root / "params.yaml")
    assert found["profile"] == "big" and found["judge"] == {"steps": 3, "rate": 1e-5}
    assert found["rounds"] == {
        "r1": {"t": 1, "policy": "artifacts/reasoning_sft", "trainer": "dpo"},
        "r2": {"t": 2, "policy": "artifacts/rounds/r1/dpo", "trainer": "dpo"},
    }


def test_comments_stay(root: Path) -> None:
    profile.activate(root, "embedded")
    text = (root / "params.yaml").read_text()
    assert "# how long" in text and "# of training" in text
    profile.activate(root, None, 5)
    assert "# of training" in (root / "params.yaml").read_text()


def test_rounds_alone_keep_edits(root: Path) -> None:
    profile.activate(root, "embedded")
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: 9"))
    changed = profile.activate(root, None, 4)
    assert len(changed) == 1 and "r4" in changed[0]
    assert params.read(path)["judge"]["steps"] == 9
    assert profile.activate(root, None, 4) == [] and profile.activate(root) == []


def test_a_round_names_its_trainer(root: Path) -> None:
    def trainers() -> list[str]:
        return [entry["trainer"] for entry in params.read(root / "params.yaml")["rounds"].values()]

    (root / "profiles/mixed.yaml").write_text("rounds: [dpo, grpo]\n")
    profile.activate(root, "mixed")
    assert trainers() == ["dpo", "grpo"]
    profile.activate(root, None, 3)
    assert trainers() == ["dpo", "grpo", "dpo"]
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("trainer: grpo", "trainer: dpo"))
    with pytest.raises(profile.ProfileError, match=r"rounds.r2.trainer: 'grpo' -> 'dpo'"):
        profile.activate(root, "big")


def test_edits_that_would_be_lost_are_refused(root: Path) -> None:
    profile.activate(root, "embedded")
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: 9"))
    with pytest.raises(profile.ProfileError, match=r"judge.steps: 3 -> 9"):
        profile.activate(root, "big")
    assert params.read(path)["judge"]["steps"] == 9
    profile.activate(root, "big", force=True)
    assert params.read(path)["judge"]["steps"] == 3


def test_another_number_of_rounds_is_no_edit(root: Path) -> None:
    profile.activate(root, "embedded", 5)
    profile.activate(root, "big")
    assert len(params.read(root / "params.yaml")["rounds"]) == 2


def test_faults_are_named(root: Path) -> None:
    (root / "profiles/typo.yaml").write_text("judge: {ratee: 1}\n")
    with pytest.raises(profile.ProfileError, match="did you mean 'rate'"):
        profile.build(root, "typo")
    with pytest.raises(profile.ProfileError, match="there are: big, embedded, typo"):
        profile.build(root, "none")
    with pytest.raises(profile.ProfileError, match="1 or more"):
        profile.rounds_map(0)


def test_the_profile_in_the_documentation_can_be_run(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs/bring-your-own-model.md").read_text(encoding="utf-8")
    text = re.search(r"```yaml\n(foundation:.*?)```", page, re.DOTALL)
    assert text
    shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
    (tmp_path / "profiles/mine.yaml").write_text(text[1])
    profile._write(tmp_path / "params.yaml", profile._dump(profile.build(tmp_path, "mine")))
    parsed = params.validate(tmp_path / "params.yaml")
    assert parsed["judge"].kind == "model" and parsed["instruct"].boards == 0
    assert {parsed[name].budget.optimizer for name in ("reasoning_sft", "summary_sft", "dpo")} == {"adamw"}
