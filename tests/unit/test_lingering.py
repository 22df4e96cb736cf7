"""A server that outlives its stage: taken over with new weights, started again where they cannot be trusted,
and gone when nobody wants it. vLLM is a stand-in (tests/support/stand_in_vllm.py); the real one is in
tests/integration/test_weights.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.engines.base import Completion, EngineError, Request, Sampling
from models.engines.keeper import State, stop_all
from models.engines.lingering import Borrowed, Borrower
from models.engines.openai import ClientSettings, OpenAIEngine
from models.engines.server import ServerSettings
from models.engines.weights import Disagreement, Probing, served_weights
from models.probe import read_probe
from models.vlm import Conversation
from tasks.served import SERVERS
from tests.support.imports import REPOSITORY
from tests.support.stand_in_vllm import adapter, checkpoint

STAND_IN = (sys.executable, str(REPOSITORY / "tests/support/stand_in_vllm.py"))
Make = Callable[..., Borrower]


def fingerprint(folder: str) -> str:
    return "".join(sorted(path.read_text() for path in Path(folder).glob("*.safetensors")))


def connect(url: str, name: str) -> OpenAIEngine:
    return OpenAIEngine(url, name, settings=ClientSettings(patience_s=5.0, backoff_s=0.05))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(folder, *arguments, linger_s=, **environment): one stage's borrower."""

    def borrower(folder: Path, *arguments: str, linger_s: float = 60.0, **environment: str) -> Borrower:
        settings = ServerSettings(
            "",
            tmp_path / "logs" / "server.log",
            command=STAND_IN,
            arguments=arguments,
            environment={"CALLS": str(tmp_path / "calls"), **environment},
            start_timeout_s=30.0,
            grace_s=2.0,
        )
        weights = served_weights(str(folder), fingerprint)
        settings = ServerSettings(**{**vars(settings), "model": weights.model})
        probing = Probing(read_probe(weights.folder), tolerance=0.1)
        home = tmp_path / SERVERS
        return Borrower(settings, weights, probing, connect, linger_s, home, Counter(), lambda line: None)

    yield borrower
    stop_all(tmp_path / SERVERS)


def said(server: Borrowed) -> str:
    """What it says to a stage's request: its weights."""

    async def ask() -> Any:
        engine = connect(server.url, server.model)
        try:
            return await engine.ask(Request("q", Conversation([], [("x", "")]), Sampling()))
        finally:
            await engine.close()

    reply = asyncio.run(ask())
    assert isinstance(reply, Completion), reply
    return reply.text


def pid(server: Borrowed) -> int:
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health", timeout=5) as answer:
        return int(json.loads(answer.read())["pid"])


def calls(folder: Path) -> list[str]:
    """What servers were told beside chat."""
    lines = [line.split(" ", 1)[1] for line in (folder / "calls").read_text().splitlines()]
    return [line for line in lines if not line.startswith("/v1/chat")]


def until(done: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


def gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def keeper(folder: Path) -> State:
    fields = json.loads(next((folder / SERVERS).glob("*.json")).read_text())
    return State(**fields)


def test_the_next_stage_takes_the_server_over_with_its_weights_and_nothing_computed_with_the_old(
    make: Make, tmp_path: Path
) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0)).borrow() as server:
        first = pid(server)
        assert said(server) == "-1"
    borrower = make(checkpoint(tmp_path / "r2", -2.0))
    with borrower.borrow() as server:
        assert pid(server) == first and said(server) == "-2"
    assert borrower.swaps == {"reloads": 1}
    assert [line.split()[0] for line in calls(tmp_path)] == [
        "/pause?mode=abort",
        "/collective_rpc",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
    ]
    assert str(tmp_path / "r2") in calls(tmp_path)[1]


def test_a_server_that_has_the_weights_is_simply_used(make: Make, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "r1", -1.0)
    with make(folder).borrow() as server:
        first = pid(server)
    borrower = make(folder)
    with borrower.borrow() as server:
        assert pid(server) == first
    assert not borrower.swaps and calls(tmp_path) == []


def test_the_same_weights_at_another_place_are_the_same(make: Make, tmp_path: Path) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0)).borrow() as server:
        first = pid(server)
    borrower = make(checkpoint(tmp_path / "copy", -1.0))
    with borrower.borrow() as server:
        assert pid(server) == first
    assert not borrower.swaps and calls(tmp_path) == []


def test_a_server_left_in_the_middle_of_a_change_is_not_trusted(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = checkpoint(tmp_path / "r1", -1.0, probe=False)
    with make(folder).borrow() as server:
        first = pid(server)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("models.engines.lingering.swap", killed)
        with make(checkpoint(tmp_path / "r2", -2.0)).borrow():
            pass
    borrower = make(folder)
    with borrower.borrow() as server:
        assert pid(server) != first and said(server) == "-1"
    assert borrower.swaps == {"restarts": 1}


def test_a_reload_that_the_probe_finds_wrong_is_followed_by_a_restart(make: Make, tmp_path: Path) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0), STALE="1").borrow() as server:
        first = pid(server)
    borrower = make(checkpoint(tmp_path / "r2", -2.0), STALE="1")
    lines: list[str] = []
    borrower.report = lines.append
    with borrower.borrow() as server:
        assert pid(server) != first and gone(first) and said(server) == "-2"
    assert borrower.swaps == {"restarts": 1}
    assert any("differ from the trainer's by 1.0000" in line for line in lines)


def test_weights_that_barely_differ_are_not_taken_for_reloaded_when_nothing_changed(
    make: Make, tmp_path: Path
) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0), STALE="1").borrow():
        pass
    borrower = make(checkpoint(tmp_path / "r2", -1.05), STALE="1")  # less than the tolerance
    with borrower.borrow() as server:
        assert said(server) == "-1.05"
    assert borrower.swaps == {"restarts": 1}


def test_without_a_probe_new_weights_mean_a_new_start(make: Make, tmp_path: Path) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0)).borrow():
        pass
    borrower = make(checkpoint(tmp_path / "r2", -2.0, probe=False))
    with borrower.borrow() as server:
        assert said(server) == "-2"
    assert borrower.swaps == {"restarts": 1}


def test_another_architecture_or_other_arguments_are_another_server(make: Make, tmp_path: Path) -> None:
    pids = set()
    small, large = checkpoint(tmp_path / "a", -1.0), checkpoint(tmp_path / "b", -2.0, config='{"layers": 9}')
    for folder, arguments in ((small, ()), (large, ()), (small, ("--max-lora-rank", "8"))):
        with make(folder, *arguments).borrow() as server:
            pids.add(pid(server))
    assert len(pids) == 3 and not any(map(gone, pids))


def test_when_nobody_has_used_it_for_so_long_it_is_gone(make: Make, tmp_path: Path) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0), linger_s=0.5).borrow() as server:
        number, owner = pid(server), keeper(tmp_path).pid
        time.sleep(1.5)
        assert not gone(number)
    assert until(lambda: gone(number) and gone(owner))
    assert not list((tmp_path / SERVERS).glob("*.json"))


STAGE = """
import sys
from collections import Counter
from pathlib import Path
from models.engines.lingering import Borrower
from models.engines.server import ServerSettings
from models.engines.weights import Probing, served_weights
folder, model = Path(sys.argv[1]), sys.argv[2]
settings = ServerSettings(model, folder / "log", command=sys.argv[4:], grace_s=2.0,
                          arguments=["--load-s", sys.argv[3]], environment={"CALLS": str(folder / "calls")})
weights = served_weights(model, lambda path: "1")
home = folder / ".work/servers"
with Borrower(settings, weights, Probing(None, 1.0), print, 1.0, home, Counter()).borrow():
    (folder / "up").touch()
    sys.stdin.read()
"""


@pytest.mark.parametrize("load_s", ["0", "60"])
def test_it_does_not_outlive_a_killed_stage_for_longer_either(
    make: Make, tmp_path: Path, load_s: str
) -> None:
    model = str(checkpoint(tmp_path / "r1", -1.0, probe=False))
    stage = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(tmp_path), model, load_s, *STAND_IN],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "log"
    assert until(lambda: (tmp_path / "up").exists() if load_s == "0" else log.exists())
    owner = psutil.Process(keeper(tmp_path).pid)
    assert until(lambda: len(owner.children(recursive=True)) >= 2)
    family = [owner.pid, *(child.pid for child in owner.children(recursive=True))]
    stage.kill()
    stage.wait()
    assert until(lambda: all(map(gone, family)))


def test_two_stages_share_equal_weights_and_never_swap_each_other_s(make: Make, tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "r1", -1.0), checkpoint(tmp_path / "r2", -2.0)
    with make(one).borrow() as first:
        with make(one).borrow() as second:
            assert pid(second) == pid(first)
        with make(other).borrow() as third:
            number = pid(third)
            assert number != pid(first) and said(third) == "-2" and said(first) == "-1"
        assert gone(number)  # one of its own, which ends with the block
        assert said(first) == "-1"


def test_a_fresh_start_that_disagrees_is_an_error_with_figures_and_leaves_nothing(
    make: Make, tmp_path: Path
) -> None:
    with (
        pytest.raises(Disagreement, match=r"by 0\.3000 a token on average, 0\.1 allowed.*probe_tolerance"),
        make(checkpoint(tmp_path / "r1", -1.0), OFF="0.3").borrow(),
    ):
        pass
    assert not list((tmp_path / SERVERS).glob("*.json"))


def test_a_start_that_fails_says_what_a_server_says_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "r1", -1.0)
    for _ in range(2):
        with (
            pytest.raises(EngineError, match=r"lower --max-model-len[\s\S]*\| out of memory"),
            make(folder, "--fail").borrow(),
        ):
            pass
    assert not list((tmp_path / SERVERS).glob("*.json"))


def test_a_server_that_dies_in_use_comes_back_with_the_weights_it_had(make: Make, tmp_path: Path) -> None:
    with make(checkpoint(tmp_path / "r1", -1.0)).borrow():
        pass
    with make(checkpoint(tmp_path / "r2", -2.0)).borrow() as server:
        first = pid(server)
        os.kill(first, signal.SIGKILL)
        assert said(server) == "-2" and pid(server) != first
        server.revive(False)


def test_a_keeper_that_is_killed_takes_the_server_with_it_and_the_next_stage_starts_another(
    make: Make, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "r1", -1.0)
    with make(folder).borrow() as server:
        number = pid(server)
        os.kill(keeper(tmp_path).pid, signal.SIGKILL)
        assert until(lambda: gone(number))
        with pytest.raises(EngineError, match="the server is gone"):
            server.revive(False)
    with make(folder).borrow() as server:
        assert said(server) == "-1" and pid(server) != number


def test_longview_down_ends_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.commands.servers import down

    monkeypatch.setenv("LONGVIEW_ROOT", str(tmp_path))
    with make(checkpoint(tmp_path / "r1", -1.0)).borrow() as server:
        number = pid(server)
    down()
    assert gone(number) and capsys.readouterr().out.split() == ["vllm", "1", "stopped"]
    down()
    assert "no servers" in capsys.readouterr().out


def test_an_adapter_is_loaded_under_a_name_of_its_own_and_the_old_one_let_go(
    make: Make, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", -1.0)
    with make(adapter(tmp_path / "r1", base, -0.5)).borrow() as server:
        first, name = pid(server), server.model
        assert said(server) == "-1.5"
    borrower = make(adapter(tmp_path / "r2", base, -0.25))
    with borrower.borrow() as server:
        assert pid(server) == first and said(server) == "-1.25" and server.model != name
        assert calls(tmp_path) == [
            f'/v1/unload_lora_adapter "{name}"',
            f'/v1/load_lora_adapter "{server.model}"',
        ]
        os.kill(first, signal.SIGKILL)
        assert said(server) == "-1.25"  # started again with it
    assert borrower.swaps == {"reloads": 1}


def test_development_mode_is_for_loopback_only(make: Make, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="--host: leave it out"):
        make(checkpoint(tmp_path / "r1", -1.0), "--host=0.0.0.0")
