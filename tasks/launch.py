"""Where a training stage runs: in one process, or in those that a file of hardware/ names.

    LONGVIEW_HARDWARE=8gpu-zero3 python -m tasks.dpo --round r1
    python -m tasks.launch                      # the files there are, and what each has

What is trained does not hang on it: a step has the same rows whatever the number of processes
(models.training.Budget), so hardware is no parameter that DVC knows.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE, STARTED = "LONGVIEW_HARDWARE", "LONGVIEW_LAUNCHED"
FOLDER, HERE = Path("hardware"), Path()
NODE = {
    "MACHINE_RANK": "--machine_rank",
    "MAIN_PROCESS_IP": "--main_process_ip",
    "MAIN_PROCESS_PORT": "--main_process_port",
}
"""What differs between the machines of one run, by environment variable."""
PR_SET_PDEATHSIG = 1


class HardwareError(ValueError):
    """A file of hardware that is not there or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Hardware:
    """processes: in all, one a GPU; machines: they run on; zero_stage: of DeepSpeed, 0 without; offload:
    whether the optimizer's states lie in the machine's memory; on_cpu: without GPUs."""

    file: Path
    processes: int = 1
    machines: int = 1
    zero_stage: int = 0
    offload: bool = False
    on_cpu: bool = False

    @property
    def name(self) -> str:
        """As `longview run --hardware` takes it."""
        return self.file.stem

    @property
    def is_one_process(self) -> bool:
        """Whether a stage needs no launcher."""
        return self.processes == 1 and not self.zero_stage


def names(root: Path = HERE) -> list[str]:
    """Of the files there are. root: the checkout, in which stages run."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def read(name: str, root: Path = HERE) -> Hardware:
    """The hardware of a name or of a file in accelerate's form. Raises HardwareError."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not (root / file).is_file():
        raise HardwareError(
            f"{VARIABLE}: there is no {file}; there are {', '.join(names(root)) or 'none'}. "
            "hardware/README.md says how to write one"
        )
    from tasks import params

    settings = params.read(root / file)
    deepspeed = settings.get("deepspeed_config") or {}
    zero = _zero(root / file, deepspeed, root)
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    return Hardware(
        file,
        int(settings.get("num_processes") or 1),
        int(settings.get("num_machines") or 1),
        int(zero.get("stage", 0)) if settings.get("distributed_type") == "DEEPSPEED" else 0,
        offload != "none",
        bool(settings.get("use_cpu")),
    )


def _zero(file: Path, deepspeed: dict[str, Any], root: Path) -> dict[str, Any]:
    """The settings of ZeRO, from the file of DeepSpeed that is named, or from accelerate's own."""
    named = deepspeed.get("deepspeed_config_file")
    if not named:
        device = deepspeed.get("offload_optimizer_device", "none")
        return {"stage": deepspeed.get("zero_stage", 0), "offload_optimizer": {"device": device}}
    try:
        return dict(json.loads((root / named).read_text(encoding="utf-8")).get("zero_optimization", {}))
    except (OSError, ValueError) as error:
        raise HardwareError(f"{file} names {named}, which cannot be read: {error}") from None


def check(hardware: Hardware) -> None:
    """Refuse what this machine does not have. Raises HardwareError."""
    from importlib.util import find_spec

    if hardware.zero_stage and find_spec("deepspeed") is None:
        raise HardwareError(f"{hardware.file} needs DeepSpeed: pip install 'longview[deepspeed]'")
    import torch

    here = hardware.processes // hardware.machines
    if not hardware.on_cpu and torch.cuda.device_count() < here:
        raise HardwareError(f"{hardware.file} wants {here} GPUs, and there are {torch.cuda.device_count()}")


def spread() -> None:
    """Begin this program again in the processes of $LONGVIEW_HARDWARE, in place of this process; nothing
    where that is not set, means one process, or has been done."""
    if STARTED in os.environ:
        _end_with_launcher()
        return
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        hardware = read(name)
        if hardware.is_one_process:
            return
        check(hardware)
    except HardwareError as error:
        sys.exit(str(error))
    os.environ[STARTED] = "1"
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # a line for every collective
    os.execv(sys.executable, [sys.executable, *command(hardware)])


def _end_with_launcher() -> None:
    """A launcher killed by `kill -9` leaves its processes: they would train on beside those of the next
    run. Linux alone can tell them."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def command(hardware: Hardware) -> list[str]:
    """What the interpreter is to run: accelerate's launcher, and this program in it."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    node = [word for variable, option in NODE.items() if (value := os.environ.get(variable))
            for word in (option, value)]  # fmt: skip
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(hardware.file)]
    return [*launcher, *node, *program, *sys.argv[1:]]


def main() -> None:
    """Print the files there are."""
    for name in names():
        found = read(name)
        split = f", ZeRO-{found.zero_stage}" if found.zero_stage else ""
        offload = ", optimizer in the machine's memory" if found.offload else ""
        print(f"{name:20} {found.processes} processes on {found.machines} machines{split}{offload}")


if __name__ == "__main__":
    main()
