"""Prompts are files: one text a role, in sets. `short` serves the embedded
model, `full` models of 7B and more.

    python -c "from models.prompts import prompt; print(prompt('short', 'step'))"

A `{name}` in a file is filled in; everything else, braces of JSON included, stands as it is. Changing a file
changes the version (`digest`), which every stage that uses the set records.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

ROLES = ("direct", "step", "next", "answer", "reason", "summary", "verdict", "scores")
_FOLDER = Path(__file__).parent


@cache
def prompt(set_name: str, role: str) -> str:
    """The text of a role's prompt; KeyError names the sets and roles there are."""
    path = _FOLDER / set_name / f"{role}.txt"
    if not path.is_file():
        sets = sorted(
            folder.name for folder in _FOLDER.iterdir() if folder.is_dir() and not folder.name.startswith("_")
        )
        raise KeyError(f"no prompt {set_name}/{role}; sets: {', '.join(sets)}; roles: {', '.join(ROLES)}")
    return path.read_text(encoding="utf-8").rstrip("\n")


def fill(set_name: str, role: str, **values: str) -> str:
    """A prompt with its `{name}` places filled in; a place without a value is an error."""
    text = prompt(set_name, role)
    for name in set(re.findall(r"\{([a-z_]+)\}", text)) - values.keys():
        raise KeyError(f"prompt {set_name}/{role} needs a value for {{{name}}}")
    return re.sub(r"\{([a-z_]+)\}", lambda match: values[match.group(1)], text)


def digest(set_name: str) -> str:
    """Version of a set: the first 12 hex digits of the SHA-256 over its files."""
    texts = "\0".join(prompt(set_name, role) for role in ROLES)
    return hashlib.sha256(texts.encode()).hexdigest()[:12]
