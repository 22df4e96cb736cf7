"""A stage reruns when code that it imports changes: the deps in dvc.yaml are the import closure."""

from __future__ import annotations

from tests.support import dvc_deps
from tests.support.imports import REPOSITORY, closure, imported


def test_every_stage_depends_on_the_code_it_imports() -> None:
    wrong = dvc_deps.differences()
    assert not wrong, f"run `python -m tests.support.dvc_deps --write`:\n{dvc_deps.describe(wrong)}"


def test_exemptions_exist_and_say_why() -> None:
    for path, reason in dvc_deps.EXEMPT.items():
        assert (REPOSITORY / path).is_file(), f"{path} is exempt but does not exist"
        assert len(reason) > 10


def test_closure_follows_imports_inside_functions() -> None:
    assert "tasks.fingerprint" in imported("tasks/tracking.py")  # imported inside find_producer
    assert "tasks/fingerprint.py" in closure("tasks/tracking.py")


def test_every_stage_tracks_its_section_and_owns_its_out() -> None:
    for name, body in dvc_deps.stages(dvc_deps.load()).items():
        section = dvc_deps.module_of(body).removeprefix("tasks.")
        sections = {section, "${item.trainer}"}  # the section that trains a round: dpo or grpo
        assert sections & set(body["params"]), f"{name} does not track its section '{section}'"
        assert all(out.startswith("artifacts/") for out in body["outs"])


def test_every_file_that_is_no_python_is_a_dep_of_its_reader() -> None:
    known = (*dvc_deps.DATA_FOLDERS, *(folder for folders in dvc_deps.READ.values() for folder in folders))
    files = [p for package in ("models", "tasks") for p in (REPOSITORY / package).rglob("*") if p.is_file()]
    names = [p.relative_to(REPOSITORY).as_posix() for p in files if p.suffix not in (".py", ".pyc")]
    unknown = [name for name in names if not name.startswith(known)]
    assert not unknown, f"name who reads them in tests/support/dvc_deps.py: {unknown}"
