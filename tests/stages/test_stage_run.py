"""A stage's surroundings on a real MLflow store: pytest tests/stages/test_stage_run.py."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks import tracking
from tasks.fingerprint import fingerprint
from tasks.stage import StageError, open_stage

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Params:
    epochs: int = 2
    inner: Inner = Inner()


def store():
    found = tracking.client()
    return found, tracking.experiment_id(found)


def runs_of(stage):
    found, experiment = store()
    return found.search_runs([experiment], f"tags.`longview.stage` = '{stage}'")


def train(out="artifacts/dpo", **changes):
    options = {"params": Params(), "inputs": ["data"], "out": out, "round": 1, **changes}
    with open_stage("dpo", **options) as run:
        (run.out / "checkpoint").mkdir()
        (run.out / "checkpoint" / "weights.bin").write_bytes(b"w" * 100)
        for step in range(5):
            run.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
        run.metrics({"reward": {"mean": 0.123456789}, "note": "text", "pairs": 7})
        checkpoint = run.out / "checkpoint"
        run.generation("r1", checkpoint, round=1, parents=["sft"], kind="reasoning")
        return run.scratch


def test_a_stage_leaves_a_manifest_metrics_and_one_complete_run(checkout):
    scratch = train()
    manifest = json.loads(Path("artifacts/dpo/manifest.json").read_text())
    assert manifest == {
        "stage": "dpo@r1",
        "inputs": {"data": fingerprint("data")},
        "params": {"epochs": 2, "inner": {"rate": 0.1}},
        "counts": {"checkpoint/": 100, "metrics.json": Path("artifacts/dpo/metrics.json").stat().st_size},
    }
    assert json.loads(Path("artifacts/dpo/metrics.json").read_text())["reward"]["mean"] == 0.123457
    assert not scratch.exists()
    (run,) = runs_of("dpo@r1")
    assert run.info.status == "FINISHED" and run.info.run_name == "dpo@r1"
    assert run.data.params == {"epochs": "2", "inner/rate": "0.1"}
    assert run.data.metrics["reward/mean"] == 0.123457 and run.data.metrics["loss"] == 0.2
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("data", fingerprint("data"))
    assert data.dataset.source_type == "dvc"
    found, _ = store()
    assert len(found.get_metric_history(run.info.run_id, "loss")) == 5
    assert {file.path for file in found.list_artifacts(run.info.run_id)} == {"manifest.json", "metrics.json"}


def test_a_checkpoint_becomes_a_logged_model_that_can_be_registered_and_found_by_its_bytes(checkout):
    import mlflow

    train()
    found, experiment = store()
    (model,) = found.search_logged_models([experiment])
    md5 = fingerprint("artifacts/dpo/checkpoint")
    assert model.name == "r1" and model.model_type == "reasoning" and model.status == "READY"
    assert model.params["checkpoint_md5"] == md5 and model.params["data_version"] == fingerprint("data")
    assert model.params["round"] == "1" and model.params["parents"] == "sft"
    assert model.params["checkpoint"] == "artifacts/dpo/checkpoint"
    assert {metric.key: metric.value for metric in model.metrics}["reward/mean"] == 0.123457
    assert mlflow.register_model(f"models:/{model.model_id}", "longview").version in (1, "1")
    run = tracking.find_producer("artifacts/dpo")
    assert run.data.tags["longview.stage"] == "dpo@r1"
    assert tracking.find_producer("artifacts/dpo/checkpoint", found=found).info.run_id == run.info.run_id
    assert tracking.find_producer("data", found=found) is None


def test_evaluation_metrics_belong_to_the_checkpoint_that_was_read(checkout):
    train()
    with open_stage(
        "evaluate", params={}, inputs=["data", "artifacts/dpo"], out="artifacts/e", round=1
    ) as run:
        run.metrics({"reasoning": 0.7})
    found, experiment = store()
    (model,) = found.search_logged_models([experiment])
    assert {(m.key, m.dataset_name) for m in model.metrics if m.key == "reasoning"} == {("reasoning", "data")}
    (run,) = runs_of("evaluate@r1")
    read = found.get_run(run.info.run_id).inputs.model_inputs
    assert [item.model_id for item in read] == [model.model_id]


def test_children_hang_under_the_flow_and_sum_up_their_round_on_it(checkout, monkeypatch):
    found, experiment = store()
    parent = found.create_run(experiment, run_name="retrain").info.run_id
    monkeypatch.setenv("LONGVIEW_PARENT_RUN_ID", parent)
    with tracking.shared_recorder():
        for number in (1, 2):
            with open_stage(
                "score", params={}, inputs=["data"], out=f"artifacts/s{number}", round=number
            ) as run:
                run.metrics({"reward": number / 2})
    (run,) = runs_of("score@r2")
    assert run.data.tags["mlflow.parentRunId"] == parent
    history = found.get_metric_history(parent, "score/reward")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 1.0)]
    assert "LONGVIEW_RECORDER" not in os.environ


def test_a_failing_stage_is_marked_and_keeps_its_scratch(checkout):
    with (
        pytest.raises(ValueError, match="bad"),
        open_stage("judge", params={}, inputs=["data"], out="artifacts/j") as run,
    ):
        (run.scratch / "journal").write_text("half")
        raise ValueError("bad")
    (record,) = runs_of("judge")
    assert record.info.status == "FAILED" and record.data.tags["longview.error"] == "ValueError: bad"
    assert not Path("artifacts/j/manifest.json").exists()
    with open_stage("judge", params={}, inputs=["data"], out="artifacts/j") as again:
        assert (again.scratch / "journal").read_text() == "half"


def test_a_killed_stage_is_marked_killed(checkout):
    code = """
        from tasks.stage import open_stage
        import time
        with open_stage("judge", params={}, inputs=["data"], out="artifacts/j") as run:
            print("ready", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.time() + 60
    while not (found := runs_of("judge")) or found[0].info.status == "RUNNING":
        assert time.time() < deadline
        time.sleep(0.3)
    assert found[0].info.status == "KILLED"


class TestWithoutRecords:
    """What needs no MLflow."""

    @pytest.fixture(autouse=True)
    def off(self, checkout, monkeypatch):
        monkeypatch.setenv("LONGVIEW_TRACKING", "off")

    def test_two_executions_write_the_same_bytes(self):
        train(out="artifacts/a")
        train(out="artifacts/b")
        assert fingerprint("artifacts/a") == fingerprint("artifacts/b")

    def test_scratch_depends_on_inputs_and_parameters(self):
        first = train()
        assert train(params=Params(epochs=3)) != first
        Path("data/more.txt").write_text("x")
        assert train() != first

    def test_the_output_starts_empty(self):
        Path("artifacts/dpo").mkdir(parents=True)
        Path("artifacts/dpo/stale").write_text("old")
        train()
        assert not Path("artifacts/dpo/stale").exists()

    def test_a_missing_input_says_what_to_do(self):
        with (
            pytest.raises(StageError, match=r"nowhere.*dvc repro"),
            open_stage("x", params={}, inputs=["nowhere"], out="artifacts/x"),
        ):
            pass

    def test_an_input_that_changes_meanwhile_refuses_to_publish(self):
        with (
            pytest.raises(StageError, match="changed"),
            open_stage("x", params={}, inputs=["data"], out="artifacts/x"),
        ):
            Path("data/records.jsonl").write_text("{}\n")
        assert not Path("artifacts/x/manifest.json").exists()

    def test_a_metric_that_is_not_a_number_is_refused(self):
        with (
            pytest.raises(StageError, match="nan"),
            open_stage("x", params={}, inputs=["data"], out="artifacts/x") as run,
        ):
            run.metrics({"loss": float("nan")})

    def test_other_ranks_touch_nothing(self, monkeypatch):
        train()
        before = fingerprint("artifacts/dpo", cache=False)
        monkeypatch.setenv("RANK", "1")
        with open_stage("dpo", params=Params(), inputs=["data"], out="artifacts/dpo", round=1) as run:
            run.log_metrics({"loss": 1.0})
        assert fingerprint("artifacts/dpo", cache=False) == before


def test_a_silent_server_stops_the_stage_before_it_works(checkout, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with (
        pytest.raises(tracking.TrackingError, match="LONGVIEW_TRACKING=off"),
        open_stage("x", params={}, inputs=["data"], out="artifacts/x"),
    ):
        raise AssertionError("must not start")


def test_fingerprints_are_dvc_s_own(checkout):
    tree = Path("artifacts/tree")
    for name, content in {
        "b.txt": "b",
        "a/ü.txt": "ü\r\n",
        "a/b/c.bin": "c" * 3_000_000,
        "a.txt": "",
        "A": "1",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)
    (tree / "a" / "__pycache__").mkdir()
    (tree / "a" / "__pycache__" / "x.pyc").write_text("x")
    Path(".dvcignore").write_text("__pycache__/\n")
    (tree / "empty").mkdir()
    dvc = [sys.executable, "-m", "dvc"]
    quiet = {**os.environ, "DVC_NO_ANALYTICS": "true"}
    subprocess.run([*dvc, "init", "--no-scm", "-q"], check=True, env=quiet)
    subprocess.run([*dvc, "add", "-q", "artifacts/tree", "data/records.jsonl"], check=True, env=quiet)
    from ruamel.yaml import YAML

    for path in ("artifacts/tree", "data/records.jsonl"):
        (entry,) = YAML(typ="safe").load(Path(f"{path}.dvc").read_text())["outs"]
        assert fingerprint(path) == entry["md5"]


def test_a_cached_fingerprint_notices_a_change(checkout):
    old = time.time() - 100
    file = Path("data/records.jsonl")
    os.utime(file, (old, old))
    first = fingerprint("data")
    assert json.loads(Path(".work/fingerprints.json").read_text())["data"]["md5"] == first
    text = file.read_text()
    file.write_text(text.replace("1", "3"))
    assert fingerprint("data") != first
    file.write_text(text)
    assert fingerprint("data") == first


def test_importing_the_stage_is_cheap():
    code = (
        "import sys, tasks.stage; print(any(m in sys.modules for m in ('mlflow', 'torch', 'pandas', 'dvc')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
