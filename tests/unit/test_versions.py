"""Runs as versions, on a real git repository."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from flows import versions
from flows.versions import Facts, VersionError

DATA = "ab12" + "0" * 28 + ".dir"


def git(root: Path, *arguments: str) -> str:
    named = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", *named, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, an edit, a staged file, and a file that git does not know."""
    git(tmp_path, "init", "-q", "-b", "mine")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "code.py").write_text("one\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  first: {cmd: 'true'}\n")
    (tmp_path / "code.py").write_text("two\n")
    (tmp_path / "staged.py").write_text("three\n")
    git(tmp_path, "add", "staged.py")
    (tmp_path / "secret.txt").write_text("never\n")
    decision = tmp_path / "artifacts/promote/decision.json"
    decision.parent.mkdir(parents=True)
    decision.write_text(json.dumps({"decision": "promote", "candidate": "r3", "reason": "r3 is better — è"}))
    return tmp_path


def test_a_version_holds_what_ran_and_touches_nothing_of_the_users(checkout: Path) -> None:
    before = git(checkout, "status", "--porcelain"), git(checkout, "rev-parse", "HEAD")
    made = versions.record(checkout, Facts(DATA, "tiny", "mlflow", "prefect", ("first", "dpo@r1")))
    assert made and (git(checkout, "status", "--porcelain"), git(checkout, "rev-parse", "HEAD")) == before
    assert versions.read(checkout, made, "code.py") == b"two\n"
    assert versions.read(checkout, made, "staged.py") == b"three\n"
    assert list(versions.lock(checkout, made)["stages"]) == ["first"]
    assert json.loads(versions.read(checkout, made, "metrics/decision.json"))["candidate"] == "r3"
    with pytest.raises(VersionError, match=r"holds no file secret\.txt"):
        versions.read(checkout, made, "secret.txt")
    assert (made.data, made.ran, made.decision, made.candidate) == (
        DATA,
        ("first", "dpo@r1"),
        "promote",
        "r3",
    )
    assert made.parent == before[1].strip()


def test_recording_the_same_again_is_the_same_version(checkout: Path) -> None:
    first = versions.record(checkout, Facts(DATA, "tiny"))
    assert versions.record(checkout, Facts(DATA, "tiny", ran=("first",))) == first
    assert versions.versions(checkout) == [first]


def test_versions_follow_each_other_and_are_found_by_name(checkout: Path) -> None:
    first = versions.record(checkout, Facts(DATA, "tiny"))
    (checkout / "params.yaml").write_text("seed: 1\n")
    second = versions.record(checkout, Facts(DATA, "tiny"))
    assert first and second
    assert git(checkout, "rev-list", "--count", versions.BRANCH).strip() == "3"
    assert set(versions.versions(checkout)) == {first, second}
    newest = versions.versions(checkout)[0]
    for name in (first.tag, first.tag[4:], first.tag[-8:], first.tag[-8:-3], first.commit):
        assert versions.resolve(checkout, name) == first, name
    assert versions.resolve(checkout, "latest") == versions.resolve(checkout, DATA[:6]) == newest
    with pytest.raises(VersionError, match=f"no run version 'nothing'; there are: .*{first.tag}"):
        versions.resolve(checkout, "nothing")
    with pytest.raises(VersionError, match="names 2 run versions"):
        versions.resolve(checkout, "run/")


def test_no_repository_no_version_and_our_branch_is_ours(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = tmp_path_factory.mktemp("plain")
    assert versions.record(plain, Facts(DATA, "tiny")) is None and versions.versions(plain) == []
    with pytest.raises(VersionError, match="no run version yet"):
        versions.resolve(plain, "latest")
    versions.record(checkout, Facts(DATA, "tiny"))
    git(checkout, "stash", "-u")
    git(checkout, "checkout", "-q", "longview/runs")
    (checkout / "params.yaml").write_text("seed: 2\n")
    with pytest.raises(VersionError, match="git switch"):
        versions.record(checkout, Facts(DATA, "tiny"))


def test_a_checkout_below_its_repository(checkout: Path) -> None:
    below = checkout / "below"
    below.mkdir()
    (below / "params.yaml").write_text("seed: 0\n")
    git(checkout, "add", "-A", "below")
    made = versions.record(below, Facts(DATA, "tiny"))
    assert made and versions.read(below, made, "params.yaml") == b"seed: 0\n"
    assert versions.versions(below) == [made]


def test_other_tags_of_that_name_are_no_versions(checkout: Path) -> None:
    made = versions.record(checkout, Facts(DATA, "tiny"))
    assert made
    git(checkout, "tag", "run/mine", "HEAD")
    git(checkout, "tag", "--annotate", "run/noted", "--message", "x", made.commit)
    assert {version.tag for version in versions.versions(checkout)} == {made.tag, "run/noted"}
    assert {version.commit for version in versions.versions(checkout)} == {made.commit}
