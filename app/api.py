"""The documented endpoints for programs, `/chat` and `/steps`; they stand in the same queue as everybody else."""

import secrets
from collections.abc import Iterator
from typing import Any

import gradio as gr

from app.answering import visitor_of
from app.desk import Desk
from app.replies import frames
from app.settings import Settings
from app.turn import Run
from dflash_core import DFlashError

LOADING_SECONDS, POLL_SECONDS = 600.0, 1.0

CHAT_HELP = """Answer one message and return the reply as plain text.

message: what to answer. system: how to answer it. max_new_tokens, temperature, top_p, top_k, seed (negative draws one),
drafting and block_size (slots per block, 0 takes the draft's own) as in the app. Runs wait their turn, one at a time."""
STEPS_HELP = """Answer one message and stream how it was made: each output is the events since the output before, one a line.

A line is a JSON object with "t": "prefill" (prompt_tokens, first_token, seconds), "step" (one verify pass: anchor, drafted,
posterior, accepted, correction, committed, confidences, draft_seconds, verify_seconds), "finish" (reason, new_tokens, steps,
seconds) or "cancel". "piece", "pieces" and "tail" hold the text of its tokens. Inputs as for /chat."""


def build(desk: Desk) -> None:
    """Add both endpoints to the page under construction."""

    def chat(
        message: str, client: gr.Request, system: str = "", max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = -1, drafting: bool = True, block_size: int = 0,
    ) -> str:  # fmt: skip
        settings = _settings(locals())
        return _told(lambda: _whole_reply(desk, client, message, system, settings))

    def steps(
        message: str, client: gr.Request, system: str = "", max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = -1, drafting: bool = True, block_size: int = 0,
    ) -> Iterator[str]:  # fmt: skip
        yield from _deltas(desk, client, message, system, _settings(locals()))

    shared = {"concurrency_limit": 16, "concurrency_id": "api"}
    gr.api(chat, api_name="chat", api_description=CHAT_HELP, **shared)
    gr.api(steps, api_name="steps", api_description=STEPS_HELP, **shared)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    return given | {
        "seed": None if given["seed"] < 0 else given["seed"],
        "block_size": given["block_size"] or None,
    }


def _told(act: Any) -> Any:
    """The result, or the error as the client reads it."""
    try:
        return act()
    except DFlashError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _open(desk: Desk, client: gr.Request, message: str, system: str, given: dict[str, Any]) -> tuple[str, Run]:
    """A run of its own: a program may have several waiting, each found under a fresh name."""
    session = f"{client.session_hash}-{secrets.token_hex(4)}"
    instruction = [{"role": "system", "content": system}] if system.strip() else []
    messages = [*instruction, {"role": "user", "content": message}]
    desk.engine.wait(LOADING_SECONDS)
    return session, desk.open(session, visitor_of(client), messages, Settings.of(given), owner=client.session_hash)


def _whole_reply(desk: Desk, client: gr.Request, message: str, system: str, given: dict[str, Any]) -> str:
    session, run = _open(desk, client, message, system, given)
    try:
        while not run.wait(POLL_SECONDS):
            pass
        if run.error is not None:
            raise run.error
        return run.text
    finally:
        desk.close(session)


def _deltas(desk: Desk, client: gr.Request, message: str, system: str, given: dict[str, Any]) -> Iterator[str]:
    session, run = _told(lambda: _open(desk, client, message, system, given))
    try:
        # The header tells nothing that the caller did not.
        sent = run.ndjson.index("\n") + 1
        for frame in frames(run):
            if len(frame.trace) > sent:
                yield frame.trace[sent:]
                sent = len(frame.trace)
        if run.error is not None:
            raise gr.Error(str(run.error), print_exception=False)
    finally:
        desk.close(session)
