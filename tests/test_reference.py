"""transformers' own ways of decoding, told in this package's events: same reply, every token once, honest times."""

import pytest

from dflash_core import DFlashError, Finish, Prefill, SamplingParams, Step, transformers_decode
from dflash_core.bench_methods import Run
from dflash_core.reference import METHODS, _steps
from tests.scripted import reply_of, run
from tests.tiny import tiny_draft, tiny_llama, tiny_pair

PROMPT = [5, 9, 17, 33, 40, 5, 9, 17]


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    return tiny_pair(model, tiny_draft(model.config))


@pytest.mark.parametrize("method", METHODS)
def test_the_reply_and_its_events_agree_with_the_loop(pair, method):
    params = SamplingParams(max_new_tokens=24, stop_token_ids=())
    expected, _ = run(pair, PROMPT, params, drafting=False)
    events = list(transformers_decode(pair, PROMPT, params, method=method))
    assert reply_of(events) == expected
    assert isinstance(events[0], Prefill) and events[0].prompt_tokens == len(PROMPT)
    steps, finish = events[1:-1], events[-1]
    assert finish == Finish("length", 24, len(steps), finish.seconds)
    assert [step.index for step in steps] == list(range(len(steps)))
    position = 1
    for step in steps:
        assert isinstance(step, Step) and step.position == position and step.anchor == expected[position - 1]
        assert step.committed == (*step.drafted, step.correction) and step.accepted == len(step.drafted)
        assert step.verify_seconds >= 0 and step.draft_seconds == 0
        position += len(step.committed)
    assert events[0].seconds + sum(step.verify_seconds for step in steps) <= finish.seconds
    if method == "hf-generate":
        assert all(len(step.committed) == 1 for step in steps)


def test_a_stop_token_ends_the_reply(pair):
    greedy = SamplingParams(max_new_tokens=24, stop_token_ids=())
    expected, _ = run(pair, PROMPT, greedy, drafting=False)
    stop = expected[5]
    events = list(transformers_decode(pair, PROMPT, SamplingParams(max_new_tokens=24, stop_token_ids=(stop,))))
    assert reply_of(events) == expected[: expected.index(stop) + 1] and events[-1].reason == "stop"


def test_guesses_checked_with_the_prompt_become_a_step_without_time():
    made = Run((7, 8, 9, 10, 11), 1.0, 0.4, (3, 1, 2), times=(0.4, 0.6, 0.9))
    steps = list(_steps(made))
    assert [step.committed for step in steps] == [(8, 9), (10,), (11,)]
    assert [step.verify_seconds for step in steps] == pytest.approx([0.0, 0.2, 0.3])


def test_settings_of_another_loop_are_refused(pair):
    for params, method in (
        (SamplingParams(acceptance="rejection", temperature=1.0), "hf-dflash"),
        (SamplingParams(stop_strings=("x",)), "prompt-lookup"),
        (SamplingParams(), "magic"),
    ):
        with pytest.raises(DFlashError):
            next(transformers_decode(pair, PROMPT, params, method=method))
