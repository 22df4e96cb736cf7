"""Which runs are kept, and why: the newest, the young, the pinned, and those that made a champion.

    python -m flows.retention       # every run version, and what keeps it under the default policy

A pin is a git reference, refs/longview/pins/<id of the run>: it goes where the repository's references go.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows import versions
from flows.registered import Registered
from flows.versions import RunVersion, git

PINS = "refs/longview/pins/"


@dataclass(frozen=True)
class Policy:
    """How many of the newest runs are kept, and for how many days any run is. One reason is enough."""

    keep_runs: int = 10
    keep_days: float = 30.0


@dataclass(frozen=True)
class Verdict:
    """A run and what keeps it; no reason: it goes."""

    version: RunVersion
    reasons: tuple[str, ...]


def judge(
    root: Path, policy: Policy, registered: list[Registered], now: datetime | None = None
) -> list[Verdict]:
    """Every run version with what keeps it, newest first. The newest is always kept."""
    every = versions.versions(root)
    young = (now or datetime.now(UTC)) - timedelta(days=policy.keep_days)
    pinned, here = pins(root), versions.identity(root)
    trained = _trained(root, every, registered)
    verdicts = []
    for rank, version in enumerate(every):
        reasons = [
            *(["one of the newest"] if rank < max(1, policy.keep_runs) else []),
            *(["young enough"] if version.when > young else []),
            *(["pinned"] if version.commit in pinned else []),
            *(["what the workspace is"] if version.tag.endswith(f"-{here}") else []),
            *(f"trained {name}" for name in trained.get(version.tag, [])),
        ]
        verdicts.append(Verdict(version, tuple(reasons)))
    return verdicts


def _trained(root: Path, every: list[RunVersion], registered: list[Registered]) -> dict[str, list[str]]:
    """Tag -> the registered versions all of whose checkpoints that run was the first to hold."""
    holds = [(version.tag, md5s(root, version)) for version in reversed(every)] if registered else []
    trained: dict[str, list[str]] = {}
    for model in registered:
        wanted = set(model.checkpoints.values())
        tag = next((tag for tag, held in holds if wanted and wanted <= held), None)
        if tag:
            trained.setdefault(tag, []).append(model.name)
    return trained


def md5s(root: Path, version: RunVersion) -> set[str]:
    """Every md5 that a run's dvc.lock names: what its stages made, and the parts of it that they read."""
    stages = versions.lock(root, version)["stages"].values()
    return {
        str(entry.get("md5"))
        for stage in stages
        for entry in [*stage.get("outs", []), *stage.get("deps", [])]
    }


def pin(root: Path, name: str) -> RunVersion:
    """Keep a run whatever the policy says. Raises VersionError."""
    version = versions.resolve(root, name)
    git(root, "update-ref", _pin(version), version.commit)
    return version


def unpin(root: Path, name: str) -> RunVersion:
    """Leave a run to the policy again. Raises VersionError if it is not pinned."""
    version = versions.resolve(root, name)
    if version.commit not in pins(root):
        raise versions.VersionError(f"{version.tag} is not pinned")
    git(root, "update-ref", "-d", _pin(version))
    return version


def pins(root: Path) -> set[str]:
    """The commits that are pinned."""
    return set(git(root, "for-each-ref", "--format=%(objectname)", PINS).split())


def forget(root: Path, version: RunVersion) -> None:
    """Delete the run's tag if it still names that commit. Its commit stays in the branch of all runs."""
    git(root, "update-ref", "-d", f"refs/tags/{version.tag}", version.commit)


def revisions(root: Path, dropped: list[RunVersion]) -> dict[str, str]:
    """Commit -> what names it: each reference of the repository and each worktree's HEAD, without the dropped
    runs and the branch of all runs."""
    gone = {f"refs/tags/{version.tag}" for version in dropped} | {versions.BRANCH}
    form = "%(refname) %(objecttype) %(objectname) %(*objecttype) %(*objectname)"
    found: dict[str, str] = {}
    for line in git(root, "for-each-ref", f"--format={form}").splitlines():
        name, *targets = line.split()
        kinds = dict(zip(targets[::2], targets[1::2], strict=False))
        if name not in gone and "commit" in kinds:
            found.setdefault(kinds["commit"], name)
    for line in git(root, "worktree", "list", "--porcelain").splitlines():
        key, _, commit = line.partition(" ")
        if key == "HEAD" and set(commit) != {"0"}:  # zeros: a branch without a commit yet
            found.setdefault(commit, "HEAD of a worktree")
    return found


def worktrees(root: Path) -> list[Path]:
    """The other worktrees of this repository: the same project as `root`, elsewhere."""
    prefix = git(root, "rev-parse", "--show-prefix")
    lines = git(root, "worktree", "list", "--porcelain").splitlines()
    found = [Path(line.removeprefix("worktree "), prefix) for line in lines if line.startswith("worktree ")]
    return [path for path in found if (path / ".dvc").is_dir() and path.resolve() != root.resolve()]


def _pin(version: RunVersion) -> str:
    return PINS + version.tag.removeprefix("run/")


def main() -> None:
    """Print every run and what keeps it."""
    from flows import registered
    from flows.environment import root

    base = root()
    held = [model for model in registered.versions(base, registered.client(base)) if model.held]
    for verdict in judge(base, Policy(), held):
        print(verdict.version.tag, ", ".join(verdict.reasons) or "goes")


if __name__ == "__main__":
    main()
