"""Serves the page and starts the first load; knows the command line's choices and no widget."""

import argparse
import logging

from app.engine import Choice
from app.limits import OPEN, public
from app.space import make_engine, ready_to_launch, settled
from app.ui import build, launch_options

log = logging.getLogger(__name__)

HERE = ("127.0.0.1", "localhost", "::1")


def serve(chosen: argparse.Namespace) -> int:
    """Open the page, load the pair behind it, stay until interrupted; the exit code."""
    chosen = settled(chosen)
    engine = make_engine(
        device=chosen.device, dtype=chosen.dtype, quantize=chosen.quantize, spare_cores=spare_cores(chosen)
    )  # fmt: skip
    first = first_choice(chosen)
    limits = public(allowed(first)) if chosen.public else OPEN
    app = build(engine, limits)
    engine.load(first)
    ready_to_launch(engine)
    try:
        _, url, shared = app.page.launch(
            server_name=chosen.host, server_port=chosen.port, share=chosen.share, inbrowser=not chosen.no_browser,
            prevent_thread_lock=True, quiet=True, **launch_options(),
        )  # fmt: skip
    except OSError as error:
        log.error("The page cannot be served. %s. Choose another --port or --host.", error)
        return 1
    print(f"DFlash is at {url}" + (f" and {shared}" if shared else ""), flush=True)
    app.page.block_thread()
    return 0


def spare_cores(chosen: argparse.Namespace) -> int:
    """A browser on this machine needs a core: a decode that takes all of them waits for it in every forward."""
    return 0 if chosen.public or chosen.host not in HERE else 1


def first_choice(chosen: argparse.Namespace) -> Choice:
    name = chosen.pair if chosen.target is None else chosen.target
    return Choice(name=name, target=chosen.target, draft=chosen.draft)


def allowed(first: Choice) -> tuple[str, ...]:
    """A shared host offers what it was started with; a stranger must not make it download more."""
    return (first.name,) if first.target is None else ()
