"""The tour: its picture is the draft model's own rule, its moments are in the recording, its words fit the numbers."""

import re
import time
from types import SimpleNamespace

import pytest

from app import learn
from app.desk import Desk
from app.engine import Choice, Engine
from app.learn import ATTENTION, RECORDINGS, cards, costs, game_steps, moments, tour
from app.learn_tab import machine, measure_costs
from app.record import main, record
from app.settings import Settings
from app.stats import modelled_speedup
from app.trace import open_trace, parse
from dflash_core import DFlashError, Step
from tests.learn_assets import text
from tests.stage import Stage
from tests.tiny import tiny_draft, tiny_llama, tiny_pair, write_draft, write_target
from tests.xray_script import recorded


@pytest.fixture(scope="module")
def recordings():
    return open_trace(RECORDINGS["plain"]), open_trace(RECORDINGS["dflash"])


def scripted(accepted, k=7, tokens=60):
    return parse(recorded([f" w{i}" for i in range(tokens)], accepted, k).ndjson)


def test_the_attention_picture_is_what_the_masks_say():
    assert ATTENTION.read_text() == text(), "run python -m tests.learn_assets"


def test_the_recordings_are_whole_and_of_one_chat(recordings):
    plain, drafted = recordings
    assert (
        plain.complete and drafted.complete and plain.header["drafting"] is False and drafted.header["drafting"] is True
    )
    assert plain.header["messages"] == drafted.header["messages"] and plain.header["pair"] == drafted.header["pair"]
    assert len(plain.ndjson) + len(drafted.ndjson) < 200_000, "the tour is sent with the page"
    assert drafted.stats.tau > 1 and drafted.stats.accepted > 0


def test_every_card_points_at_what_the_recording_holds(recordings):
    plain, drafted = recordings
    made = cards(plain, drafted)
    assert len({card.key for card in made}) == len(made) >= 11
    for card in made:
        assert card.trace in RECORDINGS and card.title and card.text
        for beat in card.beats:
            assert 0 <= beat.step < drafted.stats.steps and beat.phase in ("mask", "draft", "verdict")
        assert card.beats or card.speed or card.extra == "game", card.key
    assert {card.extra for card in made} == {"", "attention", "whatif", "game", "links"}


def test_the_words_are_finished_sentences_with_balanced_marks(recordings):
    for card in cards(*recordings):
        for paragraph in card.text:
            assert re.search(r"[.:]$|\.\*\*", paragraph), paragraph
            assert paragraph.count("**") % 2 == 0 and "  " not in paragraph and "{" not in paragraph, paragraph
            assert paragraph[0].isupper() or paragraph.startswith("**"), paragraph


def test_the_numbers_in_the_words_are_the_recordings_own(recordings):
    plain, drafted = recordings
    words = {card.key: " ".join(card.text) for card in cards(plain, drafted)}
    assert f"{plain.stats.committed} tokens took {plain.stats.steps} passes" in words["slow"]
    assert f"{drafted.stats.tau:.2f} in this recording" in words["speed"]
    same = learn.reply_ids(plain) == learn.reply_ids(drafted)
    assert ("tokens are the same" in words["exact"]) == same


def test_moments_are_found_by_what_happened():
    trace = scripted((3, 0, 7, 5))
    found = moments(trace)
    steps = [event for event in trace.events if isinstance(event, Step)]
    assert steps[found.some].accepted == 3 and steps[found.all].accepted == 7 and steps[found.fewest].accepted == 0
    never = moments(scripted((1, 2)))
    assert never.all is None
    words = " ".join(next(card for card in cards(scripted((0,), 0), scripted((1, 2))) if card.key == "bonus").text)
    assert "did not happen in this recording" in words and "1 guess was right" in words


def test_the_game_asks_fresh_blocks_of_different_outcomes():
    trace = scripted((3, 0, 7, 5, 1, 2), tokens=160)
    seen, asked = moments(trace), game_steps(trace)
    steps = [event for event in trace.events if isinstance(event, Step)]
    assert len(asked) == learn.GAME_ROUNDS and asked == sorted(set(asked))
    assert not {seen.some, seen.all, seen.fewest} & set(asked)
    assert len({steps[index].accepted for index in asked}) >= 5
    assert all(len(steps[index].drafted) == 7 for index in asked)


def test_costs_are_medians_over_whole_blocks_and_feed_the_model():
    found = costs(scripted((0,), 0), scripted((3, 0, 7, 5)))
    assert (found.plain_seconds, found.draft_seconds, found.verify_seconds) == (0.03, 0.01, 0.03)
    assert found.block_size == 8
    assert modelled_speedup(found.tau, found.plain_seconds, found.draft_seconds, found.verify_seconds) == pytest.approx(
        found.tau * 0.75
    )


def test_the_whole_tour_is_plain_json_with_everything_the_page_needs():
    told = tour()
    assert set(told) == {"cards", "traces", "attention", "costs", "game", "links", "recorded"}
    assert any(link["url"] == "https://arxiv.org/abs/2602.06036" for link in told["links"])
    assert all(link["url"].startswith("https://arxiv.org/abs/") for link in told["links"])
    assert told["game"] and told["recorded"]


# ---- measuring and recording


CLIENT = SimpleNamespace(session_hash="tab", client=None)


def test_measuring_needs_a_pair():
    with pytest.raises(DFlashError, match="No pair"):
        measure_costs(Desk(Engine()), CLIENT)


def test_this_machine_is_measured_through_the_queue():
    stage = Stage(steps_per_second=400)
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(20)
    desk = Desk(engine)
    found = measure_costs(desk, CLIENT)
    assert (found.plain_seconds, found.draft_seconds, found.verify_seconds, found.block_size) == (
        0.009,
        0.004,
        0.009,
        8,
    )
    assert machine(desk) == "smollm2-135m · cpu · float32" and not desk.is_busy("tab-costs")


def test_a_recording_is_a_checked_trace_of_a_warmed_run():
    model = tiny_llama()
    pair = tiny_pair(model, tiny_draft(model.config))
    start = time.perf_counter()
    trace = record(pair, "tell me", Settings(max_new_tokens=24))
    assert trace.complete and trace.header["messages"][0]["content"] == "tell me"
    assert 0 < trace.stats.total_seconds <= time.perf_counter() - start


def test_the_command_writes_both_recordings(tmp_path, capsys):
    model = tiny_llama()
    write_target(tmp_path / "target", model)
    write_draft(tmp_path / "draft", tiny_draft(model.config))
    where = [
        "--target",
        str(tmp_path / "target"),
        "--draft",
        str(tmp_path / "draft"),
        "--folder",
        str(tmp_path / "out"),
    ]
    assert main([*where, "--max-new-tokens", "20", "--attempts", "2", "--prompt", "tell me"]) == 0
    plain, drafted = (open_trace(tmp_path / "out" / f"{name}.ndjson") for name in ("plain", "dflash"))
    assert learn.reply_ids(plain) == learn.reply_ids(drafted) and plain.header["dtype"] == "float32"
    assert "τ" in capsys.readouterr().out
    assert main(["--pair", "nothing-of-the-kind", "--folder", str(tmp_path / "no")]) == 1
    assert not (tmp_path / "no").exists()
