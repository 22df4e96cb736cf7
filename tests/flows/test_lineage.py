"""`longview explain` and `longview gc` on a project with three runs: real git, DVC and MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows import recovery, versions
from flows.versions import Facts, RunVersion
from tests.support.commands import longview
from tests.support.mini import make_project

pytestmark = pytest.mark.flows
ROUND = "artifacts/rounds/r2/dpo"


def dvc(project: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "--quiet"], cwd=project, check=True)


def git(project: Path, *arguments: str) -> str:
    named = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", *named, *arguments], cwd=project, check=True, capture_output=True, text=True
    )
    return done.stdout


def run_once(project: Path, text: str) -> RunVersion:
    """One run on this data, recorded in MLflow as stages record themselves, pushed, and made a version."""
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput

    from tasks import tracking
    from tasks.recorder import dvc_source

    (project / "data/records.jsonl").write_text(text)
    dvc(project, "add", "data")
    dvc(project, "repro")
    dvc(project, "push")
    client = tracking.client()
    experiment = tracking.experiment_id(client)
    parent = client.create_run(experiment).info.run_id
    from flows.lineage import snapshot

    found = snapshot(project)
    for stage, entry in found.stages.items():
        tags = {f"longview.out.{out['path']}": out["md5"] for out in entry["outs"]}
        run = client.create_run(
            experiment, tags={**tags, "longview.stage": stage, "mlflow.parentRunId": parent}
        )
        sets = [
            MetaDataset(dvc_source(dep["path"], dep["md5"]), name=dep["path"], digest=dep["md5"])
            for dep in entry["deps"]
        ]
        client.log_inputs(run.info.run_id, [DatasetInput(each._to_mlflow_entity(), []) for each in sets])
        client.set_terminated(run.info.run_id)
    assert found.data
    made = versions.record(project, Facts(found.data.md5, "embedded", parent, None, tuple(found.stages)))
    assert made
    return made


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunVersion]]:
    """A project with three runs on three data versions; the first one's last round is champion."""
    from tasks import promotion
    from tasks.registry import Agents, Registry

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project = make_project(tmp_path_factory.mktemp("three") / "project")
        stage = project / "stage.py"  # so that other data make other files all the way down
        stage.write_text(stage.read_text().replace("{len(text)}", "{text}"))
        git(project, "add", "-A")
        git(project, "commit", "-qm", "project")
        with chdir(project):
            runs = [run_once(project, f'{{"id": "{i}"}}\n' * (i + 1)) for i in range(3)]
            md5 = {
                out["path"]: out["md5"] for out in versions.lock(project, runs[0])["stages"]["dpo@r2"]["outs"]
            }
            answers = project / "predictions.jsonl"
            answers.write_text("{}\n")
            registry, agents = Registry(), Agents(md5[ROUND], md5[ROUND])
            candidate = promotion.Candidate("r2", agents, answers, {"promoted_over": "base"})
            version = promotion.register(registry, candidate, renew=True)
            promotion.promote(registry, version, "gate", "the first")
            # As it is left of a wait: on the champion it names nobody.
            registry.client.set_registered_model_alias(registry.model, "challenger", version.number)
        answers.unlink()
    return project, runs


@pytest.fixture
def project(
    three_runs: tuple[Path, list[RunVersion]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of it to spoil."""
    folder = shutil.copytree(three_runs[0], tmp_path / "project")
    monkeypatch.setenv("LONGVIEW_ROOT", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture
def runs(three_runs: tuple[Path, list[RunVersion]]) -> list[RunVersion]:
    return three_runs[1]


def objects(project: Path) -> set[Path]:
    return {path for path in (project / ".dvc/cache/files").rglob("*") if path.is_file()}


def spoil(path: Path) -> None:
    """One flipped byte; size and time as they were."""
    info = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_the_chain_of_the_champion_is_whole_whatever_was_run_since(
    project: Path, runs: list[RunVersion]
) -> None:
    shown = longview("explain", "champion", "--json")
    assert shown.exit_code == 0, shown.output
    chain: dict[str, Any] = json.loads(shown.stdout)
    assert chain["source"] == runs[0].tag and chain["data"]["md5"] == runs[0].data
    assert [step["stage"] for step in chain["steps"]] == ["first", "dpo@r1", "dpo@r2"]
    first, r1, r2 = chain["steps"]
    assert [read["path"] for read in first["reads"]] == ["data"] and first["params"] == {"first": {"size": 1}}
    assert r1["reads"] == first["makes"] and r2["reads"] == r1["makes"]
    assert r2["command"].startswith("python stage.py dpo@r2") and r2["code"][0]["path"] == "stage.py"
    assert {step["run"] for step in chain["steps"]} == {runs[0].tag}
    assert {step["commit"] for step in chain["steps"]} == {runs[0].commit}
    assert {step["mlflow"]["parent"] for step in chain["steps"]} == {runs[0].mlflow_run}


def test_what_can_be_asked_for_and_how_it_is_shown(project: Path, runs: list[RunVersion]) -> None:
    text = longview("explain", "r2", "--at", runs[1].tag).stdout
    assert f"as of {runs[1].tag}" in text and "data version" in text and text.count("stage.py first") == 1
    assert "as of workspace" in longview("explain", f"{ROUND}/table.md").stdout
    everything = longview("explain", "artifacts/compare").stdout
    assert everything.count("python stage.py first") == 1 and "first (above)" not in everything
    assert "data/records.jsonl" in longview("explain", "data/records.jsonl").stdout
    graph = longview("explain", "1", "--mermaid").stdout
    assert graph.startswith("flowchart TD") and graph.count("-->") == 6
    assert longview("explain", "r2", "--dot").stdout.count("->") == 6
    for name, words in (
        ("challenger", "no registered version 'challenger'; there are: longview version 1 (champion)"),
        (f"{ROUND}/nothing", "no file that workspace holds"),
        ("stage.py", "is no model"),
    ):
        refused = longview("explain", name)
        assert refused.exit_code == 1 and words in refused.stderr, refused.output


def test_verify_finds_a_flipped_byte_that_size_and_time_do_not_show(
    project: Path, runs: list[RunVersion]
) -> None:
    good = longview("explain", "champion", "--verify"), longview("explain", ROUND, "--verify")
    assert all(done.exit_code == 0 and "nothing differs" in done.stdout for done in good), good[1].output
    spoil(project / ROUND / "table.md")
    found = longview("explain", ROUND, "--verify")
    assert found.exit_code == 1 and f"DIFFERS: workspace {ROUND}: table.md (changed)" in found.stderr
    assert longview("explain", "champion", "--verify").exit_code == 0  # another version: not its files
    from flows.objects import opened

    with opened(project) as dvcs:
        made = versions.lock(project, runs[0])["stages"]["dpo@r2"]["outs"][0]["md5"]
        cached = dvcs.path((dvcs.listing(made) or {})["table.md"])
    spoil(cached)
    found = longview("explain", "champion", "--verify")
    assert found.exit_code == 1 and f"DIFFERS: cache {ROUND}: table.md ({cached})" in found.stderr
    cached.unlink()
    away = longview("explain", "champion", "--verify")
    assert away.exit_code == 0 and f"dvc pull {ROUND}" in away.stdout
    shutil.rmtree(project / ".work/remote")
    lost = longview("explain", "champion", "--verify")
    assert lost.exit_code == 1 and "neither here nor in the remote" in lost.stderr


def test_verify_finds_a_broken_chain_and_records_that_disagree(project: Path) -> None:
    lock = project / "dvc.lock"
    md5 = next(
        out["md5"]
        for out in versions.lock(project, versions.versions(project)[0])["stages"]["dpo@r1"]["outs"]
    )
    head, _, tail = lock.read_text().partition("dpo@r2:")
    lock.write_text(f"{head}dpo@r2:{tail.replace(md5, '0' * 32 + '.dir', 1)}")
    found = longview("explain", ROUND, "--verify")
    assert found.exit_code == 1
    assert "DIFFERS: chain dpo@r2 read artifacts/rounds/r1/dpo" in found.stderr
    assert "DIFFERS: mlflow dpo@r2 in run" in found.stderr


def test_data_versions_are_listed_without_mlflow(
    project: Path, runs: list[RunVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = json.loads(longview("data", "versions", "--json").stdout)
    assert [row["models"] for row in known] == [[], [], ["longview version 1 (champion)"]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    away = longview("data", "versions", "--json")
    assert away.exit_code == 0 and "note: the models are not known: MLflow at" in away.stderr, away.output
    assert json.loads(away.stdout) == [{**row, "models": None} for row in known]
    shown = longview("data", "versions").stdout
    assert shown.count("unknown") == 3 and runs[0].data[:8] in shown
    status = longview("status")
    assert status.exit_code == 0 and "champion  unknown: MLflow at" in status.stdout
    shutil.rmtree(project / ".dvc")
    for words in (("versions",), ("diff", runs[0].data[:8])):
        broken = longview("data", *words)
        assert broken.exit_code == 1 and "DVC: " in broken.stderr and isinstance(broken.exception, SystemExit)


def restored(project: Path, version: RunVersion, folder: Path) -> bool:
    """Whether a fresh clone gets every byte of a version from this project's cache alone."""
    subprocess.run(["git", "clone", "-q", str(project), str(folder)], check=True)
    git(folder, "checkout", "-q", version.commit)
    dvc(folder, "cache", "dir", str(project / ".dvc/cache"), "--local")
    dvc(folder, "checkout")
    return dvc_status(folder)


def dvc_status(folder: Path) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], cwd=folder, check=True, capture_output=True
    )
    return json.loads(done.stdout) == {}


def test_gc_deletes_what_nothing_needs_and_every_kept_run_can_be_restored(
    project: Path, runs: list[RunVersion], tmp_path: Path
) -> None:
    scratch = project / ".work/first/0123456789abcdef"
    scratch.mkdir(parents=True)
    (scratch / "checkpoint").write_bytes(b"x" * 1000)
    aside = project / ".work/data_watch/data"  # as flows/data_watch.py leaves it
    aside.mkdir(parents=True)
    (aside / "records.jsonl").write_text("half")
    assert str(aside) not in longview("gc", "--keep-runs", "1").stdout, "it is young"
    policy = ("--keep-runs", "1", "--keep-days", "0")
    before = objects(project)
    shown = longview("gc", *policy, "--remote", "local")
    assert shown.exit_code == 0, shown.output
    assert f"{runs[1].tag}  data {runs[1].data[:8]}  GOES" in shown.stdout
    assert "stays: trained longview version 1 (champion)" in shown.stdout and str(scratch) in shown.stdout
    assert "nothing was deleted" in shown.stdout and objects(project) == before
    assert len(versions.versions(project)) == 3 and scratch.is_dir()
    done = longview("gc", *policy, "--remote", "local", "--yes")
    assert done.exit_code == 0 and "deleted" in done.stdout, done.output
    assert [v.tag for v in versions.versions(project)] == [runs[2].tag, runs[0].tag]
    gone = before - objects(project)
    assert gone and not scratch.exists() and not aside.exists()
    remote = {path.name for path in (project / ".work/remote").rglob("*") if path.is_file()}
    assert not remote & {path.name for path in gone}
    assert remote < {path.name for path in objects(project)}  # HEAD's own data was never pushed
    for number in (0, 2):
        assert restored(project, runs[number], tmp_path / str(number))
    assert dvc_status(project) and longview("explain", "champion", "--verify").exit_code == 0
    again = longview("gc", *policy)
    assert "cache: 0 of" in again.stdout and runs[1].commit in (project / ".work/gc.log").read_text()


def test_gc_keeps_pins_branches_and_worktrees(project: Path, runs: list[RunVersion]) -> None:
    policy = ("gc", "--keep-runs", "1", "--keep-days", "0")
    assert longview("gc", "--pin", runs[1].tag).exit_code == 0
    assert "stays: pinned" in longview(*policy).stdout
    assert longview("gc", "--unpin", runs[1].tag).exit_code == 0
    assert longview("gc", "--unpin", runs[1].tag).exit_code == 1
    assert "cache: 0 of" not in longview(*policy).stdout
    git(project, "branch", "mine", runs[1].commit)
    assert "cache: 0 of" in longview(*policy).stdout  # its tag goes, its files stay
    git(project, "branch", "-D", "mine")
    git(project, "worktree", "add", "-q", "--detach", "../beside", runs[1].commit)
    assert "cache: 0 of" in longview(*policy).stdout


def test_gc_keeps_what_an_import_promised_back(project: Path, runs: list[RunVersion], tmp_path: Path) -> None:
    from flows import data
    from tasks import data_import

    policy = ("gc", "--keep-runs", "1", "--keep-days", "7", "--yes")
    for number, text in enumerate(("mine", "others'", "newer")):
        (project / "data/records.jsonl").write_text(text)
        dvc(project, "add", "data")
        if number < 2:
            data_import.keep_pointer(project, str(data.version(project)))
    mine, other = sorted(project.glob(".work/data_import/*.pointer"), key=lambda path: path.stat().st_mtime)
    beside = tmp_path / "beside/.work/data_import" / other.name
    git(project, "worktree", "add", "-q", "--detach", str(tmp_path / "beside"))
    dvc(tmp_path / "beside", "cache", "dir", str(project / ".dvc/cache"), "--local")
    beside.parent.mkdir(parents=True)
    other.rename(beside)
    os.utime(beside, (0, 0))
    shown = longview(*policy)
    assert shown.exit_code == 0 and f"data {mine.stem[:8]}  stays: replaced by an import" in shown.stdout
    os.utime(mine, (0, 0))
    back = {text: data_of(project, pointer) for text, pointer in (("mine", mine), ("others'", beside))}
    assert back == {text: text for text in back}
    shown = longview(*policy)
    assert shown.exit_code == 0 and f"data {mine.stem[:8]}  GOES" in shown.stdout and not mine.exists()
    assert data_of(project, beside) == "others'", "the other checkout's: gc there decides"
    assert not (project / ".dvc/cache/files/md5" / mine.stem[:2] / mine.stem[2:]).exists()


def data_of(project: Path, pointer: Path) -> str:
    """The records that a pointer leads back to; data/ is as before then."""
    now = (project / "data.dvc").read_bytes()
    shutil.copy(pointer, project / "data.dvc")
    dvc(project, "checkout", "--force", "data.dvc")
    text = (project / "data/records.jsonl").read_text()
    (project / "data.dvc").write_bytes(now)
    dvc(project, "checkout", "--force", "data.dvc")
    return text


def test_gc_refuses_where_it_cannot_know(project: Path, runs: list[RunVersion]) -> None:
    policy = ("gc", "--keep-runs", "1", "--keep-days", "0", "--yes")
    before = objects(project)
    with recovery.exclusive(project):
        busy = longview(*policy)
    assert busy.exit_code == 1 and "is alive" in busy.stderr
    (project / ".dvc/config.local").write_text("[cache]\n    dir = ../../shared\n")
    shutil.copytree(project / ".dvc/cache", project.parent / "shared")
    outside = longview(*policy)
    assert outside.exit_code == 1 and "lies outside this checkout" in outside.stderr
    (project / ".dvc/config.local").unlink()
    (project / ".work/mlflow/mlflow.db").write_text("no database")
    unknown = longview(*policy)
    assert unknown.exit_code == 1 and "cannot be asked" in unknown.stderr
    assert objects(project) == before and len(versions.versions(project)) == 3


@contextmanager
def at_work(project: Path) -> Iterator[None]:
    """A DVC command's note that a stage of it runs, as `dvc repro` leaves it, for a process that lives."""
    lock = project / ".dvc/tmp/rwlock"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        lock.write_text(json.dumps({"write": {"artifacts/side": {"pid": process.pid, "cmd": "dvc repro"}}}))
        yield
        process.kill()
    lock.unlink()


def test_gc_waits_for_runs_of_other_checkouts(
    project: Path, runs: list[RunVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import checkouts

    policy = ("gc", "--keep-runs", "1", "--keep-days", "0")
    beside, clone, before = tmp_path / "beside", tmp_path / "clone", objects(project)
    git(project, "worktree", "add", "-q", "--detach", str(beside))
    subprocess.run(["git", "clone", "-q", "--no-tags", str(project), str(clone)], check=True)
    for folder, also in ((beside, ()), (clone, ("--also", str(clone)))):
        dvc(folder, "cache", "dir", str(project / ".dvc/cache"), "--local")
        with recovery.exclusive(folder):
            monkeypatch.setenv("LONGVIEW_ROOT", str(project))  # the run is another process
            assert longview(*policy, *also).exit_code == 0, "a look is none of its business"
            busy = longview(*policy, *also, "--yes")
        assert busy.exit_code == 1 and f"{folder}: another run" in busy.stderr
        with at_work(folder):
            busy = longview(*policy, *also, "--yes")
        assert busy.exit_code == 1 and f"a DVC command is at work in {folder}" in busy.stderr
        assert objects(project) == before and len(versions.versions(project)) == 3
    with checkouts.held(project, [clone], alone=True) as projects:
        assert set(projects) == {project, beside, clone}
        for folder in projects:
            with pytest.raises(recovery.BusyError), recovery.exclusive(folder):
                pass
    nowhere = longview(*policy, "--also", str(tmp_path / "nowhere"), "--yes")
    assert nowhere.exit_code == 1 and "is no checkout" in nowhere.stderr
    assert longview(*policy, "--also", str(project), "--also", str(clone), "--yes").exit_code == 0
    assert objects(project) < before
