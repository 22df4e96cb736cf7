"""Profiles of real models are whole; the dry run's arithmetic, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import plan, profile
from models.families import of_type
from tests.support.imports import REPOSITORY

MODELS = [name for name in profile.available(REPOSITORY) if name not in ("embedded", "tiny")]


def parsed(name: str) -> dict[str, Any]:
    return profile.parse(REPOSITORY, name)


@pytest.mark.parametrize("name", MODELS)
def test_profiles_of_models_are_whole(name: str) -> None:
    p = parsed(name)
    base = p["foundation"].hub.partition("@")[0]
    assert plan.PINNED.fullmatch(p["foundation"].hub) and of_type(str(plan.SIZES[base].model_type))
    assert {p["engines"].generator.kind, p["engines"].path_judge.kind} == {"openai"}
    assert all(row.gpu_hours and row.memory_gb for row in plan.rows(p))
    served = (REPOSITORY / f"profiles/{name}.yaml").read_text()
    for role in (p["engines"].generator, p["engines"].answer_judge, p["engines"].path_judge):
        assert f"vllm serve {role.model} --revision " in served and f"--port {role.url[-7:-3]}" in served
    budgets = [p[stage].budget for stage in ("reasoning_sft", "summary_sft", "dpo", "grpo")]
    assert [(b.epochs, b.learning_rate) for b in budgets] == [(2, 5e-6), (1, 1e-5), (1, 5e-7), (1, 1e-6)]
    assert all(b.optimizer == "adamw" and b.max_tokens == 12288 and b.bf16 for b in budgets)
    assert {
        p[stage].prompts for stage in ("foundation", "assess", "reasoning_sft", "dpo", "grpo", "evaluate")
    } == {"full"}


def test_the_papers_base_has_the_papers_numbers() -> None:
    p = parsed("llava-next-8b")
    assert p["generate"].questions == 200_000 and p["score"].max_pairs == 15_000 and len(p["rounds"]) == 3
    assert p["dpo"].loss.types == ["sigmoid"] and p["dpo"].loss.beta == 0.1
    chain = p["generate"].chain
    assert (chain.min_steps, chain.max_steps, chain.max_new_tokens, chain.attempts) == (2, 16, 1024, 3)
    assert (chain.temperature, chain.top_p, chain.repetition_penalty) == (0.7, 0.95, 1.05)


def test_estimates_are_flops_over_speed() -> None:
    model = "Qwen/Qwen2-72B-Instruct"
    hour = 3600 * plan.GPU_FLOPS / plan.SIZES[model].parameters
    assert plan.serving("s", model, hour * plan.READING, 0).gpu_hours == pytest.approx(2)
    assert plan.training("t", model, hour * plan.TRAINING).gpu_hours == pytest.approx(6)
    assert plan.training("t", model, hour * plan.TRAINING, reference=True).gpu_hours == pytest.approx(8)
    assert plan.training("t", "own/model", 5).gpu_hours is None


def test_a_round_by_grpo_samples_while_it_trains() -> None:
    p = parsed("qwen3-vl-8b")
    later = {**p["rounds"], "r2": replace(p["rounds"]["r2"], trainer="grpo")}
    found = {row.stage: row for row in plan.rows({**p, "rounds": later})}
    written = p["sample"].questions * p["grpo"].group.generations * plan.CHAIN
    assert (found["dpo@r1"].written, found["dpo@r2"].written) == (0, written)
    assert (
        found["dpo@r2"].gpu_hours
        > plan.training("t", found["dpo@r2"].model, found["dpo@r2"].trained).gpu_hours
    )


def test_memory_is_split_between_processes_and_saved_by_adapters() -> None:
    """Sixteen bytes a parameter in one process; what ZeRO splits; two, or half a one, under adapters."""
    from models.adapters import Lora
    from tasks.launch import read
    from tasks.training_memory import fits, per_gpu

    zero3, zero2 = read("8gpu-zero3", REPOSITORY), read("8gpu-zero2", REPOSITORY)
    assert per_gpu(8e9, 0, None) == 16 * 8e9
    assert per_gpu(8e9, 0, None, zero3) == 16 * 8e9 / 8
    assert per_gpu(8e9, 0, None, zero2) == (2 + 14 / 8) * 8e9
    assert per_gpu(8e9, 0, Lora(rank=64)) == pytest.approx(8e9 * (2 + 16 * 0.02))
    assert per_gpu(8e9, 0, Lora(rank=64, quantized=True)) == pytest.approx(8e9 * (0.52 + 16 * 0.02))
    ways = list(fits(8e9, 0, None, 20e9, REPOSITORY))
    assert "--hardware 8gpu-zero3" in ways and "--hardware 8gpu-zero2" not in ways
    assert ways[-2:] == ["lora: {rank: 64} on one GPU", "lora: {rank: 64, quantized: true} on one GPU"]


def test_every_problem_is_found_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.setattr(plan, "_listens", lambda url: False)
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    found = {(f.subject, f.level): f.text for f in plan.problems(parsed("qwen2.5-vl-7b"), tmp_path)}
    assert "torchvision" in found["foundation", "problem"] and "VLLM_PYTHON" in found["reasoner", "problem"]
    assert "no server at http://127.0.0.1:8001/v1" in found["generator", "problem"]
    assert "data" in {subject for subject, _ in found} and "GB" in found["reasoning_sft", "problem"]


def test_a_dry_run_shows_all_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from flows.cli import app

    before = (REPOSITORY / "params.yaml").read_bytes()
    monkeypatch.setenv("LONGVIEW_ROOT", str(REPOSITORY))
    done = CliRunner().invoke(app, ["run", "--profile", "llava-next-8b", "--dry-run"])
    assert done.exit_code == 1 and "nothing was run" in done.output, done.output
    for words in ("Qwen/Qwen2-VL-72B-Instruct", "dpo@r3", "GPU-hours", "no server at", "needs 1"):
        assert words in done.output
    assert (REPOSITORY / "params.yaml").read_bytes() == before


def test_a_profile_may_name_what_the_embedded_one_leaves_to_its_default(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    embedded = (REPOSITORY / "profiles/embedded.yaml").read_text()
    (tmp_path / "profiles/embedded.yaml").write_text(embedded)
    for name, text in (("good", "dpo: {budget: {bf16: true}}\n"), ("bad", "dpo: {budget: {bf61: true}}\n")):
        (tmp_path / f"profiles/{name}.yaml").write_text(text)
    assert profile.parse(tmp_path, "good")["dpo"].budget.bf16
    with pytest.raises(profile.ProfileError, match="did you mean 'bf16'"):
        profile.build(tmp_path, "bad")
