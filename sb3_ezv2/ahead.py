"""
The next update's batch, drawn and searched while an update runs (``reanalyze_ahead``).

What an update learns from follows from when its batch is drawn, which does not depend on how it is made: when the update
before begins, so without that update's priorities. Whether a thread makes it changes nothing. Only what an update does not
change is done there: sequences are read, and their states are searched with the target network, from generators that
nothing else draws from meanwhile. Values of the bootstrap network and of the trained one are computed when the batch is used,
and no batch is made across a refresh of the target network.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ezv2.reanalyze import Reanalyzer, Searches
from sb3_ezv2.replay_buffer import Batch

Fields = TypeVar("Fields")


@dataclass
class PreparedBatch:
    """
    A batch that no update has learned from yet. It is pickled with the replay buffer, its tensors on the CPU.

    :param batch: B sequences of U steps
    :param stamps: int64 [B], of the sequences' starts, see
        :meth:`sb3_ezv2.replay_buffer.SequenceReplayBuffer.update_priorities`
    :param searches: of its states
    :param made_by: :meth:`sb3_ezv2.reanalyze.Reanalyzer.digest` of what made the searches
    """

    batch: Batch
    stamps: np.ndarray
    searches: Searches
    made_by: bytes

    def __getstate__(self) -> dict[str, Any]:
        batch, searches = (_map(lambda x: x.cpu(), fields) for fields in (self.batch, self.searches))
        return {**self.__dict__, "batch": batch, "searches": searches}


def next_batch(reanalyzer: Reanalyzer, batch_size: int, env: VecNormalize | None) -> tuple[Batch, np.ndarray, Searches | None]:
    """
    :param reanalyzer: with the replay buffer
    :param batch_size: B
    :param env: normalises observations and rewards of a batch that is sampled now, if given
    :return: the batch that was prepared, or one that is sampled now if there is none of that size; the stamps of its starts;
        its searches, None if they are still to be made
    """
    buffer = reanalyzer.buffer
    prepared, buffer.prepared = buffer.prepared, None
    if prepared is None or len(prepared.stamps) != batch_size:
        batch = buffer.sample(batch_size, env=env)
        return batch, buffer.stamps[batch.slots[:, 0]], None
    batch, searches = (_map(lambda x: x.to(buffer.device), fields) for fields in (prepared.batch, prepared.searches))
    if buffer.device.type == "cuda":
        # Their memory is another stream's, which must not have it back before this one is done with it
        for fields in (batch, searches):
            _map(lambda x: x.record_stream(th.cuda.current_stream(x.device)) if x.is_cuda else None, fields)
    return batch, prepared.stamps, searches


@contextmanager
def preparing_next(
    reanalyzer: Reanalyzer, batch_size: int, env: VecNormalize | None, rng: np.random.Generator, thread: bool | None
) -> Iterator[None]:
    """
    Within, one update is made. The batch of the next one is drawn at once, and is the buffer's ``prepared`` afterwards.

    :param reanalyzer: whose target network the update does not change
    :param batch_size: B
    :param env: normalises observations and rewards, if given
    :param rng: of the searches' noise, which the update does not draw from
    :param thread: make the batch in a thread while the update is made, which has ended afterwards, after an exception in the
        update, too; False: make it before; None: in a thread if the device is CUDA
    :raises Exception: what has gone wrong with the batch, after the update
    """
    buffer = reanalyzer.buffer
    threaded = buffer.device.type == "cuda" if thread is None else thread
    starts, importance = buffer.draw(batch_size)

    def make() -> PreparedBatch:
        batch = buffer.sequences(starts, importance, env)
        return PreparedBatch(batch, buffer.stamps[starts], reanalyzer.searches(batch, rng), reanalyzer.made_by)

    job = _Job(_on_own_stream(make, buffer.device) if threaded else make)
    try:
        job.start(threaded)
        yield
    finally:
        job.wait()
    buffer.prepared = job.result()


class _Job:
    """
    A function that is called once, and whose result or exception is asked for later.

    :param function: without arguments
    """

    def __init__(self, function: Callable[[], PreparedBatch]):
        self._function = function
        self._result: PreparedBatch | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        # Thread.join() that was interrupted by Ctrl-C takes the thread for ended (CPython's issue 90882)
        self._ended = threading.Event()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C
        finally:
            self._ended.set()

    def start(self, threaded: bool) -> None:
        """:param threaded: call the function in a thread, otherwise now :raises RuntimeError: there can be no thread"""
        if not threaded:
            self._run()
            return
        self._thread = threading.Thread(target=self._run, name="reanalyze-ahead")
        try:
            self._thread.start()
        except RuntimeError:
            self._ended.set()
            raise

    def wait(self) -> None:
        """Until the function has ended, Ctrl-C or not. :raises KeyboardInterrupt: there was one, afterwards"""
        interrupt: KeyboardInterrupt | None = None
        while not self._ended.is_set():
            try:
                self._ended.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()
        if interrupt is not None:
            raise interrupt

    def result(self) -> PreparedBatch | None:
        """:raises Exception: what the function has raised"""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result


@functools.cache
def _stream(index: int) -> th.cuda.Stream:
    """:return: the only stream on which batches are made on this device: memory is kept for each stream apart"""
    return th.cuda.Stream(index)


def _on_own_stream(function: Callable[[], PreparedBatch], device: th.device) -> Callable[[], PreparedBatch]:
    """
    :param function: to be called in a thread
    :param device: where it computes
    :return: the function, on a stream of its own if the device is CUDA. The stream waits for what is queued now, such as a
        refresh of the target network; when the function returns, all that it has queued is done.
    """
    num_threads = th.get_num_threads()  # each thread has its own number, and results depend on it
    stream: th.cuda.Stream | None = None
    if device.type == "cuda":
        stream = _stream(th.cuda.current_device() if device.index is None else device.index)
        stream.wait_stream(th.cuda.current_stream(stream.device))

    def run() -> PreparedBatch:
        th.set_num_threads(num_threads)
        try:
            with nullcontext() if stream is None else th.cuda.stream(stream):
                return function()
        finally:
            if stream is not None:
                stream.synchronize()

    return run


def _map(function: Callable[[th.Tensor], Any], fields: Fields) -> Fields:
    """:param function: of a tensor :param fields: named tuples and dictionaries :return: the same with its results"""
    if isinstance(fields, th.Tensor):
        return function(fields)
    if isinstance(fields, dict):
        return {name: _map(function, x) for name, x in fields.items()}  # type: ignore[return-value]
    if isinstance(fields, tuple):
        return type(fields)(*(_map(function, x) for x in fields))
    return fields
