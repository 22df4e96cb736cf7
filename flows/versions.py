"""Every run that succeeds is a version: one git commit and one tag, on a branch of their own.

    python -m flows.versions        # every run version, newest first

The commit holds what ran (the tracked files as they were), what it made (dvc.lock: DVC has the bytes), and a
copy of its figures under metrics/. It is written with an index of its own: the user's index, working tree and
branch are never touched. The tag is named after the content, so recording a run twice records it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BRANCH = "refs/heads/longview/runs"
TAGS = "refs/tags/run/"
LOCK, PARAMS, POINTER, FACTS = "dvc.lock", "params.yaml", "data.dvc", "metrics/run.json"
KEPT = {
    "metrics/comparison.json": Path("artifacts/compare/comparison.json"),
    "metrics/table.md": Path("artifacts/compare/table.md"),
    "metrics/decision.json": Path("artifacts/promote/decision.json"),
}
AUTHOR = {
    "GIT_AUTHOR_NAME": "Longview",
    "GIT_AUTHOR_EMAIL": "longview@localhost",
    "GIT_COMMITTER_NAME": "Longview",
    "GIT_COMMITTER_EMAIL": "longview@localhost",
}


class VersionError(ValueError):
    """No such run version, or a file that it does not hold."""


@dataclass(frozen=True)
class Facts:
    """What a run says of itself. Ids of MLflow and Prefect are None where there were none."""

    data: str
    profile: str
    mlflow_run: str | None = None
    prefect_run: str | None = None
    ran: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunVersion(Facts):
    """One recorded run. `parent`: the user's HEAD when it ran; `candidate`: the generation it decided on."""

    tag: str = field(kw_only=True)
    commit: str = field(kw_only=True)
    when: datetime = field(kw_only=True)
    parent: str | None = field(kw_only=True)
    decision: str | None = field(kw_only=True, default=None)
    candidate: str | None = field(kw_only=True, default=None)


def record(root: Path, facts: Facts) -> RunVersion | None:
    """Commit and tag the run, unless the same files are recorded already. None: this is no git repository.

    Raises VersionError if git fails.
    """
    if not _is_repository(root):
        return None
    key = identity(root)
    known = _list(root, f"{TAGS}*-{key}")
    if known:
        return known[0]
    if _head(root) == BRANCH:
        raise VersionError(
            f"{BRANCH.removeprefix('refs/heads/')} is checked out, and its commits are Longview's: "
            "`git switch` to a branch of yours, then run again"
        )
    head, last = _revision(root, "HEAD"), _revision(root, BRANCH)
    tree = _tree(root, facts)
    parents = [revision for revision in (last, head) if revision]
    now = datetime.now(UTC)
    name = f"run/{now:%Y%m%d}-{key}"
    commit = git(
        root,
        "commit-tree",
        tree,
        *(word for revision in parents for word in ("-p", revision)),
        text=_message(root, name, facts),
        environment=_author(root),
    )
    # The branch first: a tag is what makes a version, and it must not be made of what nothing holds.
    git(root, "update-ref", BRANCH, commit, last or "")
    git(root, "update-ref", f"refs/tags/{name}", commit)
    return _list(root, f"refs/tags/{name}")[0]


def is_new(root: Path) -> bool:
    """Whether `record` would make a version: this is a git repository, and has none of these files."""
    return _is_repository(root) and not _list(root, f"{TAGS}*-{identity(root)}")


def identity(root: Path) -> str:
    """8 hex digits of what a run made and from what: dvc.lock, params.yaml, data.dvc."""
    digest = hashlib.md5(usedforsecurity=False)
    for name in (LOCK, PARAMS, POINTER):
        content = (root / name).read_bytes() if (root / name).is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:8]


def versions(root: Path) -> list[RunVersion]:
    """Every run version, newest first."""
    found = _list(root, f"{TAGS}*") if _is_repository(root) else []
    return sorted(found, key=lambda version: (version.when, version.tag), reverse=True)


def resolve(root: Path, name: str, every: list[RunVersion] | None = None) -> RunVersion:
    """The version named by a tag, an id, the beginning of either, `latest`, or a git revision.

    An md5 of a data version (or its beginning) means the newest run on it. every: all versions, if they are
    known. Raises VersionError.
    """
    every = versions(root) if every is None else every
    if not every:
        raise VersionError("there is no run version yet: a `longview run` that succeeds makes one")
    if name == "latest":
        return every[0]
    found = [v for v in every if v.tag == name or v.tag.removeprefix("run/") == name]
    found = found or [v for v in every if _names(v, name)]
    if not found and (revision := _revision(root, name)):
        found = [v for v in every if revision in (v.commit, v.parent)][:1]
    if not found:
        found = [v for v in every if v.data.startswith(name)][:1]
    if len(found) == 1:
        return found[0]
    known = ", ".join(v.tag for v in (found or every)[:8])
    problem = f"'{name}' names {len(found)} run versions" if found else f"no run version '{name}'"
    raise VersionError(f"{problem}; there are: {known}{' …' if len(found or every) > 8 else ''}")


def read(root: Path, version: RunVersion, path: str) -> bytes:
    """A file as it was in that version. Raises VersionError if it holds none of that name."""
    try:
        return read_at(root, version.commit, path)
    except VersionError:
        raise VersionError(f"{version.tag} holds no file {path}") from None


def read_at(root: Path, revision: str, path: str) -> bytes:
    """A file as it is at any git revision. Raises VersionError."""
    done = subprocess.run(["git", "show", f"{revision}:{_prefix(root)}{path}"], cwd=root, capture_output=True)
    if done.returncode != 0:
        raise VersionError(f"{revision} holds no file {path}")
    return done.stdout


def unrecorded(root: Path, paths: list[str], revisions: list[str]) -> list[str]:
    """The files whose content none of these git revisions has under the same name."""
    there = [path for path in paths if (root / path).is_file()]
    if not there or not revisions:
        return there
    asked, prefix = [(path, revision) for path in there for revision in revisions], _prefix(root)
    names = "".join(f"{revision}:{prefix}{path}\n" for path, revision in asked)
    blobs = git(root, "cat-file", "--batch-check=%(objectname)", text=names).splitlines()
    recorded = {(path, blob) for (path, _), blob in zip(asked, blobs, strict=True)}
    mine = git(root, "hash-object", "--no-filters", "--", *there).splitlines()
    return [path for path, blob in zip(there, mine, strict=True) if (path, blob) not in recorded]


def lock(root: Path, version: RunVersion) -> dict[str, Any]:
    """Its dvc.lock: `{"stages": {name: {"cmd", "deps", "params", "outs"}}}`."""
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(read(root, version, LOCK).decode("utf-8")) or {"stages": {}}


def _names(version: RunVersion, name: str) -> bool:
    short = version.tag.removeprefix("run/")
    key = short.partition("-")[2]
    return any(text.startswith(name) for text in (version.tag, short, key))


def _tree(root: Path, facts: Facts) -> str:
    """The tracked files as they are, with dvc.lock and the figures, as a tree object."""
    figures = {name: root / path for name, path in KEPT.items() if (root / path).is_file()}
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        mine = root / git(root, "rev-parse", "--git-path", "index")
        if mine.is_file():
            shutil.copyfile(mine, index["GIT_INDEX_FILE"])
        git(root, "add", "--update", ":/", environment=index)
        named = [name for name in (LOCK, PARAMS, POINTER) if (root / name).is_file()]
        git(root, "add", "--force", "--", *named, environment=index)
        facts_blob = git(root, "hash-object", "-w", "--stdin", text=_json(root, facts))
        blobs = {FACTS: facts_blob}
        blobs |= {name: git(root, "hash-object", "-w", "--", str(path)) for name, path in figures.items()}
        for name, blob in blobs.items():
            git(
                root,
                "update-index",
                "--add",
                "--cacheinfo",
                f"100644,{blob},{_prefix(root)}{name}",
                environment=index,
            )
        return git(root, "write-tree", environment=index)


def _json(root: Path, facts: Facts) -> str:
    decision = root / KEPT["metrics/decision.json"]
    decided = json.loads(decision.read_text(encoding="utf-8")) if decision.is_file() else {}
    kept = {"decision": decided.get("decision"), "candidate": decided.get("candidate")}
    return json.dumps({**asdict(facts), **kept, "parent": _revision(root, "HEAD")}, indent=1) + "\n"


def _message(root: Path, name: str, facts: Facts) -> str:
    decision = root / KEPT["metrics/decision.json"]
    reason = json.loads(decision.read_text(encoding="utf-8")).get("reason", "") if decision.is_file() else ""
    lines = [
        f"{name}: {len(facts.ran)} stages run on data {facts.data[:8]}",
        "",
        *([reason, ""] if reason else []),
        f"Profile: {facts.profile}",
        f"Data: {facts.data}",
        *([f"MLflow-Run: {facts.mlflow_run}"] if facts.mlflow_run else []),
        *([f"Prefect-Run: {facts.prefect_run}"] if facts.prefect_run else []),
    ]
    return "\n".join(lines) + "\n"


def _list(root: Path, pattern: str) -> list[RunVersion]:
    """The versions whose tags fit, by two calls of git however many there are.

    A tag of that name which a person made, or another project of the same repository, is none.
    """
    form = "%(refname)%00%(objectname)%00%(*objectname)%00%(creatordate:unix)"
    lines = git(root, "for-each-ref", f"--format={form}", pattern).splitlines()
    tags = [(name, peeled or own, when) for name, own, peeled, when in (line.split("\0") for line in lines)]
    names = "".join(f"{commit}:{_prefix(root)}{FACTS}\n" for _, commit, _ in tags)
    texts = _blobs(git(root, "cat-file", "--batch", text=names) if tags else "")
    return [
        RunVersion(
            **{**facts, "ran": tuple(facts["ran"])},
            tag=name.removeprefix("refs/tags/"),
            commit=commit,
            when=datetime.fromtimestamp(int(seconds), UTC),
        )
        for (name, commit, seconds), text in zip(tags, texts, strict=True)
        if text is not None and (facts := json.loads(text))
    ]


def _blobs(batch: str) -> list[str | None]:
    """The contents that `git cat-file --batch` printed, None for what is not there.

    They are JSON in ASCII, so that its sizes count characters.
    """
    contents: list[str | None] = []
    while batch:
        header, _, batch = batch.partition("\n")
        if header.endswith(" missing"):
            contents.append(None)
            continue
        size = int(header.split()[2])
        contents.append(batch[:size])
        batch = batch[size + 1 :]
    return contents


def _is_repository(root: Path) -> bool:
    done = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], cwd=root, capture_output=True)
    return done.returncode == 0


def _head(root: Path) -> str:
    done = subprocess.run(
        ["git", "symbolic-ref", "--quiet", "HEAD"], cwd=root, capture_output=True, text=True
    )
    return done.stdout.strip()


def _prefix(root: Path) -> str:
    """Where the checkout lies in its repository: empty, or `folder/`."""
    return git(root, "rev-parse", "--show-prefix")


def _revision(root: Path, name: str) -> str | None:
    found = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    done = subprocess.run(found, cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or None


def _author(root: Path) -> dict[str, str]:
    """Nothing where git knows who commits; else a name of our own, so that a bare machine can record."""
    done = subprocess.run(["git", "var", "GIT_COMMITTER_IDENT"], cwd=root, capture_output=True)
    return {} if done.returncode == 0 else AUTHOR


def git(
    root: Path, *arguments: str, text: str | None = None, environment: dict[str, str] | None = None
) -> str:
    """What git prints; `text` is its input. Raises VersionError."""
    done = subprocess.run(
        ["git", *arguments],
        cwd=root,
        env={**os.environ, **(environment or {})},
        input=text,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise VersionError(f"`git {' '.join(arguments[:2])}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> None:
    """Print every run version."""
    from flows.environment import root

    for version in versions(root()):
        print(
            f"{version.tag}  {version.when:%Y-%m-%d %H:%M}  data {version.data[:8]}  {version.decision or ''}"
        )


if __name__ == "__main__":
    main()
