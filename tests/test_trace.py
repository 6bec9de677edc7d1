"""The trace file: what is written comes back, damage and newer versions are told plainly."""

import json
import warnings

import pytest

from app import trace
from app.trace import Recorder, TraceError
from dflash_core import DFlashError
from tests.xray_script import WordTokenizer, byte_level_tokenizer, header, recorded, run_events

WORDS = ["Once", " upon", " a", " time", ",", "\n", " a", " <script>", " & ", "\u2028", "😀", "\x00", " end"]


@pytest.fixture
def text():
    return recorded(WORDS).ndjson


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def with_line(text, number, **changes):
    rows = text.split("\n")
    rows[number] = json.dumps(json.loads(rows[number]) | changes)
    return "\n".join(rows)


def test_the_header_says_what_ran_and_where(text):
    first = lines(text)[0]
    assert (first["format"], first["version"]) == ("dflash-trace", 1)
    assert {"pair", "device", "dtype", "settings", "messages", "created", "id"} <= set(first)
    assert first["messages"] == [{"role": "user", "content": "Tell me <b>something</b>."}]


def test_events_come_back_as_they_went_in():
    tokenizer = WordTokenizer(WORDS)
    events = list(run_events([*tokenizer.sequence, 0], accepted=(2, 0, 3), k=3))
    recorder = Recorder(header(), tokenizer)
    for event in events:
        recorder.add(event)
    back = trace.parse(recorder.ndjson)
    assert list(back.events) == events
    assert back.text == "".join(WORDS) == recorder.text
    assert back.stats == recorder.stats
    assert back.complete and back.ndjson == recorder.ndjson


def test_the_value_only_ever_grows_and_lines_are_the_deltas():
    tokenizer = WordTokenizer(WORDS)
    recorder, seen, deltas = Recorder(header(), tokenizer), "", ""
    deltas = recorder.ndjson
    for event in run_events([*tokenizer.sequence, 0], accepted=(2,), k=3):
        deltas += recorder.add(event)
        assert recorder.ndjson.startswith(seen) and recorder.ndjson == deltas and seen != deltas
        seen = recorder.ndjson


def test_every_line_is_inert_in_a_page_and_valid_utf8():
    recorder = recorded(["<script>alert(1)</script>", "<!--", "\u2028", "\u2029"], title="\ud800 <b>")
    assert "<" not in recorder.ndjson and "\u2028" not in recorder.ndjson
    recorder.ndjson.encode("utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import gradio

        gradio.HTML(html_template="x").postprocess(recorder.ndjson)
    assert trace.parse(recorder.ndjson).text.startswith("<script>alert(1)</script><!--\u2028")


def test_characters_cut_between_steps_are_whole_in_the_text():
    tokenizer = byte_level_tokenizer()
    ids = [*tokenizer("é😀漢", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    recorder = Recorder(header(), tokenizer)
    for event in run_events(ids, accepted=(1, 0, 2), k=2):
        recorder.add(event)
        assert "\N{REPLACEMENT CHARACTER}" not in recorder.text
    assert recorder.text == "é😀漢"


def test_save_and_open(tmp_path, text):
    path = trace.save(text, tmp_path / trace.file_name(trace.parse(text).header))
    assert path.name.startswith("dflash-scripted-20") and path.suffix == ".ndjson"
    assert trace.open_trace(path).ndjson == text
    assert trace.save(trace.parse(text), tmp_path / "again").read_text(encoding="utf-8") == text


def test_a_file_name_is_plain_whatever_the_pair_is_called():
    assert trace.file_name({"pair": "../../etc/x y", "created": "2026-01-31T15:30:00+00:00"}) == "dflash-etc-x-y-20260131-1530.ndjson"
    assert trace.file_name({}, suffix=".html") == "dflash-run.html"


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_cut_file_keeps_what_is_whole(tmp_path, text, cut):
    path = tmp_path / "cut.ndjson"
    path.write_bytes(text.encode()[:-cut])
    back = trace.open_trace(path)
    whole = lines(text)
    assert back.complete == (cut == 1)
    assert len(back.rows) == len(whole) - (1 if cut == 1 else 2)


def test_a_file_cut_inside_a_character_keeps_what_is_whole(tmp_path):
    raw = recorded(["a", "b", "漢字"], accepted=(0,), k=2).ndjson.encode()
    cut = raw[: raw.rindex("漢".encode()) + 1]
    path = tmp_path / "cut.ndjson"
    path.write_bytes(cut)
    whole = cut[: cut.rindex(b"\n") + 1].decode()
    assert trace.open_trace(path).ndjson == whole


def test_a_stopped_run_is_whole_but_not_complete(text):
    recorder = Recorder(header(), WordTokenizer(WORDS))
    for event in list(run_events(WordTokenizer(WORDS).sequence, accepted=(2,), k=3))[:3]:
        recorder.add(event)
    recorder.cancel()
    back = trace.parse(recorder.ndjson)
    assert not back.complete and len(back.events) == 3 and back.rows[-1] == {"t": "cancel", "why": "stopped", "tail": ""}


def test_a_newer_version_is_told_plainly(text):
    with pytest.raises(TraceError, match="newer version.*version 2.*Update"):
        trace.parse(with_line(text, 0, version=2))


@pytest.mark.parametrize("first", ["", "hello", "[]", '{"format":"other","version":1}', '{"format":"dflash-trace","version":"1"}'])
def test_other_files_are_not_traces(first, text):
    with pytest.raises(TraceError, match="not a DFlash trace"):
        trace.parse("\n".join([first, *text.split("\n")[1:]]))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"accepted": 99}, "99 tokens were accepted of 7"),
        ({"accepted": -1}, "'accepted' is not a count"),
        ({"posterior": [1]}, "'posterior' has 1 entries, not 8"),
        ({"draft_seconds": "fast"}, "'draft_seconds' is not a number"),
        ({"drafted": "abc"}, "'drafted' is not a list"),
        ({"pieces": {"drafted": [], "posterior": [], "committed": [], "anchor": ""}}, "'drafted' has 0 entries"),
        ({"pieces": None}, "cannot be read"),
        ({"index": 5}, "out of order"),
        ({"t": "surprise"}, "not a known event"),
    ],
)
def test_damage_is_named_by_line(text, changes, said):
    with pytest.raises(TraceError, match=f"damaged. Line 3: .*{said}"):
        trace.parse(with_line(text, 2, **changes))


@pytest.mark.parametrize("line", ["{broken", "NaN", '{"t":"step","draft_seconds":1e999}', "[" * 5000, '"text"'])
def test_a_broken_line_in_the_middle_is_damage(text, line):
    rows = text.split("\n")
    with pytest.raises(TraceError, match="damaged. Line 3"):
        trace.parse("\n".join([*rows[:2], line, *rows[2:]]))


def test_unknown_fields_are_dropped_and_missing_header_fields_filled(text):
    rows = text.split("\n")
    rows[0] = '{"format":"dflash-trace","version":1,"evil":"x","messages":[3,{"role":"user"}],"settings":[]}'
    back = trace.parse(with_line("\n".join(rows), 2, surprise=1))
    assert "evil" not in back.header and "surprise" not in back.ndjson
    assert back.header["messages"] == [{"role": "user", "content": ""}] and back.header["settings"] == {}
    assert back.header["baseline_seconds"] is None
    for given, kept in (("0.03", 0.03), ("1", 1.0), ("0", None), ("-1", None), ("true", None), ('"1"', None)):
        rows[0] = f'{{"format":"dflash-trace","version":1,"baseline_seconds":{given}}}'
        assert trace.parse("\n".join(rows)).header["baseline_seconds"] == kept


def test_files_that_cannot_be_read_or_written(tmp_path, text, monkeypatch):
    with pytest.raises(DFlashError, match="cannot be read. No such file"):
        trace.open_trace(tmp_path / "none")
    with pytest.raises(DFlashError, match="not saved"):
        trace.save(text, tmp_path / "none" / "x")
    (tmp_path / "latin").write_bytes(b"\xff\xfe\n" * 9)
    with pytest.raises(TraceError, match="not UTF-8"):
        trace.open_trace(tmp_path / "latin")
    monkeypatch.setattr("app.trace_reading.MAX_BYTES", 10)
    (tmp_path / "big").write_text(text)
    with pytest.raises(TraceError, match="too large"):
        trace.open_trace(tmp_path / "big")
