"""The guided tour: its cards, and the moments of the recorded run that they point at; knows no widget and no script."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from app.race import reply_ids
from app.trace import Trace, open_trace
from dflash_core import Step

ASSETS = Path(__file__).resolve().parent.parent / "assets"
RECORDINGS = {name: ASSETS / "traces" / f"{name}.ndjson" for name in ("dflash", "plain")}
ATTENTION = ASSETS / "learn" / "attention.json"
GAME_ROUNDS = 6

PAPER = "https://arxiv.org/abs/2602.06036"
LINKS = (
    ("DFlash: Block Diffusion for Flash Speculative Decoding", "the paper of this method", PAPER),
    ("Fast Inference from Transformers via Speculative Decoding", "Leviathan et al. 2023, the idea and why it is exact",
     "https://arxiv.org/abs/2211.17192"),
    ("Accelerating Large Language Model Decoding with Speculative Sampling", "Chen et al. 2023, found at the same time",
     "https://arxiv.org/abs/2302.01318"),
    ("Block Diffusion", "Arriola et al. 2025, between autoregressive and diffusion language models",
     "https://arxiv.org/abs/2503.09573"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Beat:
    """Where the X-ray goes: a step and its phase, and how long it stays before the next beat."""

    step: int
    phase: str = "verdict"
    milliseconds: int = 1400


@dataclass(frozen=True, slots=True)
class Card:
    """One idea. `text` are paragraphs, `**so**` is strong. The X-ray shows `trace`, going through `beats` or replaying
    from the start at `speed`; `extra` names a further view."""

    key: str
    title: str
    text: tuple[str, ...]
    trace: str = "dflash"
    beats: tuple[Beat, ...] = ()
    speed: float | None = None
    extra: str = ""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of one plain pass, of one draft and of one verify pass, and the acceptance length they came with."""

    plain_seconds: float
    draft_seconds: float
    verify_seconds: float
    tau: float
    block_size: int


def costs(plain: Trace, drafted: Trace) -> Costs:
    """Medians over the steps; whole blocks only, as the last one may be shorter."""
    steps = _steps(drafted)
    k = max(len(step.drafted) for step in steps)
    whole = [step for step in steps if len(step.drafted) == k]
    assert drafted.stats.tau is not None
    return Costs(
        plain_seconds=statistics.median(step.verify_seconds for step in _steps(plain)),
        draft_seconds=statistics.median(step.draft_seconds for step in whole),
        verify_seconds=statistics.median(step.verify_seconds for step in whole),
        tau=drafted.stats.tau,
        block_size=k + 1,
    )


@dataclass(frozen=True, slots=True)
class Moments:
    """Steps of the recording that show something: some guesses accepted, all of them (None if never), fewest."""

    some: int
    all: int | None
    fewest: int


def moments(trace: Trace) -> Moments:
    steps = _steps(trace)
    k = max(len(step.drafted) for step in steps)
    whole = [step for step in steps if len(step.drafted) == k] or steps
    # About half accepted shows all there is to see: ticks, the correction and what is thrown away.
    some = min(whole, key=lambda step: (abs(step.accepted - max(1, k // 2)), step.index))
    full = next((step.index for step in whole if step.accepted == k), None)
    return Moments(some.index, full, min(whole, key=lambda step: (step.accepted, step.index)).index)


def game_steps(trace: Trace, rounds: int = GAME_ROUNDS) -> list[int]:
    """Steps to guess at, spread over the reply and over what can happen; the tour's own examples are left out."""
    steps = _steps(trace)
    k = max(len(step.drafted) for step in steps)
    seen = moments(trace)
    fresh = [s for s in steps if len(s.drafted) == k and s.index not in (seen.some, seen.all, seen.fewest)]
    by_outcome: dict[int, list[Step]] = {}
    for step in fresh:
        by_outcome.setdefault(step.accepted, []).append(step)
    queues = list(by_outcome.values())
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return sorted(step.index for step in turns[:rounds])


@cache
def tour() -> dict[str, Any]:
    """Everything the page needs, as plain JSON values. Raises `TraceError` when a recording is missing or damaged."""
    plain, drafted = open_trace(RECORDINGS["plain"]), open_trace(RECORDINGS["dflash"])
    header = drafted.header
    return {
        "cards": [asdict(card) for card in cards(plain, drafted)],
        "traces": {"plain": plain.ndjson, "dflash": drafted.ndjson},
        "attention": json.loads(ATTENTION.read_text(encoding="utf-8")),
        "costs": asdict(costs(plain, drafted)),
        "game": game_steps(drafted),
        "links": [{"title": title, "note": note, "url": url} for title, note, url in LINKS],
        "recorded": " · ".join(filter(None, (header["pair"], header["device"], header["dtype"], header["title"]))),
    }


def cards(plain: Trace, drafted: Trace) -> tuple[Card, ...]:
    """The tour, its numbers taken from the two recordings."""
    return (*_drafting_cards(plain, drafted), *_checking_cards(plain, drafted), *_payoff_cards(plain, drafted))


def _drafting_cards(plain: Trace, drafted: Trace) -> tuple[Card, ...]:
    at, measured = moments(drafted), costs(plain, drafted)
    example, k = _steps(drafted)[at.some], measured.block_size - 1
    return (
        Card("slow", "One token at a time", (
            "A language model writes by running once per token. Every run, a **forward pass**, reads all of the "
            "model's weights from memory to produce a single token. Reading them, not computing with them, usually "
            "takes most of the time.",
            f"This is **plain decoding**, replayed as it was measured: after the prompt, {plain.stats.committed} "
            f"tokens took {plain.stats.steps} passes of about {_ms(measured.plain_seconds)} each.",
            "A pass over several tokens reads the same weights only once, so it costs far less than as many single "
            "passes. That is the room DFlash makes use of.",
        ), trace="plain", speed=1.0),
        Card("masks", "A block of masks", (
            "Beside the **target**, the model whose text we want, works a small **draft model**. It is given a "
            f"**block**: the **anchor**, which is the last token written so far, and {k} masked slots (▒) after it.",
            "The draft model's task is to say what stands behind the masks.",
        ), beats=(Beat(at.some, "mask"),)),
        Card("fill", "One parallel fill", (
            "An ordinary draft model would guess token after token, one pass for each. DFlash's draft model is a "
            f"small **block diffusion** model: it fills all {k} slots in **one** pass.",
            f"Here that took {_ms(example.draft_seconds)}. The bars show how sure it was of each guess: later slots "
            "are harder, because the words just before them are not known yet.",
            "A **DFlash 2** draft, like the one that comes with this app, then walks over its slots once from the left "
            "and takes, among each slot's best candidates, the one that fits the word chosen just before. That needs "
            "no further pass.",
        ), beats=(Beat(at.some, "mask"), Beat(at.some, "draft"))),
        Card("context", "It knows what the target knows", (
            "From the text alone a small model would guess badly. DFlash lets it read the target's **hidden "
            "states**: features taken from several of the target's layers are combined and given to every layer of "
            "the draft model as keys and values to attend to.",
            "The picture shows who attends to whom. Each slot sees all of the context before the anchor, and the "
            "whole block in both directions. The target, when it checks, sees only what comes before, as always.",
        ), beats=(Beat(at.some, "draft"),), extra="attention"),
    )  # fmt: skip


def _checking_cards(plain: Trace, drafted: Trace) -> tuple[Card, ...]:
    steps, at, measured = _steps(drafted), moments(drafted), costs(plain, drafted)
    example, k = steps[at.some], measured.block_size - 1
    return (
        Card("verify", "One verify pass", (
            f"Now the target runs once over the anchor and all {k} guesses together. This one pass tells what it "
            f"would have written itself after each of the {k + 1} slots: its **posterior**, the lower row.",
            f"It took {_ms(example.verify_seconds)}; a pass over a single token takes {_ms(measured.plain_seconds)}.",
        ), beats=(Beat(at.some, "draft"), Beat(at.some))),
        Card("prefix", "The accepted prefix", (
            "Compare the two rows from the left. As long as they agree, the guesses are **accepted** (✓).",
            "At the first disagreement the target's own token takes the place of the guess: the **correction** (▲). "
            "Whatever was guessed after it continues a text that is not being written, so it is thrown away (✗).",
            _outcome(example),
        ), beats=(Beat(at.some),)),
        _bonus_card(steps, at, k),
        Card("exact", "Why the text stays the same", (
            "Nothing stays that the target did not choose. An accepted guess is the token it would have written "
            "anyway, and a correction is its own. With greedy decoding the reply is the plain one, token for token. "
            "When sampling, the acceptance rule keeps the target's probabilities exactly.",
            _same_text(plain, drafted),
            "One thing to know: in low precision a block and a single token run through slightly different "
            "arithmetic, so two almost equal choices can swap. The Race tab finds such places and shows how close "
            "the choices were.",
        ), beats=(Beat(len(steps) - 1),)),
    )  # fmt: skip


def _payoff_cards(plain: Trace, drafted: Trace) -> tuple[Card, ...]:
    steps, at, measured = _steps(drafted), moments(drafted), costs(plain, drafted)
    return (
        Card("speed", "What it buys", (
            "Two numbers decide. The **acceptance length τ** is how many tokens a verify pass commits on average, "
            f"the correction or bonus included: {measured.tau:.2f} in this recording. The price of a step is one "
            "draft pass and one verify pass.",
            "Plain decoding pays one pass per token. So the speed-up is **τ × plain pass ÷ (draft pass + verify "
            "pass)**. Move the sliders; the app can measure your machine.",
        ), beats=(Beat(len(steps) - 1),), extra="whatif"),
        Card("limits", "When it does not pay", (
            "When few guesses are accepted, most of the block is wasted work. Below the break-even τ, where a step "
            "costs more than the plain passes it saves, drafting is slower than plain decoding.",
            "**Unpredictable text.** Names, numbers and topics far from what the draft model was trained on.",
            "**High temperature.** The target itself becomes harder to predict.",
            "**Weak or busy hardware.** Where arithmetic is scarce, checking a long block costs clearly more than "
            "one token. Shorter blocks help: choose the block size in the sidebar, or let the Race tab compare "
            "several.",
        ), beats=(Beat(at.fewest),), extra="whatif"),
        Card("game", "Your turn", (
            "The draft model has filled a block. How many of its guesses, counted from the left, will the target "
            "accept? Read the text so far, look at the bars, and choose.",
        ), extra="game"),
        Card("more", "Go on", (
            "Chat with a model and watch its blocks in the X-ray, or race it against plain decoding on this machine.",
        ), beats=(Beat(len(steps) - 1),), extra="links"),
    )  # fmt: skip


def _bonus_card(steps: Sequence[Step], at: Moments, k: int) -> Card:
    fewest = steps[at.fewest].accepted
    worst = (
        "And when already the first guess is wrong, the correction still joins the text"
        if fewest == 0
        else f"In the hardest step of this recording {_plural(fewest, 'guess was', 'guesses were')} right"
    )
    best = (
        f"Here all {k} guesses were right. The pass has told the target's choice after the last slot too, so it is "
        "added: the "
        f"**bonus** (★). One pass, {k + 1} tokens."
        if at.all is not None
        else f"When all {k} guesses are right, the target's choice after the last slot is added too: the "
        f"**bonus** (★). One pass would then write {k + 1} tokens; it did not happen in this recording."
    )
    first = (Beat(at.all, "draft"), Beat(at.all, milliseconds=4000)) if at.all is not None else ()
    text = (best, f"{worst}: a verify pass never writes fewer tokens than a plain one.")
    return Card("bonus", "All right, or all wrong", text, beats=(*first, Beat(at.fewest)))


def _outcome(step: Step) -> str:
    if step.accepted == len(step.drafted):
        return "Here every guess was accepted."
    accepted = (
        "No guess was accepted here"
        if not step.accepted
        else f"Here {_plural(step.accepted, 'guess was', 'guesses were')} accepted"
    )
    return f"{accepted}: with the correction, one pass wrote {_plural(step.accepted + 1, 'token', 'tokens')}."


def _same_text(plain: Trace, drafted: Trace) -> str:
    if reply_ids(plain) == reply_ids(drafted):
        return f"The two recordings of this tour are such a pair: all {drafted.stats.new_tokens} tokens are the same."
    return "The two recordings of this tour part at a near tie between two tokens."


def _steps(trace: Trace) -> list[Step]:
    return [event for event in trace.events if isinstance(event, Step)]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
