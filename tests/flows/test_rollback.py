"""Back to an earlier run, and how data versions differ: real git, DVC cache and remote, a small project."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import data, pipeline, restoring, versions
from flows.recovery import BusyError
from flows.restoring import RollbackError
from flows.versions import Facts, RunVersion
from tests.support.commands import longview
from tests.support.mini import REPOSITORY, executed, flow_environment, make_project

pytestmark = pytest.mark.flows


def dvc(project: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=project, check=True)


def record(number: int, answer: str, image: str = "a.png") -> dict[str, object]:
    return {
        "id": str(number),
        "question": f"question {number}",
        "answer": answer,
        "images": [f"images/{image}"],
    }


def run_once(project: Path, records: list[dict[str, object]], picture: bytes) -> RunVersion:
    """New data, every stage by DVC, the push and the version, as a run does them."""
    (project / "data/images").mkdir(exist_ok=True)
    (project / "data/images/a.png").write_bytes(picture)
    (project / "data/records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    dvc(project, "add", "data")
    dvc(project, "repro")
    dvc(project, "push")
    made = versions.record(project, Facts(str(data.version(project)), "embedded"))
    assert made
    return made


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunVersion]]:
    project = make_project(tmp_path_factory.mktemp("two") / "project")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "add", "-A"], cwd=project, check=True)
    subprocess.run([*git, "commit", "-qm", "project"], cwd=project, check=True)
    with chdir(project):
        first = run_once(project, [record(1, "3"), record(2, "4"), record(3, "5")], b"one")
        second = run_once(project, [record(1, "3"), record(2, "6"), record(9, "1" * 40)], b"two")
    return project, [first, second]


@pytest.fixture
def project(
    two_runs: tuple[Path, list[RunVersion]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of it to spoil, at the second run."""
    folder = shutil.copytree(two_runs[0], tmp_path / "project", symlinks=True)
    monkeypatch.setenv("LONGVIEW_ROOT", str(folder))
    monkeypatch.setenv("LONGVIEW_TRACKING", "off")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture
def runs(two_runs: tuple[Path, list[RunVersion]]) -> list[RunVersion]:
    return two_runs[1]


def lengths(project: Path) -> dict[str, str]:
    """What the stages made of the data."""
    return {
        str(path.relative_to(project)): path.read_text() for path in project.glob("artifacts/**/table.md")
    }


def is_clean(project: Path) -> bool:
    found = {**pipeline.data_states(project), **pipeline.states(project)}
    return {state.state for state in found.values()} == {"up to date"}


def test_back_and_forth_without_running_a_stage(project: Path, runs: list[RunVersion]) -> None:
    second, ran = lengths(project), executed(project)
    done = restoring.restore(project, runs[0].tag)
    assert (done.tag, done.data, done.before, done.fetched) == (runs[0].tag, runs[0].data, runs[1].tag, 0)
    assert lengths(project) != second and is_clean(project)
    assert '"3"' in (project / "data/records.jsonl").read_text() and executed(project) == ran
    assert longview("data", "rollback", str(done.before)).exit_code == 0
    assert lengths(project) == second and is_clean(project) and executed(project) == ran


def test_what_the_cache_lacks_comes_from_the_remote(project: Path, runs: list[RunVersion]) -> None:
    shutil.rmtree(project / ".dvc/cache")
    said = longview("data", "rollback", runs[0].data[:6])
    assert said.exit_code == 0 and "came from the remote" in said.output and is_clean(project)
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / ".work/remote")
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "data",
        "rollback",
        runs[1].tag,
    ]  # DVC logs to its own stderr
    done = subprocess.run(
        command, cwd=project, env=flow_environment(project), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "neither the cache nor the remote" in done.stderr


def test_work_that_is_saved_nowhere_is_not_overwritten(project: Path, runs: list[RunVersion]) -> None:
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "mine: 1\n")
    (project / "data/records.jsonl").write_text("{}\n")
    with pytest.raises(RollbackError, match=r"would be overwritten: params\.yaml, data"):
        restoring.restore(project, runs[0].tag)
    assert "mine" in (project / "params.yaml").read_text()
    done = restoring.restore(project, runs[0].tag, force=True)
    assert done.kept and is_clean(project)
    assert (project / done.kept / "data/records.jsonl").read_text() == "{}\n"
    assert "mine" in (project / done.kept / "params.yaml").read_text()


def test_a_run_elsewhere_as_the_guide_says(project: Path, runs: list[RunVersion]) -> None:
    guide = (REPOSITORY / "docs/operating.md").read_text().splitlines()
    first = next(number for number, line in enumerate(guide) if "git worktree add" in line)
    commands = "\n".join(guide[first : first + 2]).replace("run/20261123-1a2b3c4d", runs[0].tag)
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": binaries}
    subprocess.run(["bash", "-euc", commands], cwd=project, env=environment, check=True, capture_output=True)
    assert '"3"' in (project.parent / "then/data/records.jsonl").read_text()
    subprocess.run(
        ["dvc", "status", "--quiet"], cwd=project.parent / "then", env=environment, check=True
    )  # exit status 1 if something is not as it was


def test_other_code_is_named_and_restored_only_if_asked(project: Path, runs: list[RunVersion]) -> None:
    stage = project / "stage.py"
    theirs = stage.read_text()
    stage.write_text(theirs + "# changed\n")
    with pytest.raises(RollbackError, match=r"made by other code: stage\.py\n.*--with-code"):
        restoring.restore(project, runs[0].tag)
    with pytest.raises(RollbackError, match=r"would be overwritten: stage\.py"):
        restoring.restore(project, runs[0].tag, with_code=True)
    done = restoring.restore(project, runs[0].tag, with_code=True, force=True)
    assert done.code == ("stage.py",) and stage.read_text() == theirs and is_clean(project)


def test_while_dvc_runs_a_stage_nothing_is_taken_from_under_it(project: Path, runs: list[RunVersion]) -> None:
    (project / "control/side.hang").touch()
    by_hand = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "side", "-q"], cwd=project
    )
    before = executed(project)
    while executed(project) == before:
        assert by_hand.poll() is None
        time.sleep(0.05)
    with pytest.raises(BusyError, match="a DVC command is at work"):
        restoring.restore(project, runs[0].tag)
    (project / "control/side.hang").unlink()
    assert by_hand.wait(60) == 0
    restoring.restore(project, runs[0].tag)
    assert is_clean(project)


def test_killed_on_its_way_the_same_again_finishes_it(project: Path, runs: list[RunVersion]) -> None:
    restoring.write(project, runs[0], list(restoring.RESTORED))  # and no file of DVC's
    assert not is_clean(project)
    restoring.restore(project, runs[0].tag)
    assert is_clean(project)


def test_killed_among_the_files_the_same_again_finishes_it(
    project: Path, runs: list[RunVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc_data.hashfile import checkout

    class Killed(BaseException):
        pass

    whole, linked = checkout._checkout_file, []

    def one_file_of_data_then_killed(link: Any, path: str, *words: Any, **options: Any) -> Any:
        if linked:
            raise Killed
        if "/data/" in path:
            linked.append(path)
        return whole(link, path, *words, **options)

    monkeypatch.setattr(checkout, "_checkout_file", one_file_of_data_then_killed)
    with pytest.raises(Killed):
        restoring.restore(project, runs[0].tag)
    monkeypatch.setattr(checkout, "_checkout_file", whole)
    mixed = (project / "data/images/a.png").read_bytes(), (project / "data/records.jsonl").read_text()
    assert (mixed[0] == b"one") == ('"6"' in mixed[1])  # one file of each run
    restoring.restore(project, runs[0].tag)
    assert is_clean(project)


def test_each_file_is_looked_at_once_before_and_once_in_the_end(
    project: Path, runs: list[RunVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc import output

    whole, looks = output.build, Counter[str]()

    def counted(odb: Any, path: str, *words: Any, **options: Any) -> Any:
        looks[str(Path(path).relative_to(project))] += 1
        return whole(odb, path, *words, **options)

    monkeypatch.setattr(output, "build", counted)
    restoring.restore(project, runs[0].tag)
    assert looks["data"] == 2 and max(looks.values()) == 2


@pytest.fixture(scope="module")
def two_large_runs(
    two_runs: tuple[Path, list[RunVersion]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[RunVersion]]:
    """Two more runs, on 120 images of which ten differ."""
    project = shutil.copytree(two_runs[0], tmp_path_factory.mktemp("large") / "project", symlinks=True)
    with chdir(project):
        made = []
        for first in (b"three", b"four"):
            for number in range(120):
                content = first if number < 10 else b"same"
                (project / f"data/images/{number}.png").write_bytes(content + str(number).encode())
            made.append(run_once(project, [record(1, first.decode())], first))
    return project, made


@pytest.fixture
def many(
    two_large_runs: tuple[Path, list[RunVersion]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[RunVersion], Counter[str]]:
    """A copy of it, at the second run; how often DVC is asked for a path from now on."""
    from dvc import output

    project = shutil.copytree(two_large_runs[0], tmp_path / "project", symlinks=True)
    monkeypatch.setenv("LONGVIEW_ROOT", str(project))
    monkeypatch.chdir(project)
    restoring.restore(project, "latest")  # nothing to do, but what is there is noted
    whole, looks = output.build, Counter[str]()

    def counted(odb: Any, path: str, *words: Any, **options: Any) -> Any:
        looks[str(Path(path).relative_to(project))] += 1
        return whole(odb, path, *words, **options)

    monkeypatch.setattr(output, "build", counted)
    return project, two_large_runs[1], looks


def test_thousands_of_files_are_known_without_asking_dvc(
    many: tuple[Path, list[RunVersion], Counter[str]],
) -> None:
    project, made, looks = many
    for run in (*made, made[0]):
        restoring.restore(project, run.tag)
        assert looks["data"] == 0 and looks["artifacts/side"] == 2
        looks.clear()
    assert (project / "data/images/3.png").read_bytes() == b"three3" and is_clean(project)
    dvc(project, "status")


@pytest.mark.parametrize("path", ["data/images/3.png", "data/images/99.png", "data/images/new.png"])
def test_among_thousands_an_edit_is_not_overwritten(
    many: tuple[Path, list[RunVersion], Counter[str]], path: str
) -> None:
    project, made, _ = many
    (project / path).write_bytes(b"mine")
    with pytest.raises(RollbackError, match=r"would be overwritten: data"):
        restoring.restore(project, made[0].tag)
    assert (project / path).read_bytes() == b"mine"


def test_an_edit_among_thousands_meanwhile_is_found(
    many: tuple[Path, list[RunVersion], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.output import Output

    project, made, _ = many
    whole = Output.checkout

    def and_an_edit(out: Any, *words: Any, **options: Any) -> Any:
        done = whole(out, *words, **options)
        (project / "data/images/99.png").write_bytes(b"meanwhile")  # one that both runs have
        return done

    monkeypatch.setattr(Output, "checkout", and_an_edit)
    with pytest.raises(RollbackError, match=r"restored, but not up to date: data\.dvc"):
        restoring.restore(project, made[0].tag)


def test_an_edit_of_a_folder_that_stays_meanwhile_is_found(
    many: tuple[Path, list[RunVersion], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, made, _ = many
    whole = restoring.check_out

    def and_an_edit(*words: Any) -> int:
        fetched = whole(*words)
        (project / "data/images/99.png").write_bytes(b"meanwhile")
        return fetched

    monkeypatch.setattr(restoring, "check_out", and_an_edit)
    for _ in range(2):  # and is not taken for what was there, ever after
        with pytest.raises(RollbackError, match=r"not up to date: data\.dvc|would be overwritten: data"):
            restoring.restore(project, made[1].tag)
    assert not is_clean(project)


def test_killed_while_a_file_is_copied_the_same_again_finishes_it(
    many: tuple[Path, list[RunVersion], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, made, _ = many

    class Killed(BaseException):
        pass

    def half_then_killed(source: str, target: Path) -> None:
        target.write_bytes(Path(source).read_bytes()[:2])
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(restoring.linking, "shutil", SimpleNamespace(copyfile=half_then_killed))
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # a kill runs no `finally`
        restoring.restore(project, made[0].tag)
    assert [*(project / "data").rglob(f"*{restoring.linking.PART}")]
    restoring.restore(project, made[0].tag)
    assert is_clean(project) and not [*project.rglob(f"*{restoring.linking.PART}")]


def test_a_full_disk_is_named(
    many: tuple[Path, list[RunVersion], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, made, _ = many

    def full(source: str, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(restoring.linking, "shutil", SimpleNamespace(copyfile=full))
        with pytest.raises(RollbackError, match=r"/data/.+: No space left on device\n.*longview gc"):
            restoring.restore(project, made[0].tag)
    restoring.restore(project, made[0].tag)
    assert is_clean(project)


def test_where_blocks_cannot_be_shared_it_is_not_tried_for_each_file(
    many: tuple[Path, list[RunVersion], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc_objects.fs import system

    project, made, _ = many
    tried: list[str] = []

    def refused(source: str, target: str) -> None:
        tried.append(target)
        raise OSError(errno.ENOTSUP, "no reflinks here")

    monkeypatch.setattr(system, "reflink", refused)
    restoring.restore(project, made[0].tag)
    assert (project / "data/images/3.png").read_bytes() == b"three3" and len(tried) < 10


def test_a_selection_made_by_hand_is_not_undone(project: Path, runs: list[RunVersion]) -> None:
    (project / "data/images/a.png").unlink()
    with pytest.raises(RollbackError, match=r"would be overwritten: data"):
        restoring.restore(project, runs[0].tag)


def test_versions_and_their_difference(project: Path, runs: list[RunVersion]) -> None:
    listed = json.loads(longview("data", "versions", "--json").output)
    assert [(v["md5"], v["in_use"], v["records"], v["runs"]) for v in listed] == [
        (run.data, run is runs[1], 3, [run.tag]) for run in reversed(runs)
    ]
    assert longview("data", "versions").exit_code == 0
    shutil.rmtree(project / ".dvc/cache")  # then from the remote
    found = json.loads(longview("data", "diff", runs[0].tag, "--json").output)
    assert (found["added"], found["removed"]) == (1, 1)
    assert found["changed"] == {"records": 2, "answer": 1, "image": 2}
    assert found["before"]["answers"] == {"3": 1, "4": 1, "5": 1} and found["after"]["answer_length"] == 14
    assert [e["id"] for e in found["examples"]["changed"]] == ["1", "2"]
    assert found["examples"]["removed"][0]["before"]["question"] == "question 3"
    said = longview("data", "diff", runs[0].data[:6], runs[1].data[:6]).output
    assert "added 1, removed 1, changed 2 (" in said and "question 2 -> 6" in said
    assert "no data version 'ffff'" in longview("data", "diff", "ffff").output
