"""vLLM's engine in a worker of our own, with a stand-in that speaks the worker's protocol without vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from models.engines.base import Completion, EngineError, Failure, Reply, Request, Sampling, generate
from models.engines.suspects import KILLED, RESTARTS
from models.engines.vllm import ENGINE_ERROR, WORKER_DIED, VLLMEngine, WorkerSettings, worker_command
from models.vlm import Conversation
from tests.support.imports import REPOSITORY

STAND_IN = """
import json, os, signal, sys, threading, time, zlib
from pathlib import Path

folder = Path(__file__).parent
print("a greeting of some library")
print("loading", sys.argv[1:], os.environ.get("COLOUR"), file=sys.stderr, flush=True)
starts = folder / "starts"
with starts.open("a") as file:
    print(os.getpid(), file=file, flush=True)
start = len(starts.read_text().split())
if "--refuse" in sys.argv:
    sys.exit("unrecognized arguments: --refuse")
if "--die-again" in sys.argv and start > 1:
    sys.exit("out of memory")
if "--slow" in sys.argv:
    time.sleep(60)
lock, seen, tries, images = threading.Lock(), (folder / "seen").open("a"), {}, {}
answered = (folder / "answered").open("a")

def say(**fields):
    with lock:
        print(json.dumps(fields), flush=True)

def answer(line):
    text = line["messages"][-1]["content"]
    if text == "always hang" or text == "hang" and start == 1:
        return
    if text == "die" and start == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if text.startswith("always die") or "--broken" in sys.argv:
        os._exit(3)
    if text.startswith("slow "):
        time.sleep(float(text.split()[1]))
    if text == "bad":
        return say(id=line["id"], failed="bad request", detail="ValueError: too\\nlong")
    if text in ("once", "never"):
        tries[text] = tries.get(text, 0) + 1
        if text == "never" or tries[text] == 1:
            return say(id=line["id"], failed="engine error", detail="KV load")
    said = " ".join(str(zlib.crc32(url.encode())) for url in line["urls"]) or text
    say(id=line["id"], text=said, finished=True, tokens=2, prompt_tokens=5, cached_tokens=4)
    print(text, file=answered, flush=True)

say(ready="0.0")
for line in map(json.loads, sys.stdin):
    print(json.dumps({**line, "part": "..."} if "part" in line else line), file=seen, flush=True)
    if "image" in line:
        images[line["image"]] = line["part"]["image_url"]["url"]
    elif "forget" in line:
        del images[line["forget"]]
    elif "id" in line:
        line["urls"] = [images[name] for name in line["images"]]  # sent before, and not forgotten yet
        threading.Thread(target=answer, args=[line], daemon=True).start()
"""

Make = Callable[..., VLLMEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(*arguments, capacity=, images=, **settings): an engine that is not started yet."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    made: list[VLLMEngine] = []

    def engine(*arguments: str, capacity: int = 16, images: Any = "data", **changed: Any) -> VLLMEngine:
        options: dict[str, Any] = {"grace_s": 2.0, "start_timeout_s": 30.0, "report_every_s": 0.3, **changed}
        command = (sys.executable, str(script))
        settings = WorkerSettings(tmp_path / "logs" / "vllm.log", command, arguments, **options)
        made.append(VLLMEngine("a/model", images, capacity, settings, lambda line: None))
        return made[-1]

    yield engine
    for left in made:
        left.stop()


def request(text: str, images: Sequence[str] = (), sampling: Sampling | None = None, **rest: Any) -> Request:
    return Request(text, Conversation(images, [(text, "")]), sampling or Sampling(), **rest)


def ask_all(engine: VLLMEngine, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        try:
            return await asyncio.gather(*map(engine.ask, requests))
        finally:
            await engine.close()

    return asyncio.run(run())


def texts(replies: Sequence[Reply]) -> list[str]:
    return [reply.text if isinstance(reply, Completion) else f"failed: {reply}" for reply in replies]


def pids(folder: Path) -> list[int]:
    """Of all workers that were started."""
    return [int(line) for line in (folder / "starts").read_text().split()]


def seen(folder: Path) -> list[dict[str, Any]]:
    """What the workers were told."""
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]


def until(done: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_replies_reach_those_who_asked_whatever_comes_back_first(make: Make, tmp_path: Path) -> None:
    with make("--flag", "value", environment={"COLOUR": "green"}) as engine:
        asked = [f"slow {0.4 - 0.1 * n:.1f} {n}" for n in range(5)] + [f"text {n}" for n in range(30)]
        assert texts(ask_all(engine, [request(text) for text in asked])) == asked
    assert (
        "loading ['--model', 'a/model', '--flag', 'value'] green" in (tmp_path / "logs/vllm.log").read_text()
    )
    assert all(map(gone, pids(tmp_path)))


def test_a_reply_says_what_the_worker_counted(make: Make) -> None:
    with make() as engine:
        (reply,) = ask_all(engine, [request("seven")])
    assert reply == Completion("seven", tokens=2, finished=True, prompt_tokens=5, cached_tokens=4)


def test_the_worker_is_told_turns_sampling_and_schema(make: Make, tmp_path: Path) -> None:
    schema = {"type": "object"}
    drawn = Sampling(0.7, 0.95, 1.05, 64, seed=2**62)
    prompt = Conversation([], [("one", "two"), ("three", "")])
    greedy = Sampling(max_new_tokens=8, seed=3)
    with make() as engine, make(seeded=False) as unseeded:
        ask_all(engine, [Request("k", prompt, drawn, schema), request("four", sampling=greedy)])
        ask_all(unseeded, [Request("k", prompt, drawn)])
    first, second, third = seen(tmp_path)
    assert [turn["content"] for turn in first["messages"]] == ["one", "two", "three"]
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant", "user"]
    wanted = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.05, "max_tokens": 64}
    assert first["sampling"] == {**wanted, "seed": 2**62} and first["schema"] == schema
    assert "seed" not in second["sampling"] and second["schema"] is None
    assert third["sampling"] == wanted


def test_no_more_than_the_capacity_is_under_way(make: Make, tmp_path: Path) -> None:
    with make(capacity=2) as engine:

        async def run() -> list[int]:
            asked = [asyncio.create_task(engine.ask(request(f"slow 0.3 {n}"))) for n in range(4)]
            await asyncio.sleep(0.15)
            told = [line["id"] for line in seen(tmp_path)]
            await asyncio.gather(*asked)
            await engine.close()
            return told

        assert asyncio.run(run()) == [0, 1]
    assert len(seen(tmp_path)) == 4


@pytest.mark.parametrize("deadly", ["die", "hang"])
def test_a_worker_that_dies_or_hangs_is_started_again_and_asked_again(
    make: Make, tmp_path: Path, deadly: str
) -> None:
    with make(silence_s=1.0) as engine:
        asked = ["before", "slow 0.2", deadly, "slow 0.5"]
        assert texts(ask_all(engine, [request(text) for text in asked])) == asked
        assert len(pids(tmp_path)) == 2 and gone(pids(tmp_path)[0])
        assert engine.retries[WORKER_DIED] >= 1
        assert texts(ask_all(engine, [request("after")])) == ["after"]
    assert all(map(gone, pids(tmp_path)))


def test_an_idle_worker_that_is_killed_is_started_again(make: Make, tmp_path: Path) -> None:
    with make() as engine:
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        assert until(lambda: len(pids(tmp_path)) == 2)
        assert texts(ask_all(engine, [request("after")])) == ["after"]


@pytest.mark.parametrize(
    ("poison", "deaths"), [(["always die"], 3), (["always die 1", "always die 2"], 5), (["always hang"], 3)]
)
def test_a_request_that_kills_every_worker_is_found_and_given_up_alone(
    make: Make, tmp_path: Path, poison: list[str], deaths: int
) -> None:
    asked = [f"text {n}" for n in range(40 - len(poison))]
    for n, text in enumerate(poison):
        asked.insert(10 + 15 * n, text)
    with make(capacity=64, silence_s=1.0) as engine:
        replies = ask_all(engine, [request(text) for text in asked])
        for text, reply in zip(asked, replies, strict=True):
            assert reply == KILLED if text in poison else texts([reply]) == [text]
        again, after = ask_all(engine, [request(poison[0]), request("after")])
        assert again == KILLED and texts([after]) == ["after"]
        assert len(pids(tmp_path)) <= 1 + deaths
    told = Counter((tmp_path / "answered").read_text().splitlines())
    assert max(told.values()) == 1


def test_samples_of_a_prompt_that_kills_every_worker_are_given_up_together(
    make: Make, tmp_path: Path
) -> None:
    samples = [request(f"{n}", sampling=Sampling(1.0, seed=seed)) for n in range(8) for seed in range(4)]
    deadly = [request("always die", sampling=Sampling(1.0, seed=seed)) for seed in range(6)]
    with make(capacity=16) as engine:
        replies = ask_all(engine, [*deadly, *samples])
        assert replies[:6] == 6 * [KILLED]
        assert all(isinstance(reply, Completion) for reply in replies[6:])
        assert len(pids(tmp_path)) <= 5


def test_a_worker_that_dies_whatever_it_is_asked_is_given_up_with_the_end_of_its_log(
    make: Make, tmp_path: Path
) -> None:
    with make("--broken") as engine:
        with pytest.raises(EngineError, match=r"died with exit status 3[\s\S]*The end of .*vllm.log"):
            ask_all(engine, [request(f"text {n}") for n in range(40)])
        assert len(pids(tmp_path)) == 1 + RESTARTS
        with pytest.raises(EngineError, match="exit status 3"):
            ask_all(engine, [request("after")])
    assert all(map(gone, pids(tmp_path)))


def test_close_while_it_is_looked_for_what_kills_the_worker(make: Make, tmp_path: Path) -> None:
    with make(capacity=64) as engine:

        async def run() -> list[BaseException | Reply]:
            texts = [*(f"slow 3 {n}" for n in range(20)), "always die"]
            asked = [asyncio.create_task(engine.ask(request(text))) for text in texts]
            while len(pids(tmp_path)) < 2:
                await asyncio.sleep(0.02)
            await engine.close()
            return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(ended, asyncio.CancelledError) for ended in asyncio.run(run()))
        assert texts(ask_all(engine, [request(f"text {n}") for n in range(40)])) == [
            f"text {n}" for n in range(40)
        ]


def test_a_worker_that_cannot_be_started_again_ends_all_that_wait(make: Make) -> None:
    with (
        make("--die-again") as engine,
        pytest.raises(EngineError, match=r"lower --max-model-len[\s\S]*out of memory"),
    ):
        ask_all(engine, [request("die"), request("slow 9")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": ("--refuse",)}, r"--help lists them\.[\s\S]*\| unrecognized arguments"),
        ({"arguments": ("--slow",), "start_timeout_s": 1.0}, r"did not load the model within 1 s"),
        ({"command": (sys.executable, "-c", "import vllm")}, r"parameter `python`"),
        (
            {"command": (sys.executable, "-c", "import sys; sys.exit('No module named \\'vllm.v2\\'')")},
            "0.32",
        ),
        ({"command": ("/no/such/python", "x")}, "correct `command`"),
    ],
)
def test_a_start_that_fails_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, make: Make, change: dict[str, Any], message: str
) -> None:
    defaults = make().settings
    settings = WorkerSettings(**{**defaults.__dict__, **change})
    engine = VLLMEngine("a/model", "data", 4, settings, lambda line: None)
    with pytest.raises(EngineError, match=message):
        engine.start()
    assert not (tmp_path / "starts").exists() or all(map(gone, pids(tmp_path)))


def test_a_bad_request_fails_alone_and_at_once(make: Make, tmp_path: Path) -> None:
    with make() as engine:
        bad, good = ask_all(engine, [request("bad"), request("good")])
        assert bad == Failure("bad request", "ValueError: too long")
        assert texts([good]) == ["good"]
    assert len(seen(tmp_path)) == 2


def test_an_error_of_the_engine_is_tried_again(make: Make) -> None:
    with make(attempts=3) as engine:
        once, never = ask_all(engine, [request("once"), request("never")])
        assert texts([once]) == ["once"] and never == Failure(ENGINE_ERROR, "KV load")
        assert engine.retries[ENGINE_ERROR] == 3


def test_what_is_no_json_fails_before_it_is_sent(make: Make, tmp_path: Path) -> None:
    with make() as engine:
        half = request("half a character: \ud83d")
        schema = request("x", schema={"enum": {1, 2}})
        replies = ask_all(engine, [half, schema, request("good")])
        assert [isinstance(r, Failure) and r.reason for r in replies] == ["prompt is not JSON"] * 2 + [False]
    assert len(seen(tmp_path)) == 1


def picture(folder: Path, name: str, colour: int) -> str:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / name)
    return name


def test_an_image_is_sent_once_and_again_only_when_forgotten(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = [picture(data, f"{n}.png", 60 * n) for n in range(3)]
    with make(images=data) as engine:
        asked = [request(f"{n}", [names[n % 3]]) for n in range(9)]
        replies = texts(ask_all(engine, asked))
        assert replies[:3] == replies[3:6] == replies[6:] and len(set(replies)) == 3
        assert texts(ask_all(engine, [request("both", names[:2])])) == [" ".join(replies[:2])]
    assert [line["image"] for line in seen(tmp_path) if "image" in line] == names
    (tmp_path / "seen").unlink()
    with make(images=data, image_bytes=0) as engine:
        assert texts(ask_all(engine, [request("a", names[:2]), request("b", names[:1])])) == [
            " ".join(replies[:2]),
            replies[0],
        ]
    told = [line.get("image") or line.get("forget") for line in seen(tmp_path) if "id" not in line]
    assert told == [*names[:2], *names[:2], names[0], names[0]]


def test_images_are_sent_again_to_a_worker_that_was_started_again(make: Make, tmp_path: Path) -> None:
    name = picture(tmp_path / "data", "a.png", 9)
    with make(images=tmp_path / "data") as engine:
        (before,) = texts(ask_all(engine, [request("a", [name])]))
        assert texts(ask_all(engine, [request("die"), request("slow 0.3", [name])])) == ["die", before]


def test_an_image_that_cannot_be_read_fails_its_request_alone(make: Make, tmp_path: Path) -> None:
    def source(name: str) -> Image.Image:
        if name == "odd":
            raise RuntimeError("no such scan")
        return Image.new("RGB", (4, 4))

    with make(images=tmp_path) as engine:
        missing, good = ask_all(engine, [request("a", ["missing.png"]), request("good")])
        assert (
            isinstance(missing, Failure) and missing.reason == "image missing" and texts([good]) == ["good"]
        )
    with make(images=source) as engine:
        odd, even = ask_all(engine, [request("a", ["odd"]), request("b", ["even"])])
        assert isinstance(odd, Failure) and "no such scan" in odd.detail and isinstance(even, Completion)


def test_close_ends_what_is_under_way_and_another_event_loop_may_go_on(make: Make, tmp_path: Path) -> None:
    with make() as engine:

        async def run() -> list[BaseException | Reply]:
            asked = [asyncio.create_task(engine.ask(request(f"slow 5 {n}"))) for n in range(3)]
            await asyncio.sleep(0.2)
            await engine.close()
            await engine.close()
            return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(ended, asyncio.CancelledError) for ended in asyncio.run(run()))
        replies = generate(engine, [Conversation([], [("again", "")])], Sampling())
        assert [reply.text for reply in replies] == ["again"]
        assert len(pids(tmp_path)) == 1
    told = seen(tmp_path)
    cancelled = [line["cancel"] for line in told if "cancel" in line]
    assert sorted(cancelled) == [line["id"] for line in told[:3]]


def test_two_event_loops_at_once_are_refused(make: Make) -> None:
    async def ask(engine: VLLMEngine) -> Reply:
        return await engine.ask(request("x"))

    with make() as engine:
        asyncio.run(ask(engine))
        with pytest.raises(RuntimeError, match="close"):
            asyncio.run(ask(engine))


def test_a_prompt_that_is_not_open_is_refused(make: Make) -> None:
    with make() as engine, pytest.raises(ValueError, match="open"):
        ask_all(engine, [Request("x", Conversation([], [("a", "b")]), Sampling())])


def test_nobody_waits_for_an_engine_that_was_stopped(make: Make) -> None:
    engine = make()
    with pytest.raises(EngineError, match="start it"):
        ask_all(engine, [request("x")])
    engine.start()

    async def run() -> None:
        asked = asyncio.create_task(engine.ask(request("slow 30")))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop)
        await asked

    with pytest.raises(EngineError, match="stopped"):
        asyncio.run(run())
    engine.stop()


def test_a_stop_while_the_worker_is_started_again_leaves_nothing(make: Make, tmp_path: Path) -> None:
    engine = make()
    engine.start()
    (tmp_path / "stand_in.py").write_text(STAND_IN.replace('"--slow" in sys.argv', "True"))
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    assert until(lambda: len(pids(tmp_path)) == 2)
    engine.stop()
    assert len(pids(tmp_path)) == 2 and all(map(gone, pids(tmp_path)))


def test_the_worker_does_not_outlive_our_process(make: Make, tmp_path: Path) -> None:
    s = make().settings
    code = f"""if True:
        import time
        from pathlib import Path
        from models.engines.vllm import VLLMEngine, WorkerSettings
        settings = WorkerSettings(Path({str(s.log)!r}), {s.command!r}, grace_s=1.0)
        with VLLMEngine("m", "data", 4, settings):
            Path({str(tmp_path / "up")!r}).write_text("up")
            time.sleep(60)
    """
    ours = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert until(lambda: (tmp_path / "up").exists())
    (worker,) = pids(tmp_path)
    assert not gone(worker)
    ours.kill()
    ours.wait()
    assert until(lambda: gone(worker))


def test_the_worker_sees_nothing_of_this_project(tmp_path: Path) -> None:
    """It runs where only vLLM is, and beside files of ours that are called http.py and vllm.py."""
    (tmp_path / "uvloop.py").write_text("import http.client, sys; print('of vLLM'); sys.exit(*sys.path[:1])")
    ran = subprocess.run(
        worker_command(sys.executable), env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert ran.stderr.split() == ["of", "vLLM", str(tmp_path)] and ran.stdout == ""
