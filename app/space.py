"""Being a Space: which options it needs, and decoding on ZeroGPU in the process that is lent the GPU; knows no widget.

Anywhere else the options stay, the optional `spaces` package is not looked for and the engine is the ordinary one.
"""

import argparse
import contextvars
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from app.engine import Choice, Engine, EngineError
from dflash_core import DFlashError, Finish, Pair, Prefill, SamplingParams, Step, decode, load_pair

Event: TypeAlias = Prefill | Step | Finish
# What crosses the process border: new events, and in the last chunk what went wrong, in the words of a DFlashError.
Chunk: TypeAlias = tuple[tuple[Event, ...], tuple[str, str, str] | None]

# A cancel is seen only when a chunk is told, so there is one even when nothing is new.
CHUNK_SECONDS = 1 / 15
LENT_SECONDS = 60


def on_space() -> bool:
    """Whether this process runs on Hugging Face Spaces."""
    return "SPACE_ID" in os.environ


def settled(chosen: argparse.Namespace) -> argparse.Namespace:
    """The command line's choices; on a Space, which is started without any, open to visitors and with their caps."""
    if not on_space():
        return chosen
    return argparse.Namespace(**vars(chosen) | {"host": "0.0.0.0", "public": True, "no_browser": True, "share": False})


def on_zero_gpu() -> bool:
    """Whether this process runs on a Space whose GPU is lent call by call."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def make_engine(**load_options: Any) -> Engine:
    """The engine for this machine. Build it before anything touches CUDA and before the page is launched."""
    if not on_zero_gpu():
        return Engine(**load_options)
    # The package patches CUDA while it is imported, so it must not be imported later.
    spaces = importlib.import_module("spaces")
    return ZeroEngine(lend=spaces.GPU(duration=LENT_SECONDS), **load_options)


def ready_to_launch(engine: Engine) -> None:
    """On ZeroGPU the weights are packed when the page is launched, so they must be loaded by then."""
    if isinstance(engine, ZeroEngine):
        engine.wait(3600)


class ZeroEngine(Engine):
    """An engine whose pair waits in this process and decodes in a forked one, lent the GPU for one reply at a time."""

    def __init__(
        self,
        lend: Callable[[Callable[..., Iterator[Chunk]]], Callable[..., Iterator[Chunk]]],
        load: Callable[..., Pair] = load_pair,
        decode: Callable[..., Iterator[Event]] = decode,
        **load_options: Any,
    ) -> None:
        self._decode_there = decode

        # The worker inherits the pair by being forked: only ids, settings and events are ever pickled.
        def told(ids: tuple[int, ...], params: SamplingParams, drafting: bool) -> Iterator[Chunk]:
            yield from chunks(lambda: self._decode_there(self._pair, ids, params, drafting=drafting))

        self._lent = lend(told)
        super().__init__(load, decode, **load_options)

    def load(self, choice: Choice) -> None:
        """Load the one pair of this host: workers that were forked with it would never see another."""
        if self.status.phase == "ready":
            raise EngineError(
                "This host keeps its pair.", f"It is '{self.status.pair_name}'.", "Run the app yourself to switch."
            )
        super().load(choice)

    @property
    def decode(self) -> Callable[..., Iterator[Event]]:
        """A decode for the caller's visitor, whose share of the GPU it uses: read it where their request is handled."""
        context = contextvars.copy_context()
        if not _has_request(context):
            return _nothing

        def run(_: Pair, ids: Sequence[int], params: SamplingParams, *, drafting: bool = True) -> Iterator[Event]:
            if params.processors:
                raise EngineError(
                    "This cannot run on a lent GPU.", "Functions do not cross its border.", "Leave it out."
                )
            return events(_in_context(context, self._lent(tuple(ids), params, drafting)))

        return run

    @decode.setter
    def decode(self, _: Any) -> None:
        """The base class sets it once; the real one is made per request."""


def chunks(start: Callable[[], Iterator[Event]], seconds: float = CHUNK_SECONDS) -> Iterator[Chunk]:
    """Decode in a thread and tell what is new every so many seconds, in order and completely.

    Closing the generator ends the decode after the pass it is in.
    """
    new: list[Event] = []
    failed: list[tuple[str, str, str]] = []
    stopping, done = threading.Event(), threading.Event()

    def work() -> None:
        try:
            for event in (made := start()):
                new.append(event)
                if stopping.is_set():
                    break
            _close(made)
        except DFlashError as error:
            failed.append((error.wrong, error.found, error.do))
        except Exception as error:
            failed.append(
                ("The run broke.", f"{type(error).__name__}: {error}.", "Try again; the log has the details.")
            )
        finally:
            done.set()

    thread = threading.Thread(target=work, name="decode-on-gpu", daemon=True)
    thread.start()
    try:
        told = 0
        while not (last := done.wait(seconds)) or told < len(new) or failed:
            fresh = tuple(new[told:])
            told += len(fresh)
            yield fresh, failed[0] if last and failed else None
            if last and failed:
                return
    finally:
        stopping.set()
        thread.join()


def events(told: Iterator[Chunk]) -> Iterator[Event]:
    """The events of chunks one by one. Raises the `DFlashError` that a chunk brings."""
    try:
        for fresh, failed in told:
            yield from fresh
            if failed is not None:
                raise DFlashError(*failed)
    finally:
        _close(told)


def _in_context(context: contextvars.Context, inner: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same values, each made in the given context, whatever thread asks."""
    end = object()
    try:
        while (value := context.run(next, inner, end)) is not end:
            yield value
    finally:
        context.run(_close, inner)


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)
    if close is not None:
        close()


def _has_request(context: contextvars.Context) -> bool:
    from gradio.context import LocalContext

    return context.get(LocalContext.request) is not None


def _nothing(*_: Any, **__: Any) -> Iterator[Event]:
    """No visitor, no GPU: the warm-up of a load makes no pass."""
    yield from ()
