"""The thread that an engine lives in; an event loop hands it texts and gets what they gain."""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.generation import engine as engines
from gptjax.generation import scoring
from gptjax.generation.engine import Engine, Request

_TOKENS_AT_ONCE = 8  # so that a stream flows, and a text that nobody reads ends soon


class Busy(Exception):
    """As many texts wait as may."""


class Texts(NamedTuple):
    """Texts that are being written or scored.

    Attributes:
      results: of (place, what it gained), which is an `Output`, or the one `Scores` of a text to score, or an exception.
      stop: ends the text at a place.
    """

    results: asyncio.Queue[tuple[int, Any]]
    stop: Callable[[int], None]


class Worker:
    """Runs an engine, continuously batched, for an event loop in another thread.

    Args:
      engine: used by this thread alone from now on.
      max_waiting: how many texts may wait for a slot.

    Attributes:
      num_texts: how many are being written, scored, or wait.
      ready: set once everything is compiled.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self.max_texts = engine.num_slots + max_waiting
        self.num_texts = 0
        self.ready = threading.Event()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deliver: dict[int, Callable[[Any], None]] = {}  # by the engine's id of a text
        self._scoring: dict[int, Iterator[Any]] = {}  # by the id of their delivery
        self._scoring_ids = itertools.count(-1, -1)  # never again: who is done may yet say that its text is to stop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def writing(self, requests: Sequence[Request | np.ndarray]) -> Iterator[Texts]:
        """Lines texts up, to be written, or as arrays of ids to be scored; what still goes on ends when it is left.

        Raises:
          Busy: there is no room for all of them.
        """
        if self.num_texts + len(requests) > self.max_texts:
            raise Busy
        loop, results = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        ids: dict[int, int] = {}  # by place; known to the thread alone

        def deliver(place: int, result: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(results.put_nowait, (place, result))

        def start() -> None:
            for place, request in enumerate(requests):
                try:
                    if isinstance(request, Request):
                        ids[place] = self.engine.submit(request)
                    else:
                        ids[place] = next(self._scoring_ids)
                        self._scoring[ids[place]] = scoring.score(self.engine, request)
                    self._deliver[ids[place]] = lambda result, place=place: deliver(place, result)  # type: ignore[misc]
                except Exception as error:
                    deliver(place, error)

        def stop(place: int) -> None:
            text_id = ids.get(place, 0)
            if self._deliver.pop(text_id, None) and not self._scoring.pop(text_id, None):
                self.engine.cancel(text_id)

        def stop_all() -> None:
            for place in range(len(requests)):
                stop(place)

        self.num_texts += len(requests)
        self._calls.put(start)
        try:
            yield Texts(results, lambda place: self._calls.put(lambda: stop(place)))
        finally:
            self.num_texts -= len(requests)
            self._calls.put(stop_all)

    @property
    def is_alive(self) -> bool:
        """False once the thread has died, as of a model that does not fit into memory."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread, and all texts with it; waits for no more than a step."""
        self._calls.put(None)
        if self.ready.is_set():
            self._thread.join()

    def _run(self) -> None:
        self.engine.warm_up()
        if not self.engine.memory_len:
            scoring.warm_up(self.engine)
        self.ready.set()
        while True:
            try:
                call = self._calls.get(block=not self._deliver)
                if call is None:
                    return
                call()
            except queue.Empty:
                try:
                    self._work()
                except Exception as error:  # of the device, as no more memory: those who are here pay, others may come
                    logging.exception("the engine failed")
                    for deliver in self._deliver.values():
                        deliver(error)
                    self._deliver.clear()
                    self._scoring.clear()
                    self.engine.reset()

    def _work(self) -> None:
        """A step of the batch, and a part of a text to score."""
        if len(self._deliver) > len(self._scoring):
            for output in self.engine.step(_TOKENS_AT_ONCE):
                if deliver := self._deliver.get(output.id):
                    deliver(output)
                if output.finish_reason:
                    self._deliver.pop(output.id, None)
        for text_id, scores in [*self._scoring.items()][:1]:
            if (result := next(scores)) is not None:
                self._scoring.pop(text_id)
                self._deliver.pop(text_id)(result)


def num_compiles() -> int:
    """How many programs serving has compiled in this process."""
    return engines.num_compiles() + scoring.num_compiles()
