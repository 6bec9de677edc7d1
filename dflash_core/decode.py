"""The one loop, for drafting and for the baseline: prompt ids in, events out; knows no model class, no file, no screen."""

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dflash_core.config import SamplingParams
from dflash_core.drafter import DFlashDrafter, Drafter, NoDraft
from dflash_core.errors import DecodeError, PromptError
from dflash_core.events import Event, Finish, FinishReason, Prefill, Step
from dflash_core.graphed import GraphedDrafter
from dflash_core.sampling import Sampler, confidence
from dflash_core.scheduler import judge

if TYPE_CHECKING:
    from dflash_core.loading import Pair


@torch.inference_mode()
def decode(
    pair: "Pair",
    prompt_ids: Sequence[int],
    params: SamplingParams = SamplingParams(),
    *,
    drafting: bool = True,
    drafter: Drafter | None = None,
) -> Generator[Event, Sequence[int] | None, None]:
    """Decode one reply: yields one `Prefill`, one `Step` per verify pass, one `Finish`.

    `drafting=False` is the baseline, the same loop with nothing drafted. `drafter` replaces the pair's own draft model.
    A reply sent into the generator after an event takes the place of the one decoded so far.
    Raises `PromptError` before the first event and `DecodeError` when a run breaks; close the generator to stop early.
    """
    run = _Run(pair, prompt_ids, params, drafter or default_drafter(pair, params, drafting))
    try:
        run.amend((yield run.prefill()))
        while run.reason is None:
            run.amend((yield run.step()))
        yield run.finish()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(run) from error
    finally:
        run.session.close()


def default_drafter(pair: "Pair", params: SamplingParams, drafting: bool) -> Drafter:
    if not drafting:
        return NoDraft()
    if pair.draft is None:
        raise PromptError(
            "This pair cannot draft.", f"'{pair.name}' was loaded without a draft model.", "Load a draft or turn drafting off."
        )
    trained = pair.draft.config.block_size
    if params.block_size is not None and params.block_size > trained:
        raise PromptError(
            "The block size is too large for this draft.",
            f"It is {params.block_size}, the draft was trained for {trained}.",
            f"Choose 2 to {trained}.",
        )
    kind = GraphedDrafter if pair.target.graphs else DFlashDrafter
    return kind(pair.target, pair.draft, params.block_size)


class _Run:
    """The state of one reply: what is committed, what the target said last, and the clock."""

    def __init__(self, pair: "Pair", prompt_ids: Sequence[int], params: SamplingParams, drafter: Drafter) -> None:
        self.prompt = _checked_prompt(pair, prompt_ids)
        self.params, self.drafter, self.target = params, drafter, pair.target
        self.sampler = Sampler(params, pair.target.device)
        self.ending = _Ending(pair, params, len(self.prompt))
        self.capacity = len(self.prompt) + self.ending.limit + drafter.max_drafted + 1
        self.session = pair.target.session(drafter.taps, self.capacity)
        self.device = pair.target.device
        self.reply: list[int] = []
        self.reason: FinishReason | None = None
        self.steps = 0
        self.seconds = 0.0
        self.features: Any = None

    def prefill(self) -> Prefill:
        start = self._now()
        logits, self.features = self.session.prefill(torch.tensor([self.prompt], device=self.device))
        logits = self.sampler.process(logits[None], self.prompt, ())
        first = self.sampler.choose(logits, position=0)
        _check_numbers(confidence(logits, first).tolist(), "the prompt")
        self._commit(first.tolist())
        self.seconds += (elapsed := self._now() - start)
        return Prefill(len(self.prompt), self.reply[0], elapsed)

    def step(self) -> Step:
        """One cycle: draft a block, verify it in one forward, keep the accepted prefix and the target's correction."""
        position, anchor = len(self.reply), self.reply[-1]
        start = self._now()
        drafted, draft_probs, draft_confidence = self._draft(anchor)
        drafted_ids = drafted.tolist()
        middle = self._now() if drafted_ids else start

        block = torch.cat((torch.tensor([anchor], device=self.device), drafted))[None]
        logits, features = self.session.forward(block)
        logits = self.sampler.process(logits, (*self.prompt, *self.reply), drafted_ids)
        verdict = judge(self.sampler, logits, drafted, draft_probs, position)
        target_confidence = confidence(logits, verdict.posterior).tolist()
        _check_numbers(target_confidence, f"step {self.steps}")
        posterior, accepted = verdict.posterior.tolist(), verdict.accepted
        self.session.rollback(1 + accepted)
        self.features = None if features is None else features[:, : 1 + accepted]
        committed = self._commit([*drafted_ids[:accepted], posterior[accepted]])
        end = self._now()

        self.seconds += end - start
        self.steps += 1
        return Step(
            index=self.steps - 1,
            position=position,
            anchor=anchor,
            drafted=tuple(drafted_ids),
            posterior=tuple(posterior),
            accepted=accepted,
            correction=posterior[accepted],
            committed=tuple(committed),
            draft_confidence=tuple(draft_confidence),
            target_confidence=tuple(target_confidence),
            draft_seconds=middle - start,
            verify_seconds=end - middle,
        )

    def amend(self, reply: Sequence[int] | None) -> None:
        """Go on from another reply, None to change nothing. What the caches hold of the old text is run again."""
        if reply is None or list(reply) == self.reply:
            return
        old, self.reply = self.reply, []
        self._commit(_checked_reply(reply, self.target.vocab_size))
        run_so_far = len(self.prompt) + len(self.reply) - 1
        # The last token has not been run yet, so a change of it alone touches no cache.
        if self.reason is None and (old[:-1] != self.reply[:-1] or self.session.length != run_so_far):
            start = self._now()
            self.session.close()
            self.session = self.target.session(self.drafter.taps, self.capacity)
            self.drafter.reset()
            _, self.features = self.session.prefill(torch.tensor([self.prompt + self.reply[:-1]], device=self.device))
            self.seconds += self._now() - start

    def finish(self) -> Finish:
        assert self.reason is not None
        return Finish(self.reason, len(self.reply), self.steps, self.seconds)

    def _draft(self, anchor: int) -> tuple[torch.Tensor, torch.Tensor | None, list[float]]:
        """Drafted tokens [k], the probabilities they were drawn from under rejection sampling, and their confidence."""
        # The correction is one more token, so drafting the whole remaining length would overshoot it.
        k = min(self.drafter.max_drafted, self.ending.room(self.reply) - 1)
        if k < 1:
            return torch.empty(0, dtype=torch.long, device=self.device), None, []
        self.drafter.commit(self.features)
        drafted, probs, logits = self.sampler.draft(self.drafter.propose(anchor, k))
        return drafted, probs, confidence(logits, drafted).tolist()

    def _commit(self, tokens: list[int]) -> list[int]:
        """Join tokens to the reply up to where it ends; returns those that joined."""
        committed = []
        for token in tokens:
            self.reply.append(token)
            committed.append(token)
            self.reason = self.ending.reason(self.reply)
            if self.reason is not None:
                break
        return committed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Ending:
    """When a reply is over: a stop token, a stop string, the length limit, or the context full."""

    def __init__(self, pair: "Pair", params: SamplingParams, prompt_tokens: int) -> None:
        context_room = pair.context_length - prompt_tokens
        self.limit = min(params.max_new_tokens, context_room)
        self.at_limit: FinishReason = "length" if params.max_new_tokens <= context_room else "context"
        self.stop_ids = frozenset(pair.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids)
        self.stop_strings = params.stop_strings
        self.tokenizer = pair.tokenizer

    def room(self, reply: list[int]) -> int:
        return self.limit - len(reply)

    def reason(self, reply: list[int]) -> FinishReason | None:
        if reply[-1] in self.stop_ids or self._has_stop_string(reply):
            return "stop"
        return self.at_limit if len(reply) >= self.limit else None

    def _has_stop_string(self, reply: list[int]) -> bool:
        if not self.stop_strings:
            return False
        # A character takes at most 4 byte-level tokens, so this tail holds any stop string the last token completed.
        tail = reply[-(4 * max(map(len, self.stop_strings)) + 4) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return any(stop in text for stop in self.stop_strings)


def _checked_prompt(pair: "Pair", prompt_ids: Sequence[int]) -> list[int]:
    ids = [int(i) for i in prompt_ids]
    if not ids:
        raise PromptError("The prompt is empty.", "It has no tokens.", "Write something to answer.")
    if len(ids) >= pair.context_length:
        raise PromptError(
            "The prompt is too long for this target.",
            f"It has {len(ids)} tokens, the context holds {pair.context_length}.",
            "Shorten the prompt or start a new chat.",
        )
    bad = [i for i in ids if not 0 <= i < pair.target.vocab_size]
    if bad:
        raise PromptError(
            "The prompt has a token this target does not know.",
            f"Found id {bad[0]}, the vocabulary ends at {pair.target.vocab_size - 1}.",
            "Tokenize with the pair's own tokenizer.",
        )
    return ids


def _checked_reply(reply: Sequence[int], vocab_size: int) -> list[int]:
    bad = [i for i in reply if not 0 <= i < vocab_size]
    if bad or not reply:
        raise PromptError(
            "The reply cannot go on from this text.",
            f"It has id {bad[0]}, the vocabulary ends at {vocab_size - 1}." if bad else "It has no tokens.",
            "Send at least one token that the target knows.",
        )
    return list(reply)


def _check_numbers(values: list[float], where: str) -> None:
    if any(value != value for value in values):
        raise DecodeError(
            "The target's output is not a number.",
            f"It happened at {where}.",
            "Use dtype float32 or bfloat16, and check that the weights are whole.",
        )


def _out_of_memory(run: _Run) -> DecodeError:
    return DecodeError(
        "There is not enough memory for this reply.",
        f"It broke on {run.device} after {len(run.prompt)} prompt and {len(run.reply)} reply tokens.",
        "Shorten the chat, lower the block size or max_new_tokens, or load the pair with quantize='4bit'.",
    )
