"""A stand-in for the `spaces` package: a GPU lent to a forked worker, with ZeroGPU's borders; knows no decoding.

Arguments and yields are pickled, nothing else crosses; a cancel is looked at only after the worker's next yield.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

FORK = multiprocessing.get_context("fork")


class LentGpu:
    """`GPU` as in `spaces`. Remembers what a test may ask: `requests` seen when scheduling, `sent` bytes per yield."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.durations: list[Any] = []
        self.sent: list[int] = []

    def GPU(self, *, duration: int) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
        self.durations.append(duration)
        return lambda task: lambda *args: self._borrowed(task, args)

    def _borrowed(self, task: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> Iterator[Any]:
        from gradio.context import LocalContext

        self.requests.append(LocalContext.request.get(None))
        packed = pickle.dumps(args)
        ours, theirs = FORK.Pipe()
        stop = FORK.Event()
        worker = FORK.Process(target=_work, args=(task, packed, theirs, stop), daemon=True)
        worker.start()
        try:
            while (raw := ours.recv_bytes()) != b"end":
                self.sent.append(len(raw))
                yield pickle.loads(raw)
        except GeneratorExit:
            stop.set()
            raise
        finally:
            while stop.is_set() and ours.recv_bytes() != b"end":
                pass
            worker.join(10)
            assert not worker.is_alive()


def _work(task: Callable[..., Iterator[Any]], packed: bytes, pipe: Any, stop: Any) -> None:
    made = task(*pickle.loads(packed))
    try:
        for value in made:
            if stop.is_set():
                made.close()
                break
            pipe.send_bytes(pickle.dumps(value))
    finally:
        pipe.send_bytes(b"end")
