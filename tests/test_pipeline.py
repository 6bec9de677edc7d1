"""The pipeline is a shell over the one loop: its inputs, its callback, its files, and the failures it must not have."""

import pytest
import torch

from dflash_core import DFlashError, DFlashPipeline, DFlashTokenDiffusionScheduler, Finish, SamplingParams, Step, decode
from tests.pipes import PROMPT, baseline, ids_of, make_parrot, make_pipe
from tests.scripted import reply_of
from tests.tiny import STOP_TOKEN_ID, VOCAB_SIZE, tiny_draft, tiny_llama


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def parrot():
    return make_parrot()


# Failures of earlier implementations.


def test_low_acceptance_does_not_cut_the_reply_short(pipe):
    output = pipe(input_ids=PROMPT, max_new_tokens=40, stop_token_ids=[])
    steps = [event for event in output.events[0] if isinstance(event, Step)]
    assert sum(step.accepted for step in steps) < len(steps)  # the draft is bad indeed
    assert output.sequences[0].tolist() == baseline(pipe, max_new_tokens=40) and len(output.sequences[0]) == 40


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7, 9, 16])
def test_full_acceptance_does_not_overshoot_the_length(parrot, limit):
    output = parrot(input_ids=PROMPT, max_new_tokens=limit, stop_token_ids=[])
    assert output.sequences[0].tolist() == [0] * limit
    steps = [event for event in output.events[0] if isinstance(event, Step)]
    assert all(step.accepted == len(step.drafted) for step in steps) and len(steps) == -(-(limit - 1) // 4)


def test_a_real_token_equal_to_the_mask_is_kept(pipe):
    expected = baseline(pipe, max_new_tokens=24)
    for mask in set(expected):
        assert ids_of(pipe, mask_token_id=mask) == expected


def test_mask_slots_are_no_stop_tokens(pipe):
    expected = baseline(pipe, max_new_tokens=24)
    mask = next(token for token in range(VOCAB_SIZE) if token not in expected)
    assert ids_of(pipe, mask_token_id=mask, stop_token_ids=[mask]) == expected


def test_a_stop_token_at_the_very_first_place_ends_the_reply(pipe):
    first = baseline(pipe, max_new_tokens=1)[0]
    output = pipe(input_ids=PROMPT, max_new_tokens=24, stop_token_ids=[first])
    assert output.sequences[0].tolist() == [first]
    assert output.events[0][-1] == Finish("stop", 1, 0, output.events[0][-1].seconds)


def test_a_stop_token_inside_an_accepted_block_ends_the_reply(parrot):
    def swap(pipe, step, timestep, tensors):
        return {"block_output_ids": torch.tensor([[0, 0, 7, 0]])} if step == 1 else None

    output = parrot(
        input_ids=PROMPT,
        max_new_tokens=24,
        stop_token_ids=[7],
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=[],
    )
    assert output.sequences[0].tolist() == [0] * 6 + [7] and output.events[0][-1].reason == "stop"


# Inputs and outputs.


def test_prompt_messages_and_ids_meet_at_the_same_reply(pipe):
    text = "the story of an island"
    ids = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    expected = baseline(pipe, ids, max_new_tokens=10, stop_token_ids=None)
    ways = {
        "prompt": text,
        "messages": [{"role": "user", "content": text}],
        "input_ids": torch.tensor(ids),
    }
    for name, value in ways.items():
        output = pipe(**{name: value}, max_new_tokens=10)
        assert output.sequences[0].tolist() == expected, name
        assert output.texts == [pipe.tokenizer.decode(expected, skip_special_tokens=True)]


def test_lists_are_decoded_one_after_the_other(pipe):
    alone = [pipe(prompt=text, max_new_tokens=6).texts[0] for text in ("one", "another one")]
    assert pipe(prompt=["one", "another one"], max_new_tokens=6).texts == alone
    chats = [[{"role": "user", "content": text}] for text in ("one", "another one")]
    assert pipe(messages=chats, max_new_tokens=6).texts == alone
    both = pipe(input_ids=torch.tensor([[5, 6], [7, 8]]), max_new_tokens=6, stop_token_ids=[], output_type="seq")
    assert [s.tolist() for s in both.sequences] == [baseline(pipe, ids, max_new_tokens=6) for ids in ([5, 6], [7, 8])]
    assert pipe(prompt=[]).sequences == []


def test_the_template_is_optional_and_takes_arguments(pipe):
    text = "once"
    plain = pipe(prompt=text, use_chat_template=False, max_new_tokens=6, stop_token_ids=[])
    assert plain.sequences[0].tolist() == baseline(pipe, pipe.tokenizer(text).input_ids, max_new_tokens=6)
    ids = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=False, return_dict=False
    )
    closed = pipe(prompt=text, add_generation_prompt=False, max_new_tokens=6, stop_token_ids=[])
    assert closed.sequences[0].tolist() == baseline(pipe, ids, max_new_tokens=6)
    template = "{{ opening }}{{ messages[0]['content'] }}"
    words = pipe(
        prompt=text,
        chat_template_kwargs={"chat_template": template, "opening": "so "},
        max_new_tokens=6,
        stop_token_ids=[],
    )
    assert words.sequences[0].tolist() == baseline(pipe, pipe.tokenizer("so once").input_ids, max_new_tokens=6)


def test_output_types_and_the_tuple(pipe):
    sequences, texts = pipe(input_ids=PROMPT, max_new_tokens=4, stop_token_ids=[], return_dict=False)
    assert texts == [pipe.tokenizer.decode(sequences[0], skip_special_tokens=True)]
    assert pipe(input_ids=PROMPT, max_new_tokens=4, output_type="seq").texts is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "given none"),
        ({"prompt": "a", "input_ids": [1]}, "given prompt and input_ids"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "given prompt and messages"),
        ({"input_ids": []}, "The prompt is empty"),
        ({"input_ids": torch.zeros(1, 1, 1, dtype=torch.long)}, "wrong shape"),
        ({"input_ids": torch.zeros(3)}, "wrong shape"),
        ({"input_ids": [VOCAB_SIZE]}, "does not know"),
        ({"input_ids": [1] * 600}, "too long"),
        ({"prompt": "a", "output_type": "latent"}, "'latent'"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "temperature": -1.0}, "temperature"),
        ({"prompt": "a", "mask_token_id": VOCAB_SIZE}, "mask token"),
        ({"prompt": "a", "block_size": 99}, "block size"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["latents"]}, "'latents'"),
        (
            {"messages": [{"role": "user"}], "chat_template_kwargs": {"chat_template": "{{ raise_exception('no') }}"}},
            "says: no",
        ),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    with pytest.raises(DFlashError, match=message):
        pipe(**options)


def test_without_a_tokenizer_ids_go_in_and_out(pipe):
    bare = DFlashPipeline(pipe.draft_model, pipe.target_model)
    assert bare(input_ids=PROMPT, output_type="seq", max_new_tokens=6).sequences[0].tolist() == baseline(
        pipe, max_new_tokens=6, stop_token_ids=(STOP_TOKEN_ID,)
    )
    with pytest.raises(DFlashError, match="no tokenizer"):
        bare(input_ids=PROMPT)
    with pytest.raises(DFlashError, match="no tokenizer"):
        bare(prompt="a", output_type="seq")


def test_without_a_draft_the_target_decodes_alone(pipe):
    alone = DFlashPipeline(None, pipe.target_model, pipe.tokenizer)
    output = alone(input_ids=PROMPT, max_new_tokens=8, stop_token_ids=[])
    assert output.sequences[0].tolist() == baseline(pipe, max_new_tokens=8)
    assert all(event.drafted == () for event in output.events[0] if isinstance(event, Step))


def test_parts_that_do_not_fit_are_refused(pipe):
    with pytest.raises(DFlashError, match="another target"):
        DFlashPipeline(tiny_draft(tiny_llama(num_hidden_layers=5).config), pipe.target_model)

    class Lenient(DFlashTokenDiffusionScheduler):
        def step(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(DFlashError, match="Lenient has a verdict of its own"):
        DFlashPipeline(pipe.draft_model, pipe.target_model, scheduler=Lenient())


def test_the_schedulers_settings_reach_the_loop(pipe):
    for config in ({"seed": 4, "top_k": 3}, {"seed": 4, "acceptance": "rejection", "top_p": 0.8}):
        sampled = DFlashPipeline(
            pipe.draft_model, pipe.target_model, pipe.tokenizer, DFlashTokenDiffusionScheduler(**config)
        )
        params = SamplingParams(temperature=1.0, max_new_tokens=24, stop_token_ids=(), **config)
        assert ids_of(sampled, temperature=1.0) == reply_of(decode(pipe.pair, PROMPT, params))


def test_the_progress_bar_config_survives_the_call(pipe, capsys):
    config = {"disable": False, "desc": "Reply", "leave": True}
    pipe.set_progress_bar_config(**config)
    try:
        for _ in range(2):
            ids_of(pipe, max_new_tokens=9)
            shown = capsys.readouterr().err
            assert "Reply" in shown and "9/9" in shown
        assert pipe._progress_bar_config == config
    finally:
        pipe.set_progress_bar_config(disable=True)


# Files.


def test_a_saved_pipeline_loads_and_says_the_same(pipe, tmp_path):
    scheduler = DFlashTokenDiffusionScheduler(seed=9, top_k=5)
    saved = DFlashPipeline(pipe.draft_model, pipe.target_model, pipe.tokenizer, scheduler)
    saved.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = DFlashPipeline.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert loaded.scheduler.config == scheduler.config
    for options in ({"temperature": 0.0}, {"temperature": 1.0}):
        assert (
            loaded("the end", max_new_tokens=12, **options).texts
            == saved("the end", max_new_tokens=12, **options).texts
        )
    parts = DFlashPipeline.from_pretrained(
        target=tmp_path / "target_model", draft=tmp_path / "draft_model", dtype="float32"
    )
    assert ids_of(parts) == ids_of(pipe) and parts.scheduler.config == DFlashTokenDiffusionScheduler().config
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DFlashError, match="saved pipeline cannot be read"):
        DFlashPipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_a_draft_is_saved_without_one(pipe, tmp_path):
    DFlashPipeline(None, pipe.target_model, pipe.tokenizer).save_pretrained(tmp_path)
    loaded = DFlashPipeline.from_pretrained(tmp_path, dtype="float32")
    assert loaded.draft_model is None and ids_of(loaded, max_new_tokens=6) == baseline(pipe, max_new_tokens=6)
