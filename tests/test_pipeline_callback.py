"""The pipeline's callback: what it sees after each step, and how the reply goes on from what it changed."""

import pytest
import torch

from dflash_core import DFlashError, DFlashPipeline, Step
from tests.pipes import PROMPT, baseline, ids_of, make_parrot, make_pipe
from tests.tiny import VOCAB_SIZE, tiny_draft, tiny_qwen3_5, tiny_tokenizer

ALL_TENSORS = ["block_output_ids", "draft_logits", "accepted_length", "next_token", "output_ids"]


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def parrot():
    return make_parrot()


def test_the_callback_sees_each_tensor_under_its_own_name(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, timestep, {name: tensor.clone() for name, tensor in tensors.items()}))
        return tensors

    output = pipe(
        input_ids=PROMPT,
        max_new_tokens=24,
        stop_token_ids=[],
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=ALL_TENSORS,
    )
    assert output.sequences[0].tolist() == baseline(pipe, max_new_tokens=24)  # returning what came changes nothing
    steps = [event for event in output.events[0] if isinstance(event, Step)]
    assert [step for step, _, _ in seen] == list(range(len(steps))) and {t for _, t, _ in seen} == {0}
    reply = [output.events[0][0].first_token]
    for event, (_, _, tensors) in zip(steps, seen, strict=True):
        reply += event.committed
        assert list(tensors) == ALL_TENSORS
        assert tensors["block_output_ids"].tolist() == [[event.anchor, *event.drafted]]
        assert tensors["accepted_length"].tolist() == [event.accepted]
        assert tensors["next_token"].tolist() == [event.correction]
        assert tensors["output_ids"].tolist() == [[*PROMPT, *reply]]
        assert tensors["draft_logits"].shape == (1, len(event.drafted), VOCAB_SIZE)
        assert tuple(tensors["draft_logits"][0].argmax(-1).tolist()) == event.drafted


def changing(pipe, at: int, change, **options) -> list[int]:
    """The reply when `change(tensors)` is returned after step `at`."""

    def callback(pipe, step, timestep, tensors):
        return change(tensors) if step == at else None

    return ids_of(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=ALL_TENSORS, **options)


def continued(pipe, start: list[int], length: int = 24) -> list[int]:
    """What the target says after the prompt and `start`."""
    return start + baseline(pipe, [*PROMPT, *start], max_new_tokens=length - len(start))


def test_a_changed_next_token_is_what_the_reply_goes_on_from(pipe):
    plain = baseline(pipe, max_new_tokens=24)
    found = changing(pipe, 2, lambda tensors: {"next_token": (tensors["next_token"] + 1) % VOCAB_SIZE})
    cut = next(i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b)
    assert found[cut] == (plain[cut] + 1) % VOCAB_SIZE
    assert found == continued(pipe, found[: cut + 1])


@pytest.mark.parametrize("place", [0, 1, 3, -2, -1])
def test_changed_output_ids_are_the_text_to_go_on_from(pipe, place):
    start = []

    def change(tensors):
        ids = tensors["output_ids"]
        ids[0, len(PROMPT) + place if place >= 0 else place] = 60
        start.extend(ids[0, len(PROMPT) :].tolist())
        return tensors

    found = changing(pipe, 4, change)
    assert 60 in start and found == continued(pipe, start)


@pytest.mark.parametrize("start", [[60], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69]])
def test_a_shorter_or_longer_reply_is_gone_on_from(pipe, start):
    found = changing(pipe, 3, lambda tensors: {"output_ids": torch.tensor([[*PROMPT, *start]])})
    assert found == continued(pipe, start)


def test_a_reply_on_a_hybrid_target_is_gone_on_from():
    model = tiny_qwen3_5()
    pipe = DFlashPipeline(tiny_draft(model.config), model, tiny_tokenizer())
    found = changing(pipe, 3, lambda tensors: {"output_ids": torch.tensor([[*PROMPT, 60, 61, 62]])})
    assert found == continued(pipe, [60, 61, 62])


def test_fewer_accepted_tokens_are_kept_when_the_callback_says_so(parrot):
    found = changing(parrot, 1, lambda tensors: {"accepted_length": torch.tensor([1]), "next_token": torch.tensor([9])})
    assert found == [0] * 6 + [9] + [0] * 17


def test_a_stop_token_can_be_taken_back(pipe):
    plain = baseline(pipe, max_new_tokens=24)
    place = next(i for i in range(4, 24) if plain[i] not in plain[:i])
    other = next(token for token in range(VOCAB_SIZE) if token not in plain)

    def change(tensors):
        assert tensors["output_ids"][0, -1] == plain[place]  # the step that ended the reply
        return {"output_ids": torch.cat((tensors["output_ids"][:, :-1], torch.tensor([[other]])), dim=1)}

    step = next(
        event.index
        for event in pipe(input_ids=PROMPT, stop_token_ids=[plain[place]], max_new_tokens=24).events[0]
        if isinstance(event, Step) and plain[place] in event.committed
    )
    found = changing(pipe, step, change, stop_token_ids=[plain[place]])
    expected = baseline(
        pipe, [*PROMPT, *plain[:place], other], max_new_tokens=23 - place, stop_token_ids=(plain[place],)
    )
    assert found == [*plain[:place], other, *expected]


@pytest.mark.parametrize(
    "returned, message",
    [
        ({"latents": torch.zeros(1)}, "Found 'latents'"),
        (7, "Found 7"),
        ({"next_token": 5}, "'next_token' is 5"),
        ({"next_token": torch.tensor([0.5])}, "'next_token' is tensor"),
        ({"next_token": torch.tensor([VOCAB_SIZE])}, f"It has id {VOCAB_SIZE}"),
        ({"output_ids": torch.tensor([PROMPT])}, "It has no tokens"),
        ({"output_ids": torch.tensor([[1, *PROMPT]])}, "changed the prompt"),
    ],
)
def test_what_a_callback_cannot_return_is_named(pipe, returned, message):
    with pytest.raises(DFlashError, match=message):
        changing(pipe, 1, lambda tensors: returned)
    assert ids_of(pipe) == baseline(pipe, max_new_tokens=24)  # a broken run leaves nothing behind


def test_draft_logits_cost_nothing_unless_asked_for(pipe, monkeypatch):
    from dflash_core import step_callback

    monkeypatch.setattr(step_callback.WatchedDrafter, "__init__", lambda *_: pytest.fail("nobody asked"))
    assert ids_of(pipe, callback_on_step_end=lambda *_: None) == baseline(pipe, max_new_tokens=24)
