"""Prompts: one snapshot of every role of every set, so that a change of wording is a change somebody meant.

python -m tests.unit.test_prompts      # after changing a prompt: write the snapshots anew, then read the diff
"""

from __future__ import annotations

from pathlib import Path

import pytest

from models import prompts
from models.prompts import ROLES, digest, fill, prompt

SNAPSHOTS = Path(__file__).resolve().parents[1] / "snapshots"
SETS = sorted(p.name for p in Path(prompts.__file__).parent.iterdir() if p.is_dir() and p.name[0] != "_")
VALUES = {
    "question": "What is the sum of row 1?",
    "truth": "16",
    "answer": "sixteen",
    "paths": "1. <thoughts>\nRead: 3 5 8\n</thoughts>\n2. <thoughts>\nAnswer: 16\n</thoughts>",
    "thoughts": "<thoughts>\nRead: 3 5 8\nAnswer: 16\n</thoughts>",
}
NEEDED = {
    "direct": {"question"},
    "step": {"question"},
    "next": set(),
    "answer": set(),
    "reason": {"question"},
    "summary": {"question", "thoughts"},
    "verdict": {"question", "truth", "answer"},
    "scores": {"question", "truth", "paths"},
}


def rendered(set_name: str) -> str:
    """Every role of a set, filled in, under its name."""
    return "".join(f"===== {role}\n{fill(set_name, role, **VALUES)}\n" for role in ROLES)


def test_there_are_two_sets() -> None:
    assert SETS == ["full", "short"]


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_as_last_seen(name: str) -> None:
    known = (SNAPSHOTS / f"prompts-{name}.txt").read_text(encoding="utf-8")
    assert rendered(name) == known, "meant? then: python -m tests.unit.test_prompts"


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("role", ROLES)
def test_every_role_takes_exactly_its_values(name: str, role: str) -> None:
    marked = {key: f"⟨{key}⟩" for key in VALUES}
    text = fill(name, role, **marked)
    assert {key for key, mark in marked.items() if mark in text} == NEEDED[role]
    assert text == text.strip() and "\r" not in text


@pytest.mark.parametrize("name", SETS)
def test_the_version_follows_from_the_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(name)
    assert len(before) == 12 and before == digest(name) and len({digest(s) for s in SETS}) == len(SETS)
    monkeypatch.setattr(prompts, "prompt", lambda s, role: prompt(s, role) + ("!" if role == "next" else ""))
    assert digest(name) != before


def test_values_are_never_read_as_places() -> None:
    text = fill("full", "summary", question="{thoughts} \\1", thoughts="{question}")
    assert "{thoughts} \\1" in text and "{question}" in text
    assert '{"title"' in fill("full", "step", question="?")


def test_faults_are_named() -> None:
    with pytest.raises(KeyError, match=r"needs a value for \{question\}"):
        fill("short", "direct")
    with pytest.raises(KeyError, match=r"sets: full, short; roles: direct"):
        prompt("none", "direct")
    with pytest.raises(KeyError, match="no prompt short/nothing"):
        prompt("short", "nothing")


def main() -> None:
    """Write the snapshots."""
    for name in SETS:
        (SNAPSHOTS / f"prompts-{name}.txt").write_text(rendered(name), encoding="utf-8")


if __name__ == "__main__":
    main()
