"""What every client is asked, and what it reports. The standard library alone: it runs in every environment.

url, calls, in_flight, folder = arguments()
with measured() as figures: ...
report(figures, answers)
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

MODEL = "mock"
MAX_TOKENS = 1024
QUESTION = (
    "What is the sum of the digits in the top row of the board? Look at every cell before you add. " * 14
)


def arguments() -> tuple[str, int, int, str]:
    """The server's address up to and with /v1, how many calls, how many at once, a folder."""
    url, calls, in_flight, folder = sys.argv[1:]
    return url, int(calls), int(in_flight), folder


def prompt(number: int) -> str:
    """1.4 KB, each another."""
    return f"{QUESTION}Board {number}."


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """wall_s and cpu_s of the block: of this process and the children it has waited for."""
    figures: dict[str, float] = {}
    wall, cpu = time.perf_counter(), _cpu_s()
    yield figures
    figures |= {"wall_s": time.perf_counter() - wall, "cpu_s": _cpu_s() - cpu}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def report(figures: dict[str, float], answers: list[str]) -> None:
    """The last line of stdout; then the process ends, whatever threads a library has left."""
    done = sum(
        answer.startswith(QUESTION[:40]) for answer in answers
    )  # the mock server says the prompt again
    print("\n" + json.dumps({**figures, "done": done}), flush=True)
    os._exit(0)
