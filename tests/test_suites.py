"""Built-in prompts, suites and what a race becomes on the page, in a picture and in a figure."""

import csv
import io
import json
from collections import Counter

import pytest
from PIL import Image

from app import race_card
from app.desk import Desk
from app.engine import Choice, Engine
from app.race import PLAIN, Lap, chosen, conclude, lap_of
from app.race_card import card
from app.race_charts import suite_figure
from app.race_runs import Progress, Request, race
from app.race_view import TABLE_HEAD, progress_view, race_view, suite_progress_view, table_rows
from app.race_words import as_csv
from app.settings import Settings
from app.suites import ALL, CATEGORIES, HEAD, Prompt, SuiteResult, as_json, built_in, pick, suite, table
from app.trace import parse
from dflash_core import Step, bench, bench_methods
from dflash_core.bench_report import method_report
from tests.stage import Stage
from tests.tiny import tiny_draft, tiny_llama, tiny_pair, write_draft, write_target
from tests.xray_script import recorded

FACTS = {
    "pair": "p",
    "device": "cpu",
    "dtype": "float32",
    "temperature": 0.0,
    "seed": None,
    "max_new_tokens": 96,
    "prompt": "Why?",
}


def laps(*seconds, ids=(1, 2, 3, 4), steps=2):
    return [Lap(tuple(ids), one, 0.1, steps, 6, 1, "") for one in seconds]


def raced(plain, fast, **more):
    return conclude(chosen(8, ["dflash"]), {PLAIN: plain, "dflash": fast}, FACTS, **more)


# ---- prompts


def test_there_are_enough_prompts_of_every_kind_and_no_two_alike():
    counts = Counter(prompt.category for prompt in built_in())
    assert set(counts) == set(CATEGORIES) and len(built_in()) >= 80
    assert counts["chat"] >= 30 and all(count >= 12 for count in counts.values())
    texts = [prompt.text for prompt in built_in()]
    assert len(set(texts)) == len(texts) and all(20 < len(text) < 900 for text in texts)
    assert all(text == text.strip() for text in texts)


def test_picking_takes_the_first_of_each_category():
    chosen_prompts = pick(["code", "chat"], 2)
    assert [prompt.category for prompt in chosen_prompts] == ["chat", "chat", "code", "code"]
    assert chosen_prompts[0] == built_in()[0] and pick([], 3) == ()


# ---- suites


def test_a_suite_adds_up_prompts_per_repeat_and_by_category():
    one = raced(laps(4.0, 8.0), laps(2.0, 2.0, steps=1))
    two = raced(laps(2.0, 2.0), laps(2.0, 4.0, ids=(1, 2, 9, 4)), gaps={"dflash": 0.1})
    result = SuiteResult((Prompt("chat", "a"), Prompt("code", "b")), (one, two))
    rows = {(row["category"], row["lane"]): row for row in table(result)}
    assert list(rows) == [
        (name, lane) for name in ("chat", "code", ALL) for lane in ("Plain decoding", "DFlash, block 8")
    ]
    total = rows[ALL, "DFlash, block 8"]
    assert total["prompts"] == 2 and total["repeats"] == 2
    # Repeat 1: 8 tokens in 4 s against 6 s; repeat 2: 8 tokens in 6 s against 10 s.
    assert (total["low"], total["high"]) == (pytest.approx(8 / 6), pytest.approx(2.0))
    assert (total["speedup_low"], total["speedup_high"]) == (pytest.approx(1.5), pytest.approx(10 / 6))
    assert total["tau"] == pytest.approx((3 + 3 + 3 + 3) / (1 + 1 + 2 + 2))
    assert (total["identical"], total["rounding_ties"], total["compared"]) == (1, 1, 2)
    assert rows["chat", "DFlash, block 8"]["identical"] == 1 and rows["chat", "Plain decoding"]["tau"] is None
    assert len(table(SuiteResult(result.prompts[:1], result.races[:1]))) == 2, "one category is its own sum"


def test_a_suites_files_and_table():
    result = SuiteResult((Prompt("chat", "a"),), (raced(laps(4.0, 8.0), laps(2.0, 2.0)),))
    told = json.loads(as_json(result))
    assert told["format"] == "dflash-suite" and told["prompts"][0]["lanes"][1]["repeats"] == 2 and "prompt" not in told
    rows = list(csv.DictReader(io.StringIO(as_csv(table(result), HEAD))))
    assert tuple(rows[0]) == HEAD and float(rows[1]["speedup"]) == 3.0
    shown = table_rows(table(result))
    assert all(len(row) == len(TABLE_HEAD) for row in shown)
    assert shown[1] == ["chat", "DFlash, block 8", "2.0", "2.0–2.0", "3.00×", "2.00–4.00", "1.50", "17%", "1/1"]


def test_a_suite_runs_on_a_desk_and_counts_its_laps():
    stage = Stage(steps_per_second=2000)
    stage.reply = "The sea is wide."
    engine = Engine(load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(20)
    system = {"role": "system", "content": "Be brief."}
    request = Request("s-race", "visitor", "s", (system,), Settings(max_new_tokens=16))
    *progress, result = suite(Desk(engine), request, chosen(8, ["dflash"]), pick(["chat", "maths"], 1), 2)
    assert isinstance(result, SuiteResult) and len(result.races) == 2
    assert (
        all("Be brief." in prompt for prompt in stage.prompts[-4:])
        and built_in()[0].text in result.races[0].facts["prompt"]
    )
    views = [suite_progress_view(told, result.lanes, 2) for told in progress]
    assert {view["laps"] for view in views} == {8} and [view["done"] for view in views] == sorted(
        view["done"] for view in views
    )
    assert views[-1]["text"].startswith("Prompt 2 of 2 (maths).")


def test_the_figure_has_a_bar_and_whiskers_per_lane():
    result = SuiteResult((Prompt("chat", "a"), Prompt("code", "b")), (raced(laps(4.0, 8.0), laps(2.0, 2.5)),) * 2)
    figure = suite_figure(table(result))
    assert [bar.name for bar in figure.data] == ["Plain decoding", "DFlash, block 8"]
    bar = figure.data[1]
    assert list(bar.x) == ["chat", "code", "all prompts"]
    row = table(result)[1]
    assert bar.y[0] + bar.error_y.array[0] == pytest.approx(row["high"])
    assert bar.y[0] - bar.error_y.arrayminus[0] == pytest.approx(row["low"])
    assert suite_figure(table(result), dark=True).layout.font.color != figure.layout.font.color


# ---- views


def test_the_page_is_told_every_lap_and_only_plain_values():
    view = race_view(raced(laps(4.0, 4.2, 3.9), laps(2.0, 2.1, 1.9)))
    assert json.loads(json.dumps(view)) == view
    plain, fast = view["lanes"]
    assert fast["seconds_all"] == [2.0, 2.1, 1.9] and fast["seconds"] == 2.0 and fast["speedup"] == "2.00×"
    assert fast["same"] == "same output" and plain["same"] == "" and plain["speedup"] == ""
    assert view["facts"] == "p · cpu · float32 · temperature 0 · at most 96 tokens" and view["repeats"] == 3


def test_progress_in_words():
    lanes = chosen(8, ["dflash"])
    assert progress_view(Progress(0, 4, None, 0), lanes, 2)["text"].startswith("Warming up")
    assert progress_view(Progress(4, 4, None, 1), lanes, 2)["text"] == "Comparing the replies."
    assert (
        progress_view(Progress(2, 4, lanes[1], 1, tokens=7), lanes, 2)["text"]
        == "DFlash, block 8, repeat 2 of 2: 7 tokens"
    )
    assert progress_view(Progress(2, 4, lanes[1], 1, ahead=1), lanes, 2)["text"] == "Waiting: 1 run of others first."


# ---- the card


def real_race(**changes):
    plain, fast = (
        parse(recorded([f" w{i}" for i in range(90)], accepted, k).ndjson) for accepted, k in (((0,), 0), ((3, 5), 7))
    )
    return conclude(
        chosen(8, ["dflash"]), {PLAIN: [lap_of(plain)] * 2, "dflash": [lap_of(fast)] * 2}, FACTS | changes
    )  # fmt: skip


@pytest.mark.parametrize("families", [race_card.FAMILIES, ()], ids=["system fonts", "Pillow's own font"])
def test_the_card_is_a_picture_of_the_right_size_with_all_its_parts(families, monkeypatch):
    monkeypatch.setattr(race_card, "FAMILIES", families)
    race_card._font.cache_clear()
    picture = Image.open(io.BytesIO(card(real_race())))
    race_card._font.cache_clear()
    assert picture.size == (1200, 630) and picture.format == "PNG"
    colours = Counter(
        picture.convert("RGB").get_flattened_data()
        if hasattr(picture, "get_flattened_data")
        else picture.convert("RGB").getdata()
    )
    for wanted in (race_card.PANEL, race_card.KINDS["accepted"], race_card.KINDS["correction"], race_card.INK):
        assert colours[tuple(bytes.fromhex(wanted[1:]))] > 100, wanted


@pytest.mark.parametrize("prompt", ["x" * 2000, "<b>\n\n\t&", "日本語の質問 🙂", "مرحبا"])
def test_no_prompt_breaks_the_card(prompt):
    assert card(real_race(prompt=prompt))[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_long_reply_still_fits_the_card():
    trace = parse(recorded([f" w{i}" for i in range(2000)], (3, 5), 7).ndjson)
    result = conclude(chosen(8, ["dflash"]), {PLAIN: [lap_of(trace)] * 2, "dflash": [lap_of(trace)] * 2}, FACTS)
    assert len(card(result)) < 300_000


# ---- the same numbers as the command


@pytest.fixture
def benched(tmp_path):
    """The tiny pair on a desk, and the bench's numbers for one prompt."""
    model = tiny_llama()
    write_target(tmp_path / "target", model)
    write_draft(tmp_path / "draft", tiny_draft(model.config))
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "tell me"}]}) + "\n")
    where = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float32"]
    run = ["--prompts", str(tmp_path / "p.jsonl"), "--methods", "ar,dflash", "--repeats", "2", "--max-new-tokens", "60"]
    assert bench.main([*where, *run, "--json", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())["methods"]
    engine = Engine(load=lambda *_, **__: tiny_pair(model, tiny_draft(model.config)))
    engine.load(Choice())
    assert engine.wait(30)
    return Desk(engine), numbers


def as_bench_runs(entry):
    """A lane's laps as the bench would have kept them: one prompt, so one run a repeat."""
    commits = [step for step in parse(entry.shown.ndjson).events if isinstance(step, Step)]
    counts = (1, *(len(step.committed) for step in commits))
    return [[bench_methods.Run(lap.ids, lap.seconds, lap.first_token_seconds, counts)] for lap in entry.laps]


def test_the_race_says_what_the_bench_says(benched):
    """Same pair, prompt and settings: the same tokens, τ and identity; the same seconds: the same rates and speed-up."""
    desk, expected = benched
    request = Request("t-race", "v", "t", ({"role": "user", "content": "tell me"},), Settings(max_new_tokens=60))
    *_, result = race(desk, request, chosen(desk.engine.status.block_size, ["dflash"]), 5)
    assert [len(entry.laps[0].ids) for entry in result.lanes] == [expected[n]["new_tokens"] for n in ("ar", "dflash")]
    assert result.leader.tau == pytest.approx(expected["dflash"]["tau"])
    assert (result.leader.difference is None) == (expected["dflash"]["identical"] == 1)

    # How long a run takes is the machine's mood, so the clocks are compared on one set of measurements.
    runs = {name: as_bench_runs(entry) for name, entry in zip(("ar", "dflash"), result.lanes, strict=True)}
    method = bench_methods.Method("dflash", "dflash", run=lambda ids: pytest.fail("measured already"))
    bench_says = method_report(method, runs, [None], [])
    rates, speedup = result.leader.tokens_per_second, result.leader.speedup
    assert speedup.median == pytest.approx(bench_says["speedup_vs_ar"])
    assert (rates.low, rates.median, rates.high) == pytest.approx(
        [bench_says[f"tokens_per_second{end}"] for end in ("_low", "", "_high")]
    )
    assert bench_says["tau"] == pytest.approx(result.leader.tau)
