"""What reaches a run from outside: it is cancelled, the disk is full, a server is away for too long.

    @flow
    @interruptible
    def retrain(...): ...

A worker kills the process of a run that is cancelled. A run of `longview run` has no worker, and a worker may
have died: the run looks at its own state every two seconds and stops itself, with everything that it started;
one of a deployment does so ten seconds later, as a worker comes first.
"""

from __future__ import annotations

import errno
import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

from flows.environment import longview, root

P = ParamSpec("P")
R = TypeVar("R")
LOOK_S = 2.0
WORKER_S = 10.0
"""What a worker has for stopping a cancelled run before the run does it."""
UNWIND_S = 45.0
"""A run that has been told to stop and still goes on after this time is told again."""


class Interrupted(RuntimeError):
    """The run ended for a reason outside it. The message says which, and what to do."""


class _Cancelled(BaseException):
    """Raised in the main thread; no `except Exception` on the way stops it."""


def interruptible(run: Callable[P, R]) -> Callable[P, R]:
    """For the function of a flow: cancelled, it ends as *Cancelled*; other outages become Interrupted."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        from prefect.exceptions import TerminationSignal
        from prefect.states import Cancelled

        _keep_going_unreserved()
        try:
            with _watched():
                return run(*args, **kwargs)
        except _Cancelled:
            _stop_servers()
            message = f"cancelled; `{longview()} run --resume` continues"
            return cast(Any, Cancelled(message=message))  # what a flow returns may be its state
        except TerminationSignal:  # of a worker that cancels the run, or of the system
            _stop_servers()
            raise
        except Exception as error:
            sentence = reason(error)
            if sentence is None:
                raise
            raise Interrupted(sentence) from error

    # Prefect reads the parameters from it, and would look for the names of types here.
    wrapped.__signature__ = inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    return wrapped


def reason(error: BaseException) -> str | None:
    """What is to be said of an error from outside, in place of its traceback; None for any other."""
    if isinstance(error, Interrupted):
        return str(error)
    then = f"then `{longview()} run --resume` continues where it stopped"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({error.filename or error}): free space (`{longview()} gc` drops old "
            f"versions), {then}"
        )
    if _is(error, "httpx", "HTTPError"):
        from prefect.settings import PREFECT_API_URL

        url = str(PREFECT_API_URL.value() or "the temporary server").removesuffix("/api")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"Prefect at {url} refuses the password: set PREFECT_API_AUTH_STRING to user:password"
        return (
            f"Prefect at {url} does not answer ({_first_line(error)}): start it (`{longview()} up`), {then}"
        )
    if _is(error, "mlflow.exceptions", "MlflowException"):
        from tasks.tracking import HINT

        return f"MLflow failed: {_first_line(error)}. {HINT} Then `{longview()} run --resume` continues."
    if _is(error, "prefect.exceptions", "CancelledRun"):
        return f"cancelled in Prefect; `{longview()} run --resume` continues"
    return None


def _is(error: BaseException, module: str, name: str) -> bool:
    """isinstance without an import: what was never imported cannot have raised."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _watched() -> Iterator[None]:
    """Raises _Cancelled inside the block once the flow run is cancelled; not in a thread of its own."""
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL

    done = threading.Event()

    def stop(*_: Any) -> None:
        if not done.is_set():
            raise _Cancelled

    try:
        signal.signal(signal.SIGUSR1, stop)  # stays: a late signal must not end the process
    except ValueError:  # not in the main thread
        yield
        return
    context, thread = copy_context(), None  # Prefect's settings
    if PREFECT_API_URL.value() and flow_run.id:
        arguments = (UUID(str(flow_run.id)), done, threading.get_ident())
        thread = threading.Thread(target=context.run, args=(_watch, *arguments), daemon=True)
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread:
            thread.join(timeout=1)


def _watch(run: UUID, done: threading.Event, main_thread: int) -> None:
    """Look at the state of `run` until `done`; signal the main thread once it is cancelled."""
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # the next look is the next attempt
        while not done.wait(LOOK_S):
            found = _read(run)
            if found and found.state and (found.state.is_cancelling() or found.state.is_cancelled()):
                if found.deployment_id and done.wait(WORKER_S):
                    return
                while not done.is_set():
                    signal.pthread_kill(main_thread, signal.SIGUSR1)
                    done.wait(UNWIND_S)


def _read(run: UUID) -> Any:
    """The flow run as the server knows it; None while the server is away."""
    from prefect.client.orchestration import get_client

    with suppress(Exception), get_client(sync_client=True) as client:
        return client.read_flow_run(run)
    return None


def _keep_going_unreserved() -> None:
    """A queued run renews its place every few minutes. Where that fails, as the server is away, Prefect
    (3.7.7) ends the run, whatever it trains. Ours goes on: the lock of the checkout (flows/recovery.py) keeps
    the next one waiting."""
    from prefect.concurrency import _leases

    def say(error: BaseException, *_: Any, **__: Any) -> None:
        from prefect import get_run_logger

        sentence = "Prefect no longer reserves this run's place in the queue (%s); it goes on"
        get_run_logger().warning(sentence, _first_line(error))

    _leases._handle_lease_renewal_failure = cast(Any, say)


def _stop_servers() -> None:
    """vLLM servers that wait for another stage, which will not come now."""
    from tasks.served import SERVERS, stop_lingering

    folder = root() / SERVERS
    if folder.is_dir():
        stop_lingering(folder)
