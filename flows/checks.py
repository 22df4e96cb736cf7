"""What can be wrong with a machine or a checkout, each with what to do about it.

longview doctor
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from flows.environment import cores, server_url

DISK_GB, MEMORY_GB = 5, 6


@dataclass(frozen=True)
class Finding:
    """One line of the doctor; `advice` says what to do unless the level is `ok`."""

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str
    advice: str = ""


def examine(root: Path) -> Iterator[Finding]:
    """Every check, cheap ones first. A `problem` keeps the pipeline from running."""
    yield python()
    yield from packages(root)
    yield torchvision()
    yield threads()
    yield disk(root)
    yield memory()
    yield gpu()
    yield from tools(root)
    yield from checkout(root)
    yield from servers(root)


def python() -> Finding:
    """Python 3.11, for which the pins were resolved."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Finding("ok", "python", version)
    return Finding("problem", "python", version, "install Python 3.11, then `make install PYTHON=python3.11`")


def packages(root: Path) -> Iterator[Finding]:
    """Installed versions against the exact pins of pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"] if _has(root) else {}
    wrong = []
    for requirement in project.get("dependencies", []):
        name, _, wanted = requirement.partition("==")
        name = name.partition("[")[0]  # extras
        try:
            found = metadata.version(name).partition("+")[0]  # 2.13.0+cpu is 2.13.0
        except metadata.PackageNotFoundError:
            found = "missing"
        if wanted and found != wanted:
            wrong.append(f"{name} {found}, pinned {wanted}")
    if wrong:
        yield Finding("problem", "packages", "; ".join(wrong), "rm .venv/.installed && make install")
    else:
        yield Finding("ok", "packages", f"{len(project.get('dependencies', []))} pins met")


def _has(root: Path) -> bool:
    return (root / "pyproject.toml").is_file()


def torchvision() -> Finding:
    """A torchvision that cannot be imported breaks transformers; none at all does not."""
    if find_spec("torchvision") is None:
        from tasks.foundation import families

        without = ", ".join(family.name for family in families() if family.needs_torchvision)
        text = f"not installed: images go through PIL; {without} cannot be used, nor are they tested whole"
        return Finding("ok", "torchvision", text)
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    if done.returncode == 0:
        return Finding("ok", "torchvision", metadata.version("torchvision"))
    advice = "python -m pip uninstall -y torchvision (transformers then uses PIL)"
    return Finding("problem", "torchvision", "installed, but cannot be imported beside this torch", advice)


def threads() -> Finding:
    """One heavy stage uses all cores; two of them slow each other several times over."""
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted and wanted.isdigit() and int(wanted) != cores():
        advice = "unset OMP_NUM_THREADS, unless the machine is shared"
        return Finding("note", "threads", f"OMP_NUM_THREADS={wanted}, but {cores()} cores", advice)
    load = os.getloadavg()[0]
    if load > cores():
        return Finding(
            "note", "threads", f"{cores()} cores, load {load:.1f}", "stages are slow while others compute"
        )
    return Finding("ok", "threads", f"{cores()} cores")


def disk(root: Path) -> Finding:
    """Checkpoints lie in the workspace, in DVC's cache and in the local remote."""
    free = shutil.disk_usage(root).free / 1e9
    if free < DISK_GB:
        return Finding(
            "problem", "disk", f"{free:.1f} GB free", f"free {DISK_GB} GB; `dvc gc -w` drops old versions"
        )
    return Finding("ok", "disk", f"{free:.0f} GB free")


def memory() -> Finding:
    """The embedded profile needs up to MEMORY_GB with everything running."""
    import psutil

    available = psutil.virtual_memory().available / 1e9
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) / 1e9)
    if available < MEMORY_GB:
        advice = "close other programs; in params.yaml lower the batch sizes"
        return Finding("note", "memory", f"{available:.1f} GB available", advice)
    return Finding("ok", "memory", f"{available:.0f} GB available")


def gpu() -> Finding:
    """The embedded profile needs none; the others do. Asked without importing torch."""
    command = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader"]
    found = subprocess.run([command, *query], capture_output=True, text=True) if command else None
    if found is None or found.returncode != 0:
        return Finding("ok", "gpu", "none: the embedded profile needs none")
    names = "; ".join(found.stdout.split("\n")).strip("; ")
    if "+cpu" in metadata.version("torch"):
        return Finding(
            "note", "gpu", f"{names}, but torch is a CPU build", "install the CUDA build of torch==2.13.0"
        )
    return Finding("ok", "gpu", names)


def tools(root: Path) -> Iterator[Finding]:
    """Commands that the pipeline calls."""
    if shutil.which("git") is None:
        yield Finding("problem", "git", "not found", "install git: DVC needs it")
    on_path = shutil.which("python")
    if on_path is None or Path(on_path).parent != Path(sys.executable).parent:
        advice = ". .venv/bin/activate (plain `dvc repro` runs `python`; `longview run` needs nothing)"
        yield Finding("note", "environment", "this Python is not first on PATH", advice)


def checkout(root: Path) -> Iterator[Finding]:
    """The files that make a checkout, and parameters that parse."""
    from tasks.params import ParamsError, validate

    for name in ("dvc.yaml", ".dvc/config", "profiles/embedded.yaml"):
        if not (root / name).is_file():
            yield Finding(
                "problem", "checkout", f"{name} is missing in {root}", "run inside a clone of the repository"
            )
            return
    try:
        validate(root / "params.yaml")
        yield Finding("ok", "params.yaml", "every section is valid")
    except ParamsError as error:
        yield Finding(
            "problem", "params.yaml", str(error), "correct it, or `longview run --profile embedded --force`"
        )


def servers(root: Path) -> Iterator[Finding]:
    """Servers of this checkout, and an address of others that does not answer."""
    from tasks import tracking

    for name in ("prefect", "mlflow"):
        url = server_url(name, root)
        yield Finding("ok", name, url or "no server: not needed; `longview up` starts one to look at runs")
    try:
        tracking.check_reachable(tracking.tracking_uri())
    except tracking.TrackingError as error:
        yield Finding("problem", "mlflow", str(error), "correct MLFLOW_TRACKING_URI, or unset it")
    address = os.environ.get("PREFECT_API_URL", "")
    if re.match(r"https?://", address) and not _answers(address):
        yield Finding(
            "problem", "prefect", f"{address} does not answer", "unset PREFECT_API_URL, or start that server"
        )


def _answers(address: str) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=3):
            return True
    except OSError:
        return False
