"""params.yaml: strict, with messages that say where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tasks import params
from tests.support.imports import REPOSITORY


@dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["sigmoid", "mpo"] = "mpo"


@dataclass(frozen=True)
class Params:
    steps: int
    inner: Inner
    names: list[str] = field(default_factory=list)
    limit: int | None = None
    weights: dict[str, float] = field(default_factory=dict)
    pair: tuple[int, int] = (0, 1)
    fast: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError("steps must not be negative")


GOOD = (
    "dpo: {steps: 3, inner: {rate: 1e-5}, names: [a], weights: {x: 1}, limit: null, pair: [1, 2]}\nseed: 7\n"
)


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def test_nested_sections_become_dataclasses(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    found = params.load("dpo", Params, path)
    assert found == Params(3, Inner(1e-5), ["a"], None, {"x": 1.0}, (1, 2))
    assert isinstance(found.weights["x"], float)
    assert params.load("dpo.inner", Inner, path) == Inner(1e-5)
    assert params.seed(path) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo: {stepz: 3, inner: {rate: 1}}", "dpo: unknown key 'stepz'; did you mean 'steps'?"),
        ("dpo: {steps: x, inner: {rate: 1}}", "dpo.steps: expected an integer, found 'x'"),
        ("dpo: {steps: true, inner: {rate: 1}}", "dpo.steps: expected an integer, found True"),
        ("dpo: {steps: 3}", "dpo: key 'inner' is missing"),
        ("dpo: {steps: 3, inner: {rate: '1e-5'}}", "dpo.inner.rate: expected a number"),
        ("dpo: {steps: 3, inner: {rate: 1, kind: mpoo}}", "did you mean 'mpo'?"),
        ("dpo: {steps: 3, inner: {rate: 1}, names: a}", "dpo.names: expected a list"),
        ("dpo: {steps: 3, inner: {rate: 1}, names: [1]}", "dpo.names[0]: expected a text"),
        ("dpo: {steps: 3, inner: {rate: 1}, limit: x}", "dpo.limit: expected an integer"),
        ("dpo: {steps: 3, inner: {rate: 1}, pair: [1]}", "dpo.pair: expected 2 values, found 1"),
        ("dpo: {steps: 3, inner: {rate: 1}, fast: 1}", "dpo.fast: expected true or false"),
        ("dpo: {steps: -1, inner: {rate: 1}}", "dpo: steps must not be negative"),
        ("dpo: 3", "dpo: expected a section with keys"),
        ("dop: {}", "no section 'dpo'; did you mean 'dop'?"),
        ("- 1", "expected a mapping of sections"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faults_name_file_section_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(params.ParamsError) as caught:
        params.load("dpo", Params, path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(params.ParamsError, match="longview run"):
        params.seed(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "rounds", ["{r2: {t: 1, policy: a}}", "{r1: {t: 2, policy: a}}", "{r1: {t: 1}}", "3"]
)
def test_rounds_must_be_r1_r2_and_so_on(tmp_path: Path, rounds: str) -> None:
    with pytest.raises(params.ParamsError, match="rounds"):
        params.validate(write(tmp_path, f"profile: x\nseed: 0\nrounds: {rounds}\n"))


def test_a_section_of_no_stage_is_refused(tmp_path: Path) -> None:
    text = "profile: x\nseed: 0\nrounds: {r1: {t: 1, policy: a}}\nparam: {}\n"
    with pytest.raises(params.ParamsError, match="section 'param' belongs to no stage"):
        params.validate(write(tmp_path, text))


def profiles() -> list[str]:
    return sorted(p.stem for p in (REPOSITORY / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("name", profiles())
def test_every_shipped_profile_parses(tmp_path: Path, name: str) -> None:
    from flows import profile

    (tmp_path / "profiles").symlink_to(REPOSITORY / "profiles")
    profile.activate(tmp_path, name)
    params.validate(tmp_path / "params.yaml", skip_missing=True)


def test_shipped_params_are_the_embedded_profile() -> None:
    from flows import profile

    assert profile.edits(REPOSITORY, profile._load(REPOSITORY / "params.yaml")) == []
    assert params.read(REPOSITORY / "params.yaml")["profile"] == "embedded"


def test_a_key_left_out_of_a_budget_keeps_the_default_of_its_stage() -> None:
    from tasks import dpo
    from tasks.params import parse

    published = dpo.Params().budget
    given = parse({"budget": {"epochs": 2}}, dpo.Params, "params.yaml: dpo").budget
    assert (given.epochs, given.learning_rate, given.batch_size) == (2, 5e-7, 64)
    assert published.epochs == 1 and published.learning_rate == given.learning_rate
