"""Tasks on several processes, of this machine or of a Dask cluster, with reruns of a dead worker's tasks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from gumbo.errors import BadInput, GumboError, UnknownName, first_line
from gumbo.experiments._runs import environment

BACKENDS = ("loky", "dask")
ADDRESS = "tcp://host:port"
SECONDS = 10  # timeout for a scheduler's answer, and for its first worker
LOOKS = 0.2  # seconds between two looks of a worker whether its parent lives
DEATHS = 3  # deaths of workers in a row, without a finished task between them

_one_at_a_time = threading.Lock()  # seeds, threads and the param store are global to the process


def check_workers(backend: str, address: str | None, jobs: int, least: int = 1) -> None:
    """Raise for an invalid backend, address or number of jobs."""
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    if backend == "dask" and not address:
        raise BadInput(f"backend 'dask' needs the scheduler's address: --address {ADDRESS}")
    if backend != "dask" and address:
        raise BadInput(f"address {address!r} is of a Dask scheduler: give --backend dask with it")
    if jobs < least:
        raise BadInput(f"jobs is {jobs}: expected at least {least}")


def in_parallel(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    jobs: int,
    backend: str = "loky",
    address: str | None = None,
    again: Callable[[], None] = lambda: None,
    name: Callable[..., str] = lambda *task: "",
) -> Iterator[tuple[tuple, Any]]:
    """Yield each task with ``function(*task)`` as it finishes; all workers stop with the loop, or with this process.

    If a worker dies, finished tasks are kept and the others run again, until ``DEATHS`` workers have died in a row
    without a finished task between them. An error of a task names it.

    Args:
        function: the function to run, importable by its name.
        tasks: its arguments.
        jobs: processes of this machine; 1 runs them in this process.
        backend: ``loky`` for processes of this machine, ``dask`` for every worker of a cluster.
        address: of the cluster's scheduler.
        again: called before tasks of a dead worker run again, when no task runs.
        name: the name of a task, given its arguments.

    Raises:
        BadInput: a cluster that does not answer, has no workers, or runs another version or commit.
        GumboError: workers that die again and again.
    """
    if backend == "loky" and jobs == 1:
        for task in tasks:
            with _named(name(*task)):
                result = function(*task)
            yield task, result
        return
    missing = dict(enumerate(tasks))
    deaths = 0
    with _processes(jobs) if backend == "loky" else _cluster(address) as parallel:
        while missing:
            try:
                for k, result in parallel(function, missing, name):
                    deaths = 0
                    yield missing.pop(k), result
            except _deaths() as error:
                deaths += 1
                if deaths == DEATHS:
                    raise GumboError(
                        f"{DEATHS} workers died one after the other ({first_line(error)}), out of memory perhaps: "
                        f"{len(tasks) - len(missing)} of {len(tasks)} tasks are finished and kept; "
                        "the same command runs the others"
                    ) from error
                print(f"gumbo: a worker died; {len(missing)} of {len(tasks)} tasks run again", file=sys.stderr)
                again()


def _numbered(k: int, function: Callable[..., Any], task: tuple, name: str, parent: int | None) -> tuple[int, Any]:
    _end_with(parent)
    with _one_at_a_time, _named(name):
        return k, function(*task)


@lru_cache(maxsize=1)
def _end_with(parent: int | None) -> None:
    """End this process when its parent, if given, is gone: a killed one cannot stop its workers, which write on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of a task before the message of its error."""
    try:
        yield
    except GumboError as error:
        if name:
            error.args = (f"{name}: {error}",)
        raise
    except Exception as error:
        if name:
            print(f"gumbo: {name}: {first_line(error, kind=True)}", file=sys.stderr, flush=True)
        raise


def _deaths() -> tuple[type[BaseException], ...]:
    """The exceptions that a dead worker causes here."""
    from joblib.externals.loky.process_executor import BrokenProcessPool

    found: list[type[BaseException]] = [BrokenProcessPool]
    with suppress(ImportError):
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker

        found += [KilledWorker, FutureCancelledError]
    return tuple(found)


Run = Callable[[Callable[..., Any], "dict[int, tuple]", Callable[..., str]], Iterator[tuple[int, Any]]]


@contextmanager
def _processes(jobs: int) -> Iterator[Run]:
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    def run(function, missing, name):
        # With one process joblib would run the task in this process, which would die with it.
        parallel = Parallel(max(2, min(jobs, len(missing))), return_as="generator_unordered", batch_size=1)
        here = os.getpid()
        return parallel([delayed(_numbered)(k, function, task, name(*task), here) for k, task in missing.items()])

    try:
        yield run
    except BaseException:
        get_reusable_executor().shutdown(wait=False, kill_workers=True)
        raise


@contextmanager
def _cluster(address: str | None) -> Iterator[Run]:
    try:
        from distributed import Client
        from joblib import Parallel, delayed
        from joblib._dask import DaskDistributedBackend
    except ImportError:
        raise BadInput("backend 'dask' needs the package dask: pip install -e \".[dask]\"") from None

    class Backend(DaskDistributedBackend):
        """joblib's, which runs a single worker's tasks in the caller, and waits for ever for a task that failed."""

        def effective_n_jobs(self, n_jobs):
            return max(2, len(self.client.nthreads()))

        def submit(self, func, callback=None):
            submitted = super().submit(func, callback)

            def failed(future):
                if callback is not None and future.exception() is not None:
                    callback(future.exception())  # joblib raises what it gets here

            submitted.add_done_callback(failed)
            return submitted

    try:
        client = Client(address, timeout=SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"no Dask scheduler answers at {address!r} ({first_line(error)}): start one with `dask scheduler`, "
            f"workers with `dask worker ADDRESS --nthreads 1`, and give its address as {ADDRESS}"
        ) from None
    with client:
        _check_cluster(client, address)

        def run(function, missing, name):
            # The backend sets the number of jobs; a batch of several tasks would die together.
            parallel = Parallel(-1, backend=Backend(client=client), return_as="generator_unordered", batch_size=1)
            return parallel([delayed(_numbered)(k, function, task, name(*task), None) for k, task in missing.items()])

        yield run


def code() -> tuple[str, str | None]:
    """The version and commit of gumbo in this process."""
    here = environment()
    return here["gumbo"], here["commit"]


def _check_cluster(client, address: str | None) -> None:
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=SECONDS)
    threads = client.nthreads()
    if not threads:
        raise BadInput(f"the Dask scheduler at {address!r} has no workers: dask worker {address} --nthreads 1")
    try:
        found = client.run(code)
    except Exception as error:  # of any kind: whatever importing gumbo there raises
        raise BadInput(f"a worker of {address!r} cannot import this gumbo: {first_line(error, kind=True)}") from None
    here = code()
    for worker, there in found.items():
        if there != here:
            raise BadInput(
                f"worker {worker} runs gumbo {there[0]} at commit {there[1]}, and this is {here[0]} at {here[1]}: "
                "results would not be of one code"
            )
    if max(threads.values()) > 1:
        print(
            "gumbo: a Dask worker runs one task at a time here, whatever its threads: start workers with --nthreads 1",
            file=sys.stderr,
        )
