"""The loop commits exactly what plain decoding would, ends where it should, and never mixes runs up."""

import json
import random
from pathlib import Path

import pytest
import torch

from dflash_core import DFlashError, Finish, Prefill, SamplingParams, Step, decode
from tests import tiny
from tests.scripted import OracleDrafter, reply_of, run

PROMPT_TOKENS = 3 * tiny.SLIDING_WINDOW


def prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(4, 126) for _ in range(length)]


def generated(model, ids, new_tokens, eos=None) -> list[int]:
    """transformers' own greedy reply."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=eos,
            pad_token_id=3,
        )
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=sorted(tiny.TARGETS))
def model(request):
    return tiny.TARGETS[request.param]()


@pytest.fixture(scope="module")
def pair(model):
    return tiny.tiny_pair(model, tiny.tiny_draft(model.config, block_size=8))


@pytest.fixture(scope="module")
def llama_pair():
    model = tiny.tiny_llama()
    return tiny.tiny_pair(model, tiny.tiny_draft(model.config, block_size=8))


def taps_of(pair) -> tuple[int, ...]:
    return pair.draft.config.target_layer_ids


@pytest.mark.parametrize("seed", range(3))
def test_baseline_and_random_draft_equal_generate(model, pair, seed):
    ids = prompt(seed)
    expected = generated(model, ids, 60)
    params = SamplingParams(max_new_tokens=60, stop_token_ids=())
    assert run(pair, ids, params, drafting=False)[0] == expected
    assert run(pair, ids, params)[0] == expected


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 8, 15])
def test_scripted_acceptance_equals_generate(model, pair, k):
    """Every accepted count from 0 to k comes up, past the sliding window, with features fed exactly once."""
    ids = prompt(7)
    expected = generated(model, ids, 70)
    oracle = OracleDrafter(expected, 128, k, right_of=lambda step: (step * 5) % (k + 1), taps=taps_of(pair))
    params = SamplingParams(max_new_tokens=70, stop_token_ids=())
    reply, events = run(pair, ids, params, drafter=oracle)
    assert reply == expected
    steps = [event for event in events if isinstance(event, Step)]
    if k:
        assert oracle.prompt_tokens == len(ids)
        assert len({step.accepted for step in steps}) > min(k, 4)
    for step in steps[:-1]:
        if len(step.drafted) == k:
            assert step.accepted == (step.index * 5) % (k + 1)


def test_perfect_draft_commits_whole_blocks(llama_pair):
    ids = prompt(3)
    truth = generated(llama_pair.target.model, ids, 49)
    oracle = OracleDrafter(truth, 128, 7, right_of=lambda step: 7, taps=taps_of(llama_pair))
    reply, events = run(llama_pair, ids, SamplingParams(max_new_tokens=49, stop_token_ids=()), drafter=oracle)
    assert reply == truth
    assert [len(step.committed) for step in events if isinstance(step, Step)] == [8] * 6


def test_events_tell_one_consistent_story(llama_pair):
    ids = prompt(5)
    truth = generated(llama_pair.target.model, ids, 50)
    oracle = OracleDrafter(truth, 128, 7, right_of=lambda step: step % 8, taps=taps_of(llama_pair))
    reply, events = run(llama_pair, ids, SamplingParams(max_new_tokens=50, stop_token_ids=()), drafter=oracle)
    assert isinstance(events[0], Prefill) and events[0].prompt_tokens == len(ids)
    assert isinstance(events[-1], Finish)
    assert events[-1] == Finish("length", 50, len(events) - 2, events[-1].seconds)
    position = 1
    for index, step in enumerate(events[1:-1]):
        assert step.index == index and step.position == position
        assert step.anchor == reply[position - 1]
        assert len(step.posterior) == len(step.drafted) + 1 == len(step.target_confidence)
        assert len(step.draft_confidence) == len(step.drafted)
        assert step.drafted[: step.accepted] == step.posterior[: step.accepted]
        if step.accepted < len(step.drafted):
            assert step.drafted[step.accepted] != step.posterior[step.accepted]
        assert step.correction == step.posterior[step.accepted]
        assert step.committed == (*step.drafted[: step.accepted], step.correction)[: len(step.committed)]
        assert all(0.0 <= c <= 1.0 for c in step.target_confidence + step.draft_confidence)
        position += len(step.committed)
    assert position == len(reply) == 50
    assert sum(e.draft_seconds + e.verify_seconds for e in events[1:-1]) + events[0].seconds == pytest.approx(events[-1].seconds)


@pytest.mark.parametrize("limit", range(1, 14))
def test_length_limit_is_never_overshot(llama_pair, limit):
    ids = prompt(9)
    truth = generated(llama_pair.target.model, ids, 40)
    oracle = OracleDrafter(truth, 128, 7, right_of=lambda step: 7, taps=taps_of(llama_pair))
    reply, events = run(llama_pair, ids, SamplingParams(max_new_tokens=limit, stop_token_ids=()), drafter=oracle)
    assert reply == truth[:limit]
    assert events[-1].reason == "length" and events[-1].new_tokens == limit


@pytest.mark.parametrize("at", range(12))
def test_stop_token_ends_the_reply_at_every_place_in_a_block(llama_pair, at):
    """First generated token, first slot, middle, last slot and the correction: the stop token is kept, nothing after it."""
    ids = prompt(11)
    truth = generated(llama_pair.target.model, ids, 40)
    first = truth.index(truth[at])
    oracle = OracleDrafter(truth, 128, 7, right_of=lambda step: 5, taps=taps_of(llama_pair))
    params = SamplingParams(max_new_tokens=40, stop_token_ids=(truth[at],))
    reply, events = run(llama_pair, ids, params, drafter=oracle)
    assert reply == truth[: first + 1]
    assert events[-1].reason == "stop" and events[-1].new_tokens == first + 1
    last = events[-2]
    if isinstance(last, Step):
        assert last.committed[-1] == truth[at]


def test_pair_stop_tokens_are_the_default(llama_pair):
    ids = prompt(13)
    truth = generated(llama_pair.target.model, ids, 30)
    stopping = tiny.tiny_pair(llama_pair.target.model, llama_pair.draft)
    object.__setattr__(stopping, "stop_token_ids", (truth[4],))
    expected = truth[: truth.index(truth[4]) + 1]
    assert run(stopping, ids, SamplingParams(max_new_tokens=30))[0] == expected
    assert run(stopping, ids, SamplingParams(max_new_tokens=30, stop_token_ids=()))[0] == truth


def test_stop_string_ends_with_the_token_that_completes_it(llama_pair):
    ids = prompt(15)
    truth = generated(llama_pair.target.model, ids, 40)
    tokenizer = llama_pair.tokenizer
    text_of = tokenizer.decode
    stop = text_of(truth[:22])[-3:]
    expected = next(n for n in range(1, 41) if stop in text_of(truth[:n]))
    for options in ({}, {"drafting": False}):
        params = SamplingParams(max_new_tokens=40, stop_token_ids=(), stop_strings=("not in the text", stop))
        reply, events = run(llama_pair, ids, params, **options)
        assert reply == truth[:expected] and events[-1].reason == "stop"


def test_full_context_ends_the_reply_cleanly():
    model = tiny.tiny_llama(max_position_embeddings=48)
    pair = tiny.tiny_pair(model, tiny.tiny_draft(model.config, block_size=8))
    ids = prompt(17, length=40)
    reply, events = run(pair, ids, SamplingParams(max_new_tokens=100, stop_token_ids=()))
    assert len(reply) == 8 and events[-1].reason == "context"
    assert reply == run(pair, ids, SamplingParams(max_new_tokens=8, stop_token_ids=()), drafting=False)[0]
    with pytest.raises(DFlashError, match="48 tokens, the context holds 48"):
        run(pair, prompt(17, length=48), SamplingParams())


@pytest.mark.parametrize("block_size", [2, 3, 5, 8])
def test_draft_length_is_adjustable_per_run(llama_pair, block_size):
    ids = prompt(19)
    expected = generated(llama_pair.target.model, ids, 30)
    reply, events = run(llama_pair, ids, SamplingParams(max_new_tokens=30, stop_token_ids=(), block_size=block_size))
    assert reply == expected
    lengths = [len(e.drafted) for e in events[1:-1]]
    assert max(lengths) == lengths[0] == block_size - 1


def test_larger_block_than_trained_is_refused(llama_pair):
    with pytest.raises(DFlashError, match="It is 9, the draft was trained for 8"):
        run(llama_pair, prompt(1), SamplingParams(block_size=9))


def test_bad_prompts_are_refused_before_any_work(llama_pair):
    for ids, found in (([], "no tokens"), ([5, 128], "Found id 128"), ([5, -1], "Found id -1")):
        with pytest.raises(DFlashError, match=found):
            run(llama_pair, ids, SamplingParams())


def test_drafting_without_a_draft_is_refused():
    pair = tiny.tiny_pair(tiny.tiny_llama())
    with pytest.raises(DFlashError, match="loaded without a draft"):
        run(pair, prompt(1), SamplingParams())
    assert len(run(pair, prompt(1), SamplingParams(max_new_tokens=3), drafting=False)[0]) == 3


def test_broken_weights_stop_the_run_with_a_sentence():
    model = tiny.tiny_llama()
    pair = tiny.tiny_pair(model, tiny.tiny_draft(model.config, block_size=8))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(DFlashError, match="not a number.*the prompt"):
        run(pair, prompt(1), SamplingParams())


def test_out_of_memory_names_the_options_that_help(llama_pair):
    class Hungry(OracleDrafter):
        def propose(self, anchor, k):
            raise torch.OutOfMemoryError("no more")

    drafter = Hungry([0], 128, 7, right_of=lambda step: 0)
    with pytest.raises(DFlashError, match="block size.*quantize"):
        run(llama_pair, prompt(1), SamplingParams(), drafter=drafter)


def test_leaving_early_then_asking_again_gives_the_same_reply(pair):
    ids = prompt(21)
    params = SamplingParams(max_new_tokens=40, stop_token_ids=())
    expected, _ = run(pair, ids, params)
    for after in (1, 2, 5):
        events = decode(pair, ids, params)
        for _ in range(after):
            next(events)
        events.close()
        assert run(pair, ids, params)[0] == expected


def test_two_interleaved_runs_do_not_disturb_each_other(pair):
    params = SamplingParams(max_new_tokens=30, stop_token_ids=())
    sampled = SamplingParams(max_new_tokens=30, stop_token_ids=(), temperature=0.9, seed=4)
    alone = [run(pair, prompt(23), params)[0], run(pair, prompt(24), sampled)[0]]
    runs = [decode(pair, prompt(23), params), decode(pair, prompt(24), sampled)]
    events: list[list] = [[], []]
    turn = 0
    while any(not (e and isinstance(e[-1], Finish)) for e in events):
        which = turn % 2 if not (events[turn % 2] and isinstance(events[turn % 2][-1], Finish)) else (turn + 1) % 2
        events[which].append(next(runs[which]))
        turn += 1
    assert [reply_of(e) for e in events] == alone


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 5}, {"top_p": 0.9, "top_k": 20}])
def test_same_seed_gives_the_same_sampled_reply_with_and_without_drafting(llama_pair, settings):
    """Picks depend on seed, position and prefix only, so drafting changes nothing even at temperature 0.8."""
    ids = prompt(25)
    params = SamplingParams(max_new_tokens=60, stop_token_ids=(), temperature=0.8, seed=11, **settings)
    plain, _ = run(llama_pair, ids, params, drafting=False)
    assert run(llama_pair, ids, params)[0] == plain
    oracle = OracleDrafter(plain, 128, 7, right_of=lambda step: step % 8, taps=taps_of(llama_pair))
    reply, events = run(llama_pair, ids, params, drafter=oracle)
    assert reply == plain
    assert max(step.accepted for step in events[1:-1]) == 7
    other = SamplingParams(max_new_tokens=60, stop_token_ids=(), temperature=0.8, seed=12, **settings)
    assert run(llama_pair, ids, other)[0] != plain


def test_processors_see_every_slots_own_context(llama_pair):
    """A processor that forbids the last two tokens bites per slot, so both modes agree and no bigram repeats."""
    seen = []

    def no_repeat(tokens, logits):
        seen.append(len(tokens))
        logits = logits.clone()
        logits[list(tokens[-2:])] = float("-inf")
        return logits

    ids = prompt(27)
    params = SamplingParams(max_new_tokens=40, stop_token_ids=(), processors=(no_repeat,))
    plain, _ = run(llama_pair, ids, params, drafting=False)
    assert seen == list(range(len(ids), len(ids) + 40))
    assert all(a != b for a, b in zip(plain, plain[1:], strict=False))
    oracle = OracleDrafter(plain, 128, 7, right_of=lambda step: step % 8, taps=taps_of(llama_pair))
    assert run(llama_pair, ids, params, drafter=oracle)[0] == plain


def test_a_slow_reader_is_not_charged_for(llama_pair):
    import time

    params = SamplingParams(max_new_tokens=4, stop_token_ids=())
    events = []
    for event in decode(llama_pair, prompt(29), params):
        time.sleep(0.1)
        events.append(event)
    assert events[-1].seconds < 0.1


def eval_prompts(count: int) -> list[dict]:
    """Real prompts: half maths, half code when the evaluation file is there, else this project's own."""
    shared = Path(__file__).parents[2] / "shared" / "data" / "eval_prompts.jsonl"
    file = shared if shared.exists() else Path(__file__).parents[1] / "assets" / "prompts.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [rows[i * len(rows) // count] for i in range(count)]
