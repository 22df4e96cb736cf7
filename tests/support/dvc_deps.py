"""The code that each stage of dvc.yaml depends on, from its imports.

python -m tests.support.dvc_deps             # what is missing from dvc.yaml, and what is there for nothing
python -m tests.support.dvc_deps --write     # put dvc.yaml right (comments are kept)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from tests.support.imports import REPOSITORY, closure, has_code

# Imported by stages, but no reason to train again: each with why.
EXEMPT = {
    "tasks/stage.py": "opens the output folder, writes the manifest, records in MLflow; computes nothing",
    "tasks/tracking.py": "talks to MLflow; no output depends on it",
    "tasks/recorder.py": "talks to MLflow; no output depends on it",
    "tasks/fingerprint.py": "reads the versions of inputs; DVC checks them itself",
    "tasks/params.py": "checks params.yaml; the values themselves are tracked as parameters",
    "tasks/meter.py": "shows progress",
    "models/engines/canary.py": "tries a server out before the stage; no output depends on it",
    "models/engines/http.py": "carries requests to a server as they are",
    "models/engines/process.py": "starts and stops a process",
    "models/engines/server.py": "starts and stops a server",
    "models/engines/keeper.py": "starts and stops a server",
    "models/engines/lingering.py": "starts a server, or takes one over",
    "models/engines/weights.py": "compares what is served with what was trained; no output depends on it",
    "tasks/cluster.py": "starts a cluster, or joins one",
    "tasks/scale_out.py": "says where the step loop runs; what is asked stands elsewhere",
    "tasks/sampling_actor.py": "runs the step loop elsewhere",
    "tasks/shared_journal.py": "keeps what was answered",
    "tasks/served.py": "starts engines and has them checked; what they are asked stands elsewhere",
}
DATA_FOLDERS = ("models/prompts",)  # packages whose other files are read at run time: the folder is the dep
READ = {  # other files that a module reads or runs
    "tasks/pages.py": ["tasks/templates"],
    "tasks/report.py": ["tasks/templates"],
    "models/engines/vllm.py": ["models/engines/vllm_worker.py"],
}


def expected(module: str) -> set[str]:
    """The code deps of a stage whose command is `python -m MODULE`."""
    path = module.replace(".", "/") + ".py"
    if not (REPOSITORY / path).is_file():
        return {path}
    files = {f for f in closure(path, frozenset(EXEMPT)) if has_code(f) or _folder(f) != f}
    read = {folder for f in files for folder in READ.get(f, [])}
    return {_folder(f) for f in files} | read


def _folder(file: str) -> str:
    return next((folder for folder in DATA_FOLDERS if file.startswith(f"{folder}/")), file)


def differences(root: Path = REPOSITORY) -> dict[str, tuple[list[str], list[str]]]:
    """Per stage of dvc.yaml: code deps that are missing, and that are there for nothing."""
    found = {}
    for name, body in stages(load(root)).items():
        wanted, listed = expected(module_of(body)), {d for d in body["deps"] if is_code(d)}
        if wanted != listed:
            found[name] = (sorted(wanted - listed), sorted(listed - wanted))
    return found


def load(root: Path = REPOSITORY) -> Any:
    """dvc.yaml with its comments."""
    return _yaml().load((root / "dvc.yaml").read_text(encoding="utf-8"))


def stages(document: Any) -> dict[str, Any]:
    """Stage name -> the mapping that holds cmd and deps, also for `foreach`."""
    return {name: stage.get("do", stage) for name, stage in document["stages"].items()}


def module_of(body: Any) -> str:
    """`tasks.judge` of `python -m tasks.judge`, also behind a launcher."""
    found = re.search(r"-m (tasks\.\w+)", body["cmd"])
    assert found, f"no `-m tasks.X` in {body['cmd']!r}"
    return found[1]


def is_code(dep: str) -> bool:
    """Whether a dep is code and not data."""
    return dep.startswith(("models/", "tasks/"))


def write(root: Path = REPOSITORY) -> None:
    """Replace the code deps of every stage; data deps and comments stay."""
    document = load(root)
    for body in stages(document).values():
        wanted, deps = sorted(expected(module_of(body))), body["deps"]
        for dep in [d for d in deps if is_code(d) and d not in wanted]:
            deps.remove(dep)
        deps.extend(d for d in wanted if d not in deps)
    with (root / "dvc.yaml").open("w", encoding="utf-8") as file:
        _yaml().dump(document, file)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 110
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def main() -> int:
    """Exit status 1 if dvc.yaml is not right."""
    if "--write" in sys.argv:
        write()
    wrong = differences()
    print(describe(wrong) or "dvc.yaml: the code deps of every stage are right")
    return 1 if wrong else 0


def describe(wrong: dict[str, tuple[list[str], list[str]]]) -> str:
    """The lines to add and to remove, per stage."""
    lines = []
    for name, (missing, surplus) in wrong.items():
        lines += [f"{name}:", *(f"  add     - {d}" for d in missing), *(f"  remove  - {d}" for d in surplus)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
