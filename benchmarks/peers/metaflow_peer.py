"""Metaflow: a flow with one step a stage, each running its command. Metaflow runs every step in a process.

python benchmarks/peers/metaflow_peer.py STAGES.json    # [[name, command], …], in their folder

A flow's steps are read from its source, so this writes the source of a flow with these stages and runs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = """
import subprocess
from metaflow import FlowSpec, step

class Pipeline(FlowSpec):
"""
STEP = """
    @step
    def {name}(self):
        {run}
        {then}
"""


def source(stages: list[list[str]]) -> str:
    """The flow: start, every stage, end."""
    names = ["start", *(re.sub(r"\W", "_", name) for name, _ in stages), "end"]
    runs = [
        "pass",
        *(f"subprocess.run(['sh', '-c', {command!r}], check=True)" for _, command in stages),
        "pass",
    ]
    steps = [
        STEP.format(name=name, run=run, then=f"self.next(self.{after})" if after else "pass")
        for name, run, after in zip(names, runs, [*names[1:], ""], strict=True)
    ]
    return HEAD + "".join(steps) + '\nif __name__ == "__main__":\n    Pipeline()\n'


def main() -> int:
    """Run the flow here; what Metaflow keeps of it goes to a temporary folder."""
    stages = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        flow = Path(folder) / "pipeline.py"
        flow.write_text(source(stages), encoding="utf-8")
        settings = {"METAFLOW_DATASTORE_SYSROOT_LOCAL": folder, "USERNAME": "benchmark"}
        command = [sys.executable, str(flow), "--no-pylint", "--quiet", "run"]
        return subprocess.run(command, env={**os.environ, **settings}).returncode


if __name__ == "__main__":
    sys.exit(main())
