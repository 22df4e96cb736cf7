"""A miniature project for tests: real git, real DVC, trivial stages that finish in a moment.

    from tests.support.mini import make_project

`control/` steers its stages: a file `control/STAGE.fail` makes that stage fail with the file's text, a file
`control/STAGE.hang` makes it wait until the file is gone. `control/executed.txt` gets a line an execution.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from flows import profile

REPOSITORY = Path(__file__).resolve().parents[2]

STAGE = """
import os, sys, time
from pathlib import Path

name, out, *inputs = sys.argv[1:]
with open("control/executed.txt", "a") as file:
    file.write(f"{name} {os.getpid()} {os.environ.get('LONGVIEW_PARENT_RUN_ID', '')}\\n")
print(f"stage {name} at work", flush=True)
while Path(f"control/{name}.hang").exists():
    time.sleep(0.05)
fail = Path(f"control/{name}.fail")
if fail.exists():
    sys.exit(fail.read_text())
files = [f for i in inputs for f in ([Path(i)] if Path(i).is_file() else sorted(Path(i).rglob("*")))]
text = "".join(f.read_text() for f in files if f.is_file())
Path(out).mkdir(parents=True, exist_ok=True)
Path(out, "table.md").write_text(f"| {name} | {len(text)} |\\n")
Path(out, "metrics.json").write_text('{"length": {"mean": 2.5}}')
"""

DVC_YAML = """
stages:
  first:
    desc: The first stage
    cmd: python stage.py first artifacts/reasoning_sft data
    deps: [data, stage.py]
    params: [first]
    outs: [artifacts/reasoning_sft]
  dpo:
    foreach: ${rounds}
    do:
      desc: Round ${key}
      cmd: python stage.py dpo@${key} artifacts/rounds/${key}/dpo ${item.policy}
      deps: ["${item.policy}", stage.py]
      outs: ["artifacts/rounds/${key}/dpo"]
  side:
    desc: A stage beside the rounds
    cmd: python stage.py side artifacts/side data
    deps: [data]
    outs: [artifacts/side]
  compare:
    desc: The last stage
    cmd: python stage.py compare artifacts/compare artifacts/rounds artifacts/side
    deps: [artifacts/rounds, artifacts/side]
    outs: [artifacts/compare]
"""

PROFILE = "profile: embedded\nseed: 0\n# about first\nfirst: {size: 1}\nrounds: 2\n"


def make_project(folder: Path) -> Path:
    """A project at `folder` with its data tracked and nothing run."""
    for name in ("control", "profiles", "data", ".dvc"):
        (folder / name).mkdir(parents=True)
    (folder / "stage.py").write_text(STAGE)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "profiles/embedded.yaml").write_text(PROFILE)
    (folder / "profiles/big.yaml").write_text("first: {size: 9}\nrounds: 1\n")
    (folder / "data/records.jsonl").write_text('{"id": "1"}\n')
    (folder / ".gitignore").write_text("/data\n/artifacts\n/.work\n/control\n")
    shutil.copy(REPOSITORY / ".dvc/config", folder / ".dvc/config")
    shutil.copy(REPOSITORY / ".dvcignore", folder / ".dvcignore")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    profile.activate(folder, "embedded")  # dvc.yaml cannot be read without the rounds
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "add", "-q", "data"]):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def executed(folder: Path) -> list[str]:
    """The stages that ran, in order."""
    path = folder / "control/executed.txt"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def flow_environment(folder: Path) -> dict[str, str]:
    """The environment of `python -m flows.retrain` run in `folder`."""
    paths = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "LONGVIEW_ROOT": str(folder),
        "LONGVIEW_TRACKING": "off",
        "PYTHONUNBUFFERED": "1",
    }
