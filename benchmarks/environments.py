"""Environments of the peers that ours is measured beside: one for each, built once from pinned versions.

python -c "from benchmarks.environments import interpreter; print(interpreter('curator'))"
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT

HOME = ROOT / ".work" / "peers"
SCRIPTS = ROOT / "benchmarks" / "peers"
REQUIREMENTS = {
    "datatrove": (
        "datatrove[io]==0.10.1",
        "aiofiles==25.1.0",  # the rest of its extra `inference`, without vllm and sglang
        "aiosqlite==0.22.1",
        "httpx==0.28.1",
        "xxhash==3.8.2",
    ),
    "curator": ("bespokelabs-curator==0.1.31",),
    "distilabel": ("distilabel[openai]==1.5.3", "openai==3.54.0", "requests==2.34.2"),
    "dagster": ("dagster==1.13.29",),
    "metaflow": ("metaflow==2.19.39",),
    "ms-swift": ("torch==2.13.0", "transformers==5.19.0", "trl==0.29.1", "ms-swift==4.6.0"),
}
INSTALL_S = 1200


class PeerError(RuntimeError):
    """A peer that could not be installed or did not do its work; the message says why."""


def interpreter(name: str, home: Path = HOME) -> Path:
    """Python of a peer's environment, which is built if its requirements are not those it was built from."""
    folder, wanted = home / name, "\n".join(REQUIREMENTS[name])
    python, built = folder / "bin" / "python", folder / "requirements.txt"
    if built.is_file() and built.read_text() == wanted:
        return python
    print(f"{name}: building its environment in {folder}", file=sys.stderr, flush=True)
    _install(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
    _install(name, [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]])
    built.write_text(wanted)
    return python


def _install(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{name} could not be installed within {INSTALL_S} s") from None
    if done.returncode != 0:
        raise PeerError(f"{name} could not be installed: {last_line(done.stderr or done.stdout)}")


def last_line(text: str) -> str:
    """What a program said in the end: its last error line, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["nothing was said"])[-1][:200]
