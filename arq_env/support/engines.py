"""Engines: what runs calls beside each other, in this process, in others, or on a cluster of Dask's or Ray's.

Every call runs on one thread, so that its numbers are the same on each of them. What a caller needs of an engine is its ``map``.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path

import torch

from arq_env.support.errors import ArqError, reason
from arq_env.support.files import sha256

#: Engines by name, and what each may be followed by.
ENGINES = {"serial": "", "processes": "[:NUMBER]", "dask": "[:ADDRESS]", "ray": "[:ADDRESS]"}
MOST_PROCESSES = 4_096
#: Functions, with all that they hold, such as a network, that a worker keeps.
KEPT = 4
#: Seconds in which a cluster must answer.
PATIENCE = 10
#: Times that Ray makes a call again whose worker was killed; Dask's own number.
RETRIES = 3


class Engine:
    """Makes calls in this process, one after the other.

    :param workers: calls that are made at a time
    """

    workers = 1

    def submit(self, function: Callable, *arguments) -> Future:
        """Begin a call; what it gives is the future's ``result()``."""
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, function: Callable, items: Iterable) -> Iterator:
        """As the built-in ``map``: results in order; for :func:`arq_env.certification.certify`."""
        return map(function, items)


class _Remote(Engine):
    """Makes calls in other processes; a function, with all that it holds, goes to each of them once.

    :param submit: called as ``submit(_call, digest, shared, arguments)``, gives a future
    :param share: takes a pickled function and gives what ``submit`` hands to :func:`_call` for it: the bytes or a file with them
    :param dumps: pickles a function; what a script defines is known to no cluster, so that it has to go by value there
    """

    def __init__(self, workers: int, submit: Callable[..., Future], share: Callable[[bytes], object], dumps: Callable):
        self.workers, self._submit, self._share, self._dumps = workers, submit, share, dumps
        self._shared: dict[str, object] = {}

    def submit(self, function, *arguments):
        return self._submit(_call, *self._held(function), arguments)

    def map(self, function, items):
        held = self._held(function)
        futures = [self._submit(_call, *held, (item,)) for item in items]
        return _results(futures)

    def _held(self, function) -> tuple[str, object]:
        pickled = self._dumps(function)
        digest = sha256(pickled)
        if digest not in self._shared:
            self._shared[digest] = self._share(pickled)
        return digest, self._shared[digest]


def _results(futures: list[Future]) -> Iterator:
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


_worker = threading.local()


def _call(digest: str, shared, arguments):
    """Make a call in a worker; each of its threads has functions of its own, as not all that they hold can be shared."""
    torch.set_num_threads(1)
    functions = vars(_worker).setdefault("functions", OrderedDict())
    if digest not in functions:  # pickled by the process that began the run, and by no file of it
        functions[digest] = pickle.loads(shared if isinstance(shared, bytes) else shared.read_bytes())
        while len(functions) > KEPT:
            functions.popitem(last=False)
    functions.move_to_end(digest)
    return functions[digest](*arguments)


@contextlib.contextmanager
def engine(asked: str = "processes") -> Iterator[Engine]:
    """The engine of a name; when the block is left, by Ctrl-C and errors too, all that it has begun ends.

    In the block this process, too, runs torch on one thread.

    :param asked: "serial"; "processes" for as many as torch has threads, and none beside this one where that is one, or
        "processes:4"; "dask" or "ray" for as many in this machine, or "dask:tcp://host:8786" and "ray:host:6379" for a cluster
    :raises ArqError: for another name, a missing package, an address where nothing answers, and for a worker that was killed, which
        Dask and Ray make up for a few times
    """
    name, _, rest = asked.partition(":")
    if name not in ENGINES or (rest and not ENGINES[name]):
        choices = ", ".join(name + more for name, more in ENGINES.items())
        raise ArqError(f"there is no engine {asked!r}: choose of {choices}")
    threads = torch.get_num_threads()
    if name == "processes" and rest and not (rest.isascii() and rest.isdigit() and 1 <= int(rest) <= MOST_PROCESSES):
        raise ArqError(f"{rest!r} processes were asked for: give a whole number from 1 to {MOST_PROCESSES}")
    opened: contextlib.AbstractContextManager[Engine]
    if name == "serial" or (name, rest, threads) == ("processes", "", 1):
        opened = contextlib.nullcontext(Engine())
    elif name == "processes":
        opened = workers(int(rest or threads))
    else:
        opened = {"dask": _dask, "ray": _ray}[name](rest, threads)
    torch.set_num_threads(1)
    try:
        with opened as ready:
            yield ready
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Engine]:
    """Worker processes; leaving the block by Ctrl-C or an error ends them at once.

    :raises ArqError: when one of them is killed
    """
    context = multiprocessing.get_context("spawn")
    open_end, held_end = context.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(prefix="arq-"))
    pool = ProcessPoolExecutor(processes, context, _start_worker, (open_end, folder))

    def share(pickled: bytes) -> Path:
        path = folder / str(len(list(folder.iterdir())))
        path.write_bytes(pickled)
        return path

    try:
        yield _Remote(processes, pool.submit, share, pickle.dumps)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ArqError("a worker process was killed, perhaps for its memory: run the same command again, it goes on") from error
    finally:
        held_end.close()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder, ignore_errors=True)


def _start_worker(open_end, folder: Path) -> None:
    """A worker has no part in Ctrl-C, and no life without the parent, so that nothing runs on beside its own repetition.

    :param open_end: of a pipe; the worker ends when the parent closes the other end
    :param folder: removed where the parent was killed
    """
    _no_part_in_ctrl_c()

    def watch():
        connection.wait([multiprocessing.parent_process().sentinel, open_end])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _dask(address: str, cores: int) -> Iterator[Engine]:
    """Dask's workers: those of the scheduler at an address, or so many in this machine."""
    with _needed("dask", "distributed"):
        import cloudpickle
        import distributed
    with contextlib.ExitStack() as opened:
        if ours := not address:
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
            own = {"n_workers": cores, "threads_per_worker": 1, "dashboard_address": None}
            address = opened.enter_context(distributed.LocalCluster(**own, silence_logs=logging.CRITICAL))
        try:
            client = opened.enter_context(distributed.Client(address, timeout=PATIENCE, set_as_default=False))
        except (OSError, ValueError) as error:
            raise _silent("Dask scheduler", address, error) from error
        if ours:
            client.run(_no_part_in_ctrl_c)
        pool = client.get_executor(pure=False)

        def share(pickled: bytes):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sending large graph")
                return client.submit(bytes, pickled)  # a call, and not scattered data, which would be lost with its worker

        try:
            yield _Remote(max(1, sum(client.ncores().values())), pool.submit, share, cloudpickle.dumps)
        except distributed.KilledWorker as error:
            raise ArqError(f"a call killed {RETRIES + 1} Dask workers, perhaps for their memory: give them more of it") from error


@contextlib.contextmanager
def _ray(address: str, cores: int) -> Iterator[Engine]:
    """Ray's workers: those of the cluster at an address, or so many in this machine."""
    with _needed("ray", "ray"):
        import cloudpickle
        import ray
    if address:
        _knock("Ray cluster", address)
    own = {"address": address} if address else {"num_cpus": cores, "include_dashboard": False}
    try:
        ray.init(**own, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _silent("Ray cluster", address or "this machine", error) from error
    call = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
    try:
        there = int(ray.cluster_resources().get("CPU", 1))
        yield _Remote(max(1, there), lambda _, *rest: call.remote(*rest).future(), ray.put, cloudpickle.dumps)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as the call raised it
    except ray.exceptions.WorkerCrashedError as error:
        raise ArqError(f"a call killed {RETRIES + 1} Ray workers, perhaps for their memory: give them more of it") from error
    finally:
        ray.shutdown()


def _no_part_in_ctrl_c() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _needed(extra: str, package: str):
    """Turn a failed import into a sentence."""
    try:
        yield
    except ImportError as error:
        raise ArqError(f'the engine {extra!r} needs {package} ({error}): pip install -e ".[{extra}]"') from error


def _knock(what: str, address: str) -> None:
    """Raise an ArqError unless something listens at an address, which Ray would wait a minute for."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, ValueError) as error:
        raise _silent(what, address, error) from error


def _silent(what: str, address: str, error: Exception) -> ArqError:
    return ArqError(f"no {what} answers at {address} ({reason(error)}): give the address of one that runs, as HOST:PORT")
