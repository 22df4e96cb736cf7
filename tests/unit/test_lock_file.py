"""dvc.lock as we write it: what DVC would have written."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from dvc.utils.serialize import load_yaml, modify_yaml

from flows import lock_file

VALUES = {
    "none": None,
    "rate": 1e-5,
    "text": ["1e-5", "yes", "007", "", "b: c", "ü 漢", "one\ntwo\n", "long " * 40],
    "number": [0.1, 3, 12345678901234567890, float("inf"), True],
    "empty": [[], {}],
    "nested": [1, [2, {"x": None}]],
}


def test_it_is_what_dvc_would_have_written(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.lock", tmp_path / "dvc.lock"
    for path, modify in ((theirs, modify_yaml), (ours, lock_file.modify)):
        for stage in ("second", "first"):
            with modify(path) as content:
                content["schema"] = "2.0"
                entry = OrderedDict(cmd=f"run {stage}", params={"params.yaml": VALUES})
                content.setdefault("stages", {})[stage] = entry
    assert load_yaml(ours) == load_yaml(theirs)
    assert list(load_yaml(ours)["stages"]) == ["second", "first"]
    same = [line for line in theirs.read_text().splitlines() if "none" not in line]
    assert len(set(same) - set(ours.read_text().splitlines())) <= 2, "laid out alike, so that diffs are short"
    assert [path.name for path in tmp_path.iterdir()].count("dvc.lock") == 1


def test_dvc_writes_its_lock_file_with_it_and_other_files_by_itself(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = """
from flows import lock_file
from dvc import dvcfile
lock_file.install()
for name in ("dvc.lock", "dvc.yaml"):
    with dvcfile.modify_yaml(name) as content:
        content["a"] = None
"""
    (tmp_path / "dvc.yaml").write_text("# a comment\nb: 1\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "dvc.lock").read_text() == "a: null\n"
    assert (tmp_path / "dvc.yaml").read_text() == "# a comment\nb: 1\na:\n"
