"""Whether this checkout's decision has been carried out: asked before every run, so without MLflow.

python -c "from pathlib import Path; from flows.settled import is_settled; print(is_settled(Path('.')))"
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from flows.parent_run import read_note, write_note
from tasks import tracking

DECISION = Path("artifacts/promote/decision.json")
LEFT = "--until makes no version, so the decision is not carried out: a `longview run` without it does that"


def is_settled(root: Path) -> bool:
    """True also if there is nothing to carry out; False once the time of a candidate that waits is over."""
    if not tracking.enabled() or not (root / DECISION).is_file():
        return True
    note = read_note(root)
    until = note.get("approval_until")
    over = until is not None and datetime.fromisoformat(until) <= datetime.now(UTC)
    return note.get("settled") == _key(root) and not over


def note_settled(root: Path, waits_until: str | None) -> None:
    """This decision is in the registry, and a candidate waits there until then (ISO time), or none does."""
    write_note(root, settled=_key(root), approval_until=waits_until)


def _key(root: Path) -> str:
    """This decision in this registry."""
    said = (root / DECISION).read_bytes() + tracking.tracking_uri().encode()
    return hashlib.md5(said, usedforsecurity=False).hexdigest()
