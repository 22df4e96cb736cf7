"""Training in one process, and in two under DeepSpeed's ZeRO-3: the same model, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import distributed
from models.guard import TrainingError
from models.training import divided
from tasks import launch
from tests.support import commands, ranks

ROOT = Path(__file__).parents[2]
KINDS = ("sft", "dpo", "dpo_sft", "grpo")
CLOSE, EXACT = 1e-5, 1e-6
"""Two processes add gradients in another order than one does; one does in the same, killed or not."""


def in_two(folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """tests.support.ranks in two processes, each on a thread of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", "hardware/2cpu-zero3.yaml"]
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("PYTEST", "MASTER"))}
    return commands.run(
        [*command, *options, "-m", "tests.support.ranks", str(folder), kind],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", launch.STARTED: "1"},
        timeout_s=240,
    )


def outcome(folder: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """Weights and (step, loss)."""
    from safetensors.torch import load_file

    weights = load_file(folder / "out/model.safetensors")
    return weights, json.loads((folder / "out/losses.json").read_text())["losses"]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same(one: Path, other: Path, within: float, after: int = 0) -> None:
    """Equal weights, the same files, and equal losses of the steps after the one it went on from."""
    (weights, losses), (expected, curve) = outcome(one), outcome(other)
    assert apart(weights, expected) < within
    assert [step for step, _ in losses] == list(range(after + 1, len(curve) + 1))
    for (_, loss), (_, same) in zip(losses, curve[after:], strict=True):
        assert loss == pytest.approx(same, abs=within)
    assert {path.name for path in (one / "out").iterdir()} == {
        path.name for path in (other / "out").iterdir()
    }
    assert not (one / "steps").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process trains, uninterrupted."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in KINDS:
        ranks.train(kind, folder / kind)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_that_split_the_weights_train_what_one_does(alone: Path, tmp_path: Path) -> None:
    """One run is killed: what goes on is a checkpoint in the middle of its first epoch."""
    killed = in_two(tmp_path, "dpo_sft=3")
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert not (tmp_path / "dpo_sft/out").exists()
    shutil.copytree(tmp_path / "dpo_sft", tmp_path / "then one")
    for kind in KINDS:
        done = in_two(tmp_path, kind)
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same(tmp_path / kind, alone / kind, CLOSE, after=2 if kind == "dpo_sft" else 0)
    # One process cannot take up the optimizer's states of two, and begins again.
    ranks.train("dpo_sft", tmp_path / "then one")
    assert_same(tmp_path / "then one", alone / "dpo_sft", CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo_sft"])
def test_one_process_that_was_killed_ends_with_the_same_numbers(
    kind: str, alone: Path, tmp_path: Path
) -> None:
    """By a real `kill -9`, in the middle of the second epoch."""
    command = [sys.executable, "-m", "tests.support.ranks", str(tmp_path), f"{kind}=5"]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert killed.returncode == -signal.SIGKILL
    ranks.train(kind, tmp_path / kind)
    assert_same(tmp_path / kind, alone / kind, EXACT, after=4)


def test_processes_divide_the_rows_of_a_step() -> None:
    budget = replace(ranks.BUDGET, batch_size=4, accumulate=6)
    assert divided(budget, 1) == budget
    assert divided(budget, 3) == replace(budget, accumulate=2)
    assert divided(budget, 4) == replace(budget, batch_size=1)
    with pytest.raises(TrainingError, match="a multiple of 5"):
        divided(budget, 5)


def test_every_process_makes_as_many_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    taken = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        taken.append(distributed.share([10, 11, 12, 13]))
    assert taken == [[10, 13], [11, 10], [12, 11]]
    assert distributed.share([]) == []


def test_every_file_of_hardware_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {name: launch.read(name) for name in launch.names()}
    assert found["2cpu-zero3"].processes == 2 and found["8gpu-zero3-offload"].offload
    assert found["2x8gpu-zero3"].machines == 2 and found["8gpu-zero2"].zero_stage == 2
    listed = Path("hardware/README.md").read_text()
    assert all(f"`{name}`" in listed for name in found)


def test_hardware_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(launch.HardwareError, match="there are 1gpu-offload, 2cpu-zero3"):
        launch.read("16gpu")
    with pytest.raises(launch.HardwareError, match=r"wants 8 GPUs, and there are \d"):
        launch.check(launch.read("8gpu-zero3"))


def test_a_stage_begins_again_in_its_processes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    begun: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: begun.append(words))
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--round", "r1"])
    launch.spread()
    monkeypatch.setenv(launch.VARIABLE, "2cpu-zero3")
    monkeypatch.setenv("MACHINE_RANK", "1")
    launch.spread()
    monkeypatch.setenv(launch.STARTED, "1")
    launch.spread()
    assert len(begun) == 1
    words = " ".join(begun[0])
    assert "accelerate.commands.launch --config_file hardware/2cpu-zero3.yaml --machine_rank 1" in words
    assert words.endswith("--round r1")


def test_a_process_ends_with_its_launcher(tmp_path: Path) -> None:
    """Which `kill -9` ends without a word to them."""
    waits = (
        "import pathlib, sys, time; from tasks import launch; launch.spread();"
        "folder = pathlib.Path(sys.argv[1]);"
        "(folder / 'begun').touch(); time.sleep(4); (folder / 'outlived').touch()"
    )
    starts = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", starts, "-c", waits, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {launch.STARTED: "1"},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    time.sleep(5)
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]
