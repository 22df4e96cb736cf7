"""The settings under which the flow and its stages run, so that a checkout is self-contained.

    python -c "from flows.environment import root; print(root())"

Everything Prefect keeps lies in .work/prefect of the checkout. A server started by `longview up` is used if
it is alive; otherwise Prefect starts a temporary one, which takes up to half a minute on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

SETTINGS = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    # In memory, as by default, a restart of the server loses them, and their slots are never free again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # 2 + 4 + … + 256 s: a request waits eight minutes for a server that restarts; by default, one.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
"""What Prefect, DVC and MLflow are set to, also the servers that `longview up` starts."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
"""glibc keeps what it has freed: given back and asked for again at every decoding step, a growing KV cache
costs a fifth of the time of sampling on CPU. Other C libraries ignore it."""


def root() -> Path:
    """The checkout: LONGVIEW_ROOT, else the nearest folder above the working directory with dvc.yaml."""
    named = os.environ.get("LONGVIEW_ROOT")
    if named:
        return Path(named).resolve()
    here = Path.cwd().resolve()
    return next((p for p in (here, *here.parents) if (p / "dvc.yaml").is_file()), here)


def work(*parts: str, base: Path | None = None) -> Path:
    """A path under .work, which no version control sees."""
    return (base or root()).joinpath(".work", *parts)


def fresh_log(name: str, base: Path | None = None) -> Path:
    """`.work/logs/NAME.log`; the one before stays as `NAME.previous.log`."""
    log = work("logs", f"{name}.log", base=base)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".previous.log"))
    return log


def prepare() -> None:
    """Set what Prefect reads at import. Called once by `flows/__init__.py`."""
    defaults = {"PREFECT_HOME": str(work("prefect")), **SETTINGS}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    home = Path(os.environ["PREFECT_HOME"])
    if (root() / "dvc.yaml").is_file():
        home.mkdir(parents=True, exist_ok=True)  # Prefect does not make the folders above its own
    url = server_url("prefect")
    if url:
        os.environ.setdefault("PREFECT_API_URL", f"{url}/api")


def stage_environment(base: Path) -> dict[str, str]:
    """The environment of a stage's process: this interpreter first on PATH, threads and memory explicit."""
    environment = dict(os.environ)
    binaries = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([binaries, environment.get("PATH", "")])
    for name in THREAD_VARIABLES:
        environment.setdefault(name, str(cores()))
    for name, value in KEPT_MEMORY.items():
        environment.setdefault(name, value)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment["LONGVIEW_ROOT"] = str(base)
    return environment


def cores() -> int:
    """Cores this process may use, by affinity and by the control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return count


def servers(base: Path | None = None) -> dict[str, dict[str, object]]:
    """What `longview up` wrote: name -> {pid, started, url}. Entries may be dead; see `server_url`."""
    try:
        return json.loads(work("servers.json", base=base).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def server_url(name: str, base: Path | None = None) -> str | None:
    """The address of a running server of this checkout, or None."""
    entry = servers(base).get(name)
    if entry and process_started(int(str(entry["pid"]))) == entry["started"]:
        return str(entry["url"])
    return None


def process_started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid, unique. None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return _started_elsewhere(pid)
    return None if fields[0] == "Z" else int(fields[19])


def _started_elsewhere(pid: int) -> int | None:
    if Path("/proc/self/stat").exists():
        return None
    import psutil

    try:
        return int(psutil.Process(pid).create_time() * 100)
    except psutil.Error:
        return None


def longview() -> str:
    """How to call the command line from the current folder: its path where PATH does not lead to it."""
    ours, found = Path(sys.executable).with_name("longview"), shutil.which("longview")
    if not ours.is_file() or (found and Path(found).samefile(ours)):
        return "longview"
    return os.path.relpath(ours) if ours.is_relative_to(Path.cwd()) else str(ours)
