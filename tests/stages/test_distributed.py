"""Training in two processes under DeepSpeed's ZeRO-3: the same model as in one, killed or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import distributed
from models.guard import TrainingError
from models.training import divided
from tasks import launch
from tests.support import ranks

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5


def in_two(kind: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """ranks.train in two processes, each on a thread of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", "hardware/2cpu-zero3.yaml", "--main_process_port", "0"]  # 0: any that is free
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("PYTEST", "MASTER"))}
    return subprocess.run(
        [*command, *options, "-m", "tests.support.ranks", kind, str(folder), *words],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def outcome(folder: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """Weights and (step, loss)."""
    from safetensors.torch import load_file

    weights = load_file(folder / "out/model.safetensors")
    return weights, json.loads((folder / "out/losses.json").read_text())["losses"]


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kill"), [("sft", "3"), ("dpo", None), ("dpo_sft", "3")])
def test_two_processes_that_split_the_weights_train_what_one_does(
    kind: str, kill: str | None, tmp_path: Path
) -> None:
    """Killed in the middle of the second epoch, where a kill is given, after a checkpoint."""
    ranks.train(kind, tmp_path / "one")
    if kill:
        killed = in_two(kind, tmp_path / "two", kill)
        assert killed.returncode != 0 and "SIGKILL" in killed.stderr
        assert not (tmp_path / "two/out").exists() and any((tmp_path / "two/steps").iterdir())
    done = in_two(kind, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    (weights, losses), (alone, expected) = outcome(tmp_path / "two"), outcome(tmp_path / "one")
    assert apart(weights, alone) < CLOSE
    assert [step for step, _ in losses] == [step for step, _ in expected if not kill or step > 2]
    for (_, loss), (_, same) in zip(losses, expected[-len(losses) :], strict=True):
        assert loss == pytest.approx(same, abs=CLOSE)
    files = {path.name for path in (tmp_path / "two/out").iterdir()}
    assert files == {path.name for path in (tmp_path / "one/out").iterdir()}
    assert not (tmp_path / "two/steps").exists()


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
