"""Turns, queue, engine, desk, limits, settings, conversations and summaries, without a browser."""

import gc
import json
import threading
import time
import weakref

import gradio as gr
import pytest

from app.answering import Answers, Request, Screen
from app.conversations import (
    GUARD, ConversationError, answered, asked, bubbles, checked, cut, guard, new, prompt_messages, read_import, unguard,
)  # fmt: skip
from app.chat_state import choices, edited, footers, to_retry, undone
from app.desk import BusyError, Desk
from app.engine import Choice, Engine, EngineError
from app.limits import LimitError, Limits, RunRate, public
from app.replies import frames
from app.settings import CUSTOM, PRESETS, Settings, preset_of
from app.stats import RunStats
from app.summary import footer, summary
from app.trace import parse
from app.turn import Run, TurnError, prompt_ids
from app.turnstile import Turnstile
from dflash_core import DFlashError
from tests.stage import Stage, scripted_step

HELLO = [{"role": "user", "content": "say hello there, how is the weather"}]
LONG = [{"role": "user", "content": "tell me all"}]


@pytest.fixture
def stage():
    return Stage(steps_per_second=400)


def ready(stage, **options) -> Engine:
    engine = Engine(load=stage.load, decode=stage.decode, **options)
    engine.load(Choice())
    assert engine.wait(10) and engine.status.phase == "ready"
    return engine


def start(stage, messages=HELLO, *, turnstile=None, owner="me", paced=False, settings=Settings()) -> Run:
    pair = stage.load("stage", progress=lambda *_: None)
    return Run(
        pair, messages, settings, turnstile=turnstile or Turnstile(), owner=owner, paced=paced, decode=stage.decode
    ).start()


def wait_until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# ---- one run


def test_a_run_records_every_event_and_the_text(stage):
    run = start(stage)
    assert run.wait(5)
    trace = parse(run.ndjson)
    assert list(trace.events)[:-1] == stage.events[:-1] and trace.events[-1].reason == stage.events[-1].reason
    assert run.text == trace.text == "hello there, how is the weather"
    assert run.ended == "stop" and trace.complete
    assert trace.header["messages"] == HELLO and trace.header["settings"]["temperature"] == 0.0


def test_frames_end_with_everything_and_grow_from_each_other(stage):
    stage.steps_per_second = 100
    run = start(stage, LONG)
    seen = list(frames(run))
    traces = [frame.trace for frame in seen]
    assert len(traces) > 3 and all(one != other for one, other in zip(seen, seen[1:]))
    assert all(later.startswith(earlier) for earlier, later in zip(traces, traces[1:]))
    assert run.text == stage.reply and run.text.startswith(seen[-1].text)
    assert len(parse(seen[-1].trace).events) == len(stage.events)


def test_a_stopped_run_keeps_what_it_has_and_frees_the_decode(stage):
    stage.steps_per_second = 50
    run = start(stage, LONG)
    wait_until(lambda: run.stats.steps > 3)
    run.close()
    assert run.wait(0) and stage.live == 0
    assert run.ended == "stopped" and stage.reply.startswith(run.text) and run.text
    assert not parse(run.ndjson).complete


def test_closing_the_frames_stops_the_run(stage):
    stage.steps_per_second = 50
    run = start(stage, LONG)
    shown = frames(run)
    next(shown)
    shown.close()
    assert run.wait(1) and stage.live == 0


def test_a_run_that_breaks_says_so_and_keeps_its_text(stage):
    stage.step_error = (3, DFlashError("It broke.", "At step 3.", "Try again."))
    run = start(stage, LONG)
    assert run.wait(5)
    assert run.error is stage.step_error[1] and run.ended == "failed"
    assert run.stats.steps == 3 and run.text


def test_a_bug_in_the_decode_becomes_a_readable_error(stage):
    stage.step_error = (1, ZeroDivisionError("division by zero"))
    run = start(stage, LONG)
    assert run.wait(5)
    assert isinstance(run.error, DFlashError) and "division by zero" in str(run.error)


def test_a_paced_run_waits_for_each_click(stage):
    run = start(stage, LONG, paced=True)
    wait_until(lambda: run.phase == "paused")
    for steps in range(1, 4):
        events = len(stage.events)
        time.sleep(0.06)
        assert len(stage.events) == events, "it went on by itself"
        run.next_step()
        wait_until(lambda: run.stats.steps == steps and run.phase == "paused")
    run.pace(False)
    assert run.wait(5) and run.ended == "stop"


def test_a_paused_run_lets_others_decode(stage):
    turnstile = Turnstile()
    paused = start(stage, LONG, turnstile=turnstile, owner="slow", paced=True)
    wait_until(lambda: paused.phase == "paused")
    other = start(stage, turnstile=turnstile, owner="other")
    assert other.wait(5) and other.ended == "stop"
    paused.close()
    assert paused.wait(0)


def test_a_stopped_paused_run_ends(stage):
    run = start(stage, LONG, paced=True)
    wait_until(lambda: run.phase == "paused")
    run.close()
    assert run.wait(0) and run.ended == "stopped"


def test_the_chat_template_writes_the_prompt(stage):
    pair = stage.load("stage", progress=lambda *_: None)
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    text = stage.tokenizer.decode(prompt_ids(pair, messages))
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n" + HELLO[0]["content"] + "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template, word", [(None, "no chat template"), ("{{ raise_exception('no system') }}", "no system")])
def test_a_template_that_refuses_is_a_readable_error(stage, template, word):
    pair = stage.load("stage", progress=lambda *_: None)
    pair.tokenizer.chat_template = template
    with pytest.raises(TurnError, match=word):
        prompt_ids(pair, HELLO)


# ---- whose turn


def test_one_run_decodes_at_a_time(stage):
    turnstile = Turnstile()
    runs = [start(stage, turnstile=turnstile, owner=f"o{i}") for i in range(4)]
    assert all(run.wait(5) for run in runs)
    assert stage.most_live == 1


def test_two_people_alternate_whatever_one_of_them_queues():
    turnstile = Turnstile()
    served = []
    tickets = [turnstile.join(owner) for owner in ("greedy", "greedy", "greedy", "modest", "modest")]
    while tickets:
        ticket = next(t for t in tickets if turnstile.wait(t, 0))
        served.append(ticket.owner)
        tickets.remove(ticket)
        turnstile.leave(ticket)
    assert served == ["greedy", "modest", "greedy", "modest", "greedy"]


def test_the_queue_tells_how_many_are_ahead():
    turnstile = Turnstile()
    first, second, third = (turnstile.join(owner) for owner in "abc")
    assert turnstile.wait(first, 0) and not turnstile.wait(second, 0)
    assert [turnstile.ahead(t) for t in (first, second, third)] == [0, 1, 2]
    turnstile.leave(second)
    assert turnstile.ahead(third) == 1
    turnstile.leave(first)
    turnstile.leave(first)
    assert turnstile.wait(third, 0)


# ---- the engine


def test_the_engine_loads_warms_up_and_measures_plain_decoding(stage):
    engine = ready(stage)
    status = engine.status
    assert (status.pair_name, status.block_size, status.device) == ("smollm2-135m", stage.block_size, "cpu")
    assert status.baseline_seconds == pytest.approx(0.009)


def test_a_pair_in_use_is_not_switched(stage):
    engine = ready(stage)
    engine.borrow()
    with pytest.raises(EngineError, match="in use"):
        engine.load(Choice("other"))
    engine.give_back()
    engine.load(Choice("other"))
    assert engine.wait(10) and engine.status.pair_name == "other"


def test_two_loads_at_once_are_refused(stage):
    stage.load_seconds = 0.3
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    with pytest.raises(EngineError, match="already being loaded"):
        engine.load(Choice("other"))
    assert engine.status.stage == "Reading weights" or engine.status.stage == "starting"
    assert engine.wait(10)


def test_the_old_pair_is_freed_before_the_new_one_is_read(stage):
    class Watched:
        """Anything that can be watched weakly."""

    alive = []

    def load(name, **options):
        alive.append(old is not None and old() is not None)
        pair = stage.load(name, **options)
        pair.target = Watched()
        return pair

    old = None
    engine = Engine(load=load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(10)
    run = Desk(engine).open("s", "v", HELLO, Settings())
    assert run.wait(5)
    old = weakref.ref(engine.borrow().target)
    engine.give_back()
    engine.load(Choice("other"))
    assert engine.wait(10)
    gc.collect()
    assert alive == [False, False] and old() is None


def test_a_failed_switch_returns_to_the_pair_before(stage):
    engine = ready(stage)
    stage.load_error = DFlashError("It cannot be loaded.", "The file is short.", "Download it again.")
    stage.loadable = {"smollm2-135m"}
    engine.load(Choice("broken"))
    assert engine.wait(10)
    assert engine.status.phase == "ready" and engine.status.pair_name == "smollm2-135m"
    assert "file is short" in str(engine.status.error)
    assert engine.borrow().name == "smollm2-135m"


def test_a_failed_first_load_is_told_to_whoever_asks(stage):
    stage.load_error = DFlashError("The draft is not installed.", "", "Install it.")
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(10) and engine.status.phase == "failed"
    with pytest.raises(DFlashError, match="not installed"):
        engine.borrow()


# ---- an answer on the screen


@pytest.fixture(scope="module")
def screen():
    with gr.Blocks():
        parts = [gr.Textbox(), gr.Chatbot(), gr.JSON(), *(gr.HTML() for _ in range(4)), gr.Textbox()]
        return Screen(*parts, (gr.Button(),))


def request(text, before=None):
    before = before or new()
    return Request(asked(before, text), before, text, Settings(), "tab", "v")


def test_a_reply_streams_values_of_three_outputs_only(stage, screen):
    """Gradio builds an output anew whenever it is left out or updated, in the process that decodes."""
    stage.steps_per_second = 60
    answers = Answers(Desk(ready(stage)), screen)
    opening = answers.ask(request("tell me all"))
    assert set(opening) == set(screen.outputs) and answers.is_busy("tab")
    streamed = list(answers.stream("tab"))
    assert len(streamed) > 3
    for updates in streamed:
        assert set(updates) == {screen.xray, screen.chatbot, screen.note} == set(screen.streamed)
        assert isinstance(updates[screen.xray], str) and isinstance(updates[screen.chatbot], list)
        assert "__type__" not in updates[screen.note]
    assert parse(streamed[-1][screen.xray]).text == stage.reply
    closing = answers.close("tab")
    reply = closing[screen.conversation]["messages"][-1]
    assert (reply["role"], reply["content"]) == ("assistant", stage.reply) and closing[screen.selected] == reply["id"]
    assert not answers.is_busy("tab")
    # Nothing was asked: nothing changes.
    assert all(set(updates) == {screen.note} for updates in (*answers.stream("tab"), answers.close("tab")))


def test_a_reply_stopped_before_it_begins_gives_the_question_back(stage, screen, monkeypatch):
    told = []
    monkeypatch.setattr("app.answering.warn", lambda error: told.append(str(error)))
    answers = Answers(Desk(ready(stage)), screen)
    before = new("be brief")
    answers.ask(request("tell me all", before))
    answers.stop("tab")
    assert list(answers.stream("tab")) == [] and stage.live == 0
    closing = answers.close("tab")
    assert "Stopped before the reply began" in told[0]
    assert closing[screen.composer].value == "tell me all" and closing[screen.conversation] == before


def test_a_tab_closed_while_it_reads_frees_the_decode(stage, screen):
    stage.steps_per_second = 20
    answers = Answers(Desk(ready(stage)), screen)
    answers.ask(request("tell me all"))
    shown = answers.stream("tab")
    next(shown)
    shown.close()
    wait_until(lambda: stage.live == 0, 1.0)
    assert not answers.is_busy("tab")


# ---- the desk and its limits


def test_a_tab_has_one_run_and_sees_only_its_own(stage):
    stage.steps_per_second = 50
    desk = Desk(ready(stage))
    mine = desk.open("mine", "v", LONG, Settings())
    with pytest.raises(BusyError):
        desk.open("mine", "v", LONG, Settings())
    theirs = desk.open("theirs", "v", HELLO, Settings())
    assert desk.run("mine") is mine and desk.run("theirs") is theirs and desk.run("nobody") is None
    desk.close("mine")
    assert theirs.wait(5) and theirs.ended == "stop"
    desk.close("theirs")


def test_a_refused_run_leaves_the_engine_idle(stage):
    engine = ready(stage)
    desk = Desk(engine, Limits(prompt_tokens=5))
    with pytest.raises(LimitError, match="tokens"):
        desk.open("s", "v", LONG, Settings())
    engine.load(Choice("other"))
    assert engine.wait(10)


def test_public_limits(stage):
    limits = public(("smollm2-135m",))
    desk = Desk(ready(stage), limits)
    with pytest.raises(LimitError, match="characters"):
        desk.open("s", "v", [{"role": "user", "content": "x" * 9000}], Settings())
    with pytest.raises(LimitError, match="not offer"):
        limits.check_pair("somebody/else")
    run = desk.open("s", "v", HELLO, Settings(max_new_tokens=100_000))
    assert run.recorder.header["settings"]["max_new_tokens"] == limits.max_new_tokens
    desk.close("s")


def test_runs_a_minute_are_counted_per_visitor():
    now = [0.0]
    rate = RunRate(2, clock=lambda: now[0])
    rate.count("a")
    now[0] = 30.0
    rate.count("a")
    rate.count("b")
    with pytest.raises(LimitError, match="30 seconds"):
        rate.count("a")
    now[0] = 60.0
    rate.count("a")


# ---- settings


def test_settings_come_from_widgets_and_go_to_the_core():
    settings = Settings.of({"temperature": 1, "top_k": 5.0, "seed": "", "block_size": None, "noise": 1})
    assert (settings.temperature, settings.top_k, settings.seed, settings.block_size) == (1.0, 5, None, None)
    assert settings.params().top_k == 5
    assert Settings.of({"seed": 7.0}).params().seed == Settings.of({"seed": " 7 "}).seed == 7
    assert Settings.of({"seed": "  "}).seed is None


@pytest.mark.parametrize(
    "raw", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"max_new_tokens": 0}, {"block_size": 1},
            {"acceptance": "always"}, {"seed": -5}, {"seed": "lucky"}, {"temperature": float("nan")}, {"max_new_tokens": float("inf")}],
)  # fmt: skip
def test_settings_out_of_range_are_readable_errors(raw):
    with pytest.raises(DFlashError):
        Settings.of(raw)


def test_presets_are_recognised():
    assert all(preset_of(**values) == name for name, values in PRESETS.items())
    assert preset_of(0.33, 1.0, 0) == CUSTOM


# ---- conversations


def talk(turns=2):
    conversation = new("Be brief.")
    for turn in range(turns):
        conversation = answered(asked(conversation, f"question {turn}"), f"id{turn}", f"answer {turn}", {"tau": 2.0})
    return conversation


def test_prompts_hold_the_plain_text_only():
    conversation = asked(talk(1), "<b>next</b>")
    assert prompt_messages(conversation) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 0"},
        {"role": "assistant", "content": "answer 0"}, {"role": "user", "content": "<b>next</b>"},
    ]  # fmt: skip


def test_retry_undo_edit():
    conversation = talk()
    assert [m["content"] for m in to_retry(conversation)["messages"]] == ["question 0", "answer 0", "question 1"]
    shorter, text = undone(conversation)
    assert text == "question 1" and len(shorter["messages"]) == 2
    assert [m["content"] for m in edited(conversation, 0, "anew")["messages"]] == ["anew"]
    assert to_retry(new()) is None and undone(new())[1] == ""
    assert cut(conversation, 0)["title"] == conversation["title"] == "question 0"


NASTY = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a < b and a<b", "</div><!-- -->", "![pic](http://x/y.png)",
    "```mermaid\ngraph TD\n```", "~~~ mermaid\nx\n~~~", "[link](javascript:alert(1))", "שלום <b>עולם</b>", "👩‍👩‍👧 <i>", "\0<b>\0",
    "w" * 10_000, "$$x<y$$", "<?php ?>", "<<b>>", "!![a](b)",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:24])
def test_guarded_text_opens_no_markup_and_comes_back_whole(text):
    shown = guard(text)
    assert unguard(shown) == text
    assert not any(opener in shown for opener in ("<s", "<i", "<b", "</", "<!", "<?", "![", "```mermaid", "~~~ mermaid"))
    assert shown.replace(GUARD, "") == text


def test_bubbles_are_text_parts():
    assert bubbles(asked(new(), "hi"), writing="<b>") == [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"<{GUARD}b>"}]},
    ]


def test_export_and_import_round_trip():
    conversation = talk()
    text = json.dumps({"format": "dflash-chat", "version": 1, "conversation": conversation, "traces": {"id0": "T0", "gone": "X"}})
    read, traces = read_import(text)
    assert read["id"] != conversation["id"] and read["title"] == conversation["title"] and read["system"] == "Be brief."
    assert [(m["role"], m["content"]) for m in read["messages"]] == [(m["role"], m["content"]) for m in conversation["messages"]]
    assert traces == {read["messages"][1]["id"]: "T0"}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"format": "other"}, "format"), ({"version": 2}, "newer"), ({"version": "1"}, "newer"), ({"conversation": []}, "messages"),
        ({"conversation": {"messages": [{"role": "assistant", "content": "x"}]}}, "Message 1"),
        ({"conversation": {"messages": [{"role": "user", "content": 3}]}}, "Message 1"),
        ({"conversation": {"messages": [], "title": 5}}, "title"), ({"traces": {"a": 1}}, "traces"),
    ],
)  # fmt: skip
def test_files_that_are_no_chats_are_refused(change, word):
    good = {"format": "dflash-chat", "version": 1, "conversation": talk()}
    with pytest.raises(ConversationError, match=word):
        read_import(json.dumps(good | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1"])
def test_other_files_are_refused(text):
    with pytest.raises(ConversationError):
        read_import(text)


def test_a_chat_from_the_browser_keeps_known_fields_only():
    conversation = checked(talk() | {"evil": 1})
    assert set(conversation) == set(new())


def test_the_list_shows_an_unsaved_chat_first():
    conversation = talk()
    line = {"id": "old", "title": "Old", "updated": ""}
    assert choices([line], conversation) == [("question 0", conversation["id"]), ("Old", "old")]
    assert choices([line, {"id": conversation["id"], "title": "T"}], conversation) == [("Old", "old"), ("T", conversation["id"])]


# ---- summaries


def folded(steps=12, k=7, accepted=None):
    from app.stats import add
    from dflash_core import Prefill

    stats = add(RunStats(), Prefill(10, 1, 0.5))
    for index in range(steps):
        step = scripted_step(list(range(200)), 1, k, index if accepted is None else 2)
        stats = add(stats, step)
    return stats


def test_a_footer_has_the_numbers_of_its_run():
    numbers = summary(folded(), pair="p", drafting=True, ended="length", baseline_seconds=0.009)
    text = footer(numbers)["text"]
    for part in ("tok/s", "first token 0.50 s", "τ 4.", "/84 drafted tokens accepted", "length limit reached"):
        assert part in text
    assert footer(numbers)["warning"] == ""
    json.dumps(numbers)


def test_drafting_that_does_not_pay_is_said_with_a_remedy():
    losing = summary(folded(accepted=0), pair="p", drafting=True, ended="stop", baseline_seconds=0.009)
    assert losing["speedup"] == pytest.approx(0.69, abs=0.01)
    warning = footer(losing)["warning"]
    assert "0.69×" in warning and "drafting off" in warning and "smaller block" in warning


def test_too_few_passes_judge_no_draft():
    few = summary(folded(steps=4, accepted=0), pair="p", drafting=True, ended="stop", baseline_seconds=0.009)
    assert footer(few)["warning"] == ""


def test_plain_decoding_says_so_and_has_no_tau():
    text = footer(summary(folded(k=0), pair="p", drafting=False, ended="stop", baseline_seconds=0.009))["text"]
    assert "plain decoding" in text and "τ" not in text


@pytest.mark.parametrize("raw", [None, {}, {"tau": "x", "accepted": [], "drafted": True, "speedup": "fast"}])
def test_a_footer_tolerates_an_imported_summary(raw):
    assert footer(raw)["warning"] == ""


def test_footers_name_the_selected_reply():
    shown = footers(talk(), "id1", writing=True)
    assert [item["id"] for item in shown["items"]] == ["id0", "id1", ""] and shown["selected"] == "id1"


def test_threads_end_with_their_runs(stage):
    before = threading.active_count()
    for _ in range(5):
        start(stage).wait(5)
    wait_until(lambda: threading.active_count() <= before)
