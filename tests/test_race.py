"""The race: fair order, spreads, differences and their closeness, words and files that say what was measured."""

import csv
import io
import json
import math

import pytest

from app.desk import Desk
from app.engine import Choice, Engine
from app.limits import LimitError, Limits
from app.race import (
    PLAIN,
    Difference,
    Lap,
    RaceError,
    Result,
    Spread,
    catalogue,
    chosen,
    conclude,
    first_difference,
    lap_of,
    schedule,
)
from app.race_runs import Progress, Request, logit_gap, race
from app.race_tab import _lanes
from app.race_words import HEAD, as_csv, as_json, identity, record, verdict
from app.settings import Settings
from app.trace import parse
from dflash_core import DFlashError, SamplingParams, decode
from tests.stage import Stage
from tests.tiny import tiny_draft, tiny_llama, tiny_pair
from tests.xray_script import recorded

FACTS = {"pair": "p", "temperature": 0.0}


def lap(ids=(1, 2, 3, 4), seconds=1.0, steps=2, drafted=6, accepted=1, ndjson=""):
    return Lap(tuple(ids), seconds, 0.1, steps, drafted, accepted, ndjson)


def raced(plain, fast, facts=FACTS, gaps=None, key="dflash"):
    return conclude(chosen(8, [key]), {PLAIN: plain, key: fast}, facts, gaps)


# ---- lanes and their order


def test_the_catalogue_offers_what_the_pair_can_run():
    assert list(catalogue(16)) == ["plain", "dflash", "block-4", "block-8", "prompt-lookup", "hf-dflash"]
    assert list(catalogue(8)) == ["plain", "dflash", "block-4", "prompt-lookup", "hf-dflash"]
    assert list(catalogue(None)) == ["plain", "prompt-lookup"]
    assert catalogue(16)["block-4"].block_size == 4 and catalogue(16)["plain"].block_size is None


def test_plain_decoding_always_races_and_never_alone():
    assert [lane.key for lane in chosen(16, ["block-8", "dflash"])] == ["plain", "dflash", "block-8"]
    with pytest.raises(RaceError, match="nothing to race"):
        chosen(16, [])
    with pytest.raises(RaceError, match="no draft model"):
        chosen(None, ["dflash"])


@pytest.mark.parametrize("keys", [["dflash"], ["dflash", "block-4", "prompt-lookup"]])
def test_every_lane_runs_once_per_repeat_and_each_goes_first_in_turn(keys):
    lanes = chosen(16, keys)
    plan = schedule(lanes, len(lanes) * 2)
    for repeat in range(len(lanes) * 2):
        order = [lane.key for number, lane in plan if number == repeat]
        assert sorted(order) == sorted(lane.key for lane in lanes)
        assert order[0] == lanes[repeat % len(lanes)].key


# ---- numbers


def test_a_spread_tells_its_middle_and_its_ends():
    spread = Spread((2.5, 2.35, 2.41))
    assert (spread.low, spread.median, spread.high) == (2.35, 2.41, 2.5)
    assert spread.text(2, "×") == "2.41× (2.35–2.50)"


def test_speedups_are_taken_within_each_repeat():
    result = raced([lap(seconds=4.0), lap(seconds=8.0)], [lap(seconds=2.0), lap(seconds=2.0)])
    assert result.leader.speedups == (2.0, 4.0) and result.leader.speedup.median == 3.0
    assert result.plain.speedups == (1.0, 1.0) and result.repeats == 2


def test_the_middle_lap_is_the_one_to_show():
    entry = raced([lap()] * 3, [lap(seconds=3.0), lap(seconds=1.0), lap(seconds=2.0)]).leader
    assert entry.shown.seconds == 2.0


def test_a_lap_is_read_from_a_trace_and_must_be_whole():
    trace = parse(recorded([f" w{i}" for i in range(40)], title="lap").ndjson)
    found = lap_of(trace)
    assert len(found.ids) == trace.stats.new_tokens == 41 and found.seconds == pytest.approx(trace.stats.total_seconds)
    assert found.tau == pytest.approx(trace.stats.tau) and found.first_token_seconds == 0.1
    cut = parse(trace.ndjson[: trace.ndjson.rindex('{"t":"finish"')])
    with pytest.raises(RaceError, match="stopped"):
        lap_of(cut)


def test_rates_are_told_only_where_they_are_known():
    laps = {PLAIN: [lap(drafted=0, accepted=0, steps=3)], "dflash": [lap()], "prompt-lookup": [lap()]}
    plain, dflash, lookup = conclude(chosen(8, ["dflash", "prompt-lookup"]), laps, FACTS).lanes
    assert plain.tau is None and plain.acceptance_rate is None
    assert dflash.tau == 1.5 and dflash.acceptance_rate == pytest.approx(1 / 6)
    assert lookup.tau == 1.5 and lookup.acceptance_rate is None


# ---- same output or not


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 9, 3), Difference(1, 2, 9)),
        ((1, 2, 3), (1, 2), Difference(2, 3, None)),
        ((1, 2), (1, 2, 3), Difference(2, None, 3)),
    ],
)
def test_first_difference(one, other, expected):
    assert first_difference(one, other) == expected


@pytest.mark.parametrize(
    ("gap", "kind"), [(None, "unmeasured"), (0.0, "rounding"), (0.25, "rounding"), (0.4, "unclear"), (0.6, "suspect")]
)
def test_the_gap_decides_what_a_difference_is(gap, kind):
    assert Difference(3, 1, 2, gap).kind == kind


def test_what_may_be_compared():
    sampled = {"temperature": 1.0, "acceptance": "match"}
    laps = {PLAIN: [lap()], "dflash": [lap((1, 2, 3, 5))], "prompt-lookup": [lap((9,))]}
    lanes = chosen(8, ["dflash", "prompt-lookup"])
    own, foreign = conclude(lanes, laps, sampled).lanes[1:]
    assert own.compared and own.difference == Difference(3, 4, 5)
    assert not foreign.compared and foreign.difference is None
    assert not conclude(lanes, laps, sampled | {"acceptance": "rejection"}).lanes[1].compared
    assert all(entry.compared for entry in conclude(lanes, laps, FACTS).lanes[1:])


# ---- words


def test_the_verdict_claims_speed_only_when_the_whole_spread_does():
    def tone(*speedups):
        return verdict(raced([lap()] * len(speedups), [lap(seconds=1 / s) for s in speedups])).tone

    assert tone(2.0, 2.2, 1.9) == "faster" and tone(0.5, 0.6, 0.7) == "slower"
    assert tone(1.0, 1.01) == "even" and tone(0.8, 1.5, 1.6) == "even" and tone(0.6, 0.7, 1.1) == "even"


def test_the_verdict_shows_repeats_spread_and_tau():
    words = verdict(raced([lap()] * 3, [lap(seconds=s) for s in (0.5, 0.4, 0.25)]))
    assert words.factor == "2.50×" and words.headline == "DFlash was 2.50 times as fast as plain decoding."
    assert words.basis == "Median of 3 repeats, 2.00× to 4.00×"
    assert words.tau == "1.50 tokens per verify pass (τ), 17% of the drafted tokens accepted"
    assert words.identity == "Identical output: all 4 tokens are the same." and words.identity_tone == "same"


def pieces_trace(*pieces):
    return recorded(list(pieces), accepted=(1,), k=2)


@pytest.mark.parametrize(
    ("gap", "tone", "words"),
    [
        (0.03, "rounding", "0.030 apart: a tie that rounding decides"),
        (0.4, "differs", "larger than the usual rounding tie"),
        (1.5, "differs", "please report it"),
        (None, "differs", "was not measured"),
    ],
)
def test_a_difference_is_named_with_both_tokens_and_its_gap(gap, tone, words):
    one, two = pieces_trace("The", " sea", " is", " cold"), pieces_trace("The", " sea", " was", " cold")
    gaps = {} if gap is None else {"dflash": gap}
    result = raced([lap((1, 2, 3, 4), ndjson=one.ndjson)], [lap((1, 2, 9, 4), ndjson=two.ndjson)], gaps=gaps)
    sentence, found = identity(result.leader, result)
    assert found == tone and words in sentence
    assert "from token 3 on" in sentence and "‘ is’" in sentence and "‘ was’" in sentence


def test_the_files_hold_the_numbers_and_nothing_is_rounded_away():
    result = raced([lap(seconds=2.0), lap(seconds=2.1)], [lap(seconds=1.0), lap(seconds=1.05)])
    told = json.loads(as_json(result))
    assert told["format"] == "dflash-race" and told["version"] == 1 and told["pair"] == "p"
    assert told["lanes"][1]["speedup"] == pytest.approx(2.0)
    assert [one["seconds"] for one in told["lanes"][1]["laps"]] == [1.0, 1.05]
    rows = list(csv.DictReader(io.StringIO(as_csv([record(entry) for entry in result.lanes]))))
    assert tuple(rows[0]) == HEAD and [row["lane"] for row in rows] == ["Plain decoding", "DFlash, block 8"]
    assert float(rows[1]["tokens_per_second"]) == pytest.approx(result.leader.tokens_per_second.median, abs=1e-6)
    assert rows[0]["tau"] == "" and rows[1]["identical"] == "True"


def test_a_cell_is_never_a_formula():
    assert as_csv([{"lane": "=1+1"}], ("lane",)) == "lane\n'=1+1\n"


# ---- running it


def run_race(desk, keys=("dflash",), repeats=2, **settings):
    request = Request("tab-race", "visitor", "tab", ({"role": "user", "content": "tell me"},), Settings(**settings))
    told = list(race(desk, request, chosen(desk.engine.status.block_size, keys), repeats))
    return told[:-1], told[-1]


@pytest.fixture
def stage():
    return Stage(steps_per_second=400)


@pytest.fixture
def desk(stage):
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(20)
    return Desk(engine)


def test_a_race_measures_every_lane_as_often_and_one_at_a_time(desk, stage):
    before = len(stage.prompts)
    progress, result = run_race(desk, ("dflash", "block-4"), repeats=2)
    assert isinstance(result, Result) and [entry.lane.key for entry in result.lanes] == ["plain", "dflash", "block-4"]
    assert all(len(entry.laps) == 2 and entry.steady for entry in result.lanes)
    assert stage.most_live == 1 and len(stage.prompts) - before == 3 + 3 * 2, "a short warm-up each, then the laps"
    assert [p.done for p in progress] == sorted(p.done for p in progress) and progress[-1].done == 6
    assert {p.laps for p in progress} == {6} and all(isinstance(p, Progress) for p in progress)
    assert result.leader.tau > 1 and verdict(result).identity_tone == "same"
    assert result.facts["prompt"] == "tell me" and result.facts["trained_block_size"] == 8
    assert not desk.is_busy("tab-race")


def test_leaving_a_race_frees_the_device(desk, stage):
    stage.steps_per_second = 20
    request = Request("tab-race", "visitor", "tab", ({"role": "user", "content": "tell me"},), Settings())
    running = race(desk, request, chosen(8, ["dflash"]), 2)
    while next(running).tokens < 9:
        pass
    running.close()
    assert stage.live == 0 and not desk.is_busy("tab-race")


def test_an_error_in_a_lap_is_the_races(desk, stage):
    stage.step_error = (2, DFlashError("It is broken."))
    with pytest.raises(DFlashError, match="broken"):
        run_race(desk)
    assert not desk.is_busy("tab-race")


def test_a_race_counts_for_the_limits(stage):
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(20)
    with pytest.raises(LimitError):
        run_race(Desk(engine, Limits(runs_per_minute=3)))


def test_sampled_lanes_share_one_seed(desk):
    _, result = run_race(desk, temperature=0.8)
    assert isinstance(result.facts["seed"], int)
    _, result = run_race(desk, temperature=0.8, seed=11)
    assert result.facts["seed"] == 11


# ---- on a real pair


@pytest.fixture(scope="module")
def real_desk():
    model = tiny_llama()
    pair = tiny_pair(model, tiny_draft(model.config))
    engine = Engine(load=lambda *_, **__: pair)
    engine.load(Choice())
    assert engine.wait(30) and engine.status.phase == "ready", engine.status
    return Desk(engine)


def test_all_lanes_write_the_same_reply(real_desk):
    keys = list(catalogue(real_desk.engine.status.block_size))
    _, result = run_race(real_desk, keys, repeats=2, max_new_tokens=24)
    assert [entry.lane.key for entry in result.lanes] == keys and len(keys) >= 4
    for entry in result.lanes[1:]:
        assert entry.compared and entry.difference is None, entry
        assert entry.tokens_per_second.low > 0
    assert {len(entry.laps[0].ids) for entry in result.lanes} == {len(result.plain.laps[0].ids)}


@pytest.mark.parametrize("parts, kind, offered", [
    ({}, "DFlash", True),
    ({"selector_rank": 4, "selector_top_k": 4}, "DFlash 2", False),
    ({"layer_types": ("sliding_attention",) * 2, "sliding_window": 5, "is_causal": None}, "DFlash", False),
])  # fmt: skip
def test_transformers_own_loop_is_offered_for_the_drafts_it_knows(parts, kind, offered):
    model = tiny_llama()
    pair = tiny_pair(model, tiny_draft(model.config, **parts))
    engine = Engine(load=lambda *_, **__: pair)
    engine.load(Choice())
    assert engine.wait(30) and engine.status.draft_kind == kind
    keys = [key for _, key in _lanes(Desk(engine))["choices"]]
    assert ("hf-dflash" in keys) == offered and {"dflash", "prompt-lookup"} <= set(keys)


def test_the_logit_gap_is_what_the_target_says(real_desk):
    pair = real_desk.engine.borrow()
    real_desk.engine.give_back()
    messages = ({"role": "user", "content": "tell me"},)
    request = Request("tab-race", "visitor", "tab", messages, Settings())
    ids = list(pair.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
    events = list(decode(pair, ids, SamplingParams(max_new_tokens=6, stop_token_ids=()), drafting=False))
    prefix = [events[0].first_token, *(step.committed[0] for step in events[1:4])]
    own = events[4]
    other = (own.committed[0] + 1) % 100
    gap = logit_gap(real_desk, request, prefix, Difference(4, own.committed[0], other))

    import torch

    with torch.inference_mode():
        logits = pair.target.model(torch.tensor([ids + prefix])).logits[0, -1]
    assert gap == pytest.approx(float(logits[own.committed[0]] - logits[other]), abs=1e-4) and gap > 0
    assert math.isclose(own.target_confidence[0], float(logits.softmax(-1)[own.committed[0]]), abs_tol=1e-5)


def test_a_reply_that_merely_ended_has_no_gap(real_desk):
    request = Request("tab-race", "visitor", "tab", ({"role": "user", "content": "x"},), Settings())
    assert logit_gap(real_desk, request, [5], Difference(1, None, 7)) is None
