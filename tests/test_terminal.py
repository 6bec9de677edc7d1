"""What the terminal is shown: colours by who wrote a token, step lines, closing numbers, whole characters."""

import io
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dflash_core import Prefill, Step
from dflash_core.tally import Tally
from dflash_core.terminal import Printer, TextStream, may_colour, summary
from tests.tiny import tiny_tokenizer

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, environment, expected",
    [
        (Screen(), {"TERM": "xterm"}, True),
        (Screen(), {"NO_COLOR": "1"}, False),
        (Screen(), {"NO_COLOR": ""}, True),
        (Screen(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals_of_the_willing(stream, environment, expected):
    assert may_colour(stream, environment) is expected


def step(**fields) -> Step:
    usual = dict(
        index=0, position=1, anchor=40, drafted=(50, 51, 52), posterior=(50, 51, 60, 61), accepted=2,
        correction=60, committed=(50, 51, 60), draft_confidence=(0.5,) * 3, target_confidence=(0.5,) * 4,
        draft_seconds=0.1, verify_seconds=0.2,
    )  # fmt: skip
    return Step(**usual | fields)


EVENTS = [
    Prefill(3, 40, 0.5),
    step(),
    step(index=1, position=4, anchor=60, accepted=3, correction=61, committed=(50, 51, 52, 61)),
]


def printed(events, **options) -> str:
    screen = io.StringIO()
    printer = Printer(screen, tiny_tokenizer(), **{"colour": True, "show_steps": False} | options)
    for event in events:
        printer.show(event)
    printer.close()
    return screen.getvalue()


def test_each_token_is_painted_as_who_wrote_it_and_the_paint_comes_off():
    shown = printed(EVENTS)
    ids = [40, 50, 51, 60, 50, 51, 52, 61]
    assert ESCAPES.sub("", shown) == tiny_tokenizer().decode(ids) + "\n" == printed(EVENTS, colour=False)
    styles = re.findall(r"\x1b\[([0-9;]+)m[^\x1b]+\x1b\[0m", shown)
    accepted, correction = "38;5;74", "1;4;38;5;214"
    assert styles == ["1", accepted, accepted, correction, accepted, accepted, accepted, correction]


def test_the_baseline_and_line_breaks_are_not_painted():
    newline = tiny_tokenizer().convert_tokens_to_ids("Ċ")
    plain = step(drafted=(), posterior=(newline,), accepted=0, correction=newline, committed=(newline,))
    assert printed([plain]) == "\n\n"
    assert printed([step(accepted=0, committed=(newline,), correction=newline)]) == "\n\n"


def test_a_cut_step_paints_only_what_was_committed():
    assert len(re.findall(r"\x1b\[38", printed([step(committed=(50,))]))) == 1
    assert "cut 2 after the end" in printed([step(committed=(50,))], show_steps=True)


def test_steps_mark_accepted_rejected_correction_and_bonus():
    lines = ESCAPES.sub("", printed(EVENTS, show_steps=True)).splitlines()
    assert lines[1].startswith("step   0  2/3 accepted") and lines[1].count("✓") == 2 and lines[1].count("✗") == 1
    assert "▲" in lines[1] and "★" not in lines[1] and "draft 100.0 verify 200.0 ms" in lines[1]
    assert lines[2].count("✓") == 3 and "★" in lines[2] and "▲" not in lines[2]


def test_the_closing_numbers():
    tally = Tally()
    for event in EVENTS:
        tally.add(event)
    assert list(summary(tally, "a stop token")) == [
        "8 tokens in 1.10 s (7.3 tok/s), ended by a stop token",
        "first token after 500 ms",
        "acceptance length τ 3.50 tokens per verify pass over 2 passes",
        "accepted/drafted 5/6 (83.3%)",
    ]
    assert tally.accepted_by_position == [1.0, 1.0, 0.5]
    assert list(summary(Tally(), "Ctrl-C")) == ["0 tokens in 0.00 s, ended by Ctrl-C"]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token, so that each character beyond ASCII takes several."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "naïve café",
        "海の詩 🌊🇨🇭 end",
        "👩‍👩‍👧‍👦",
        " leading",
        "tab\tline\n\n",
        "\N{REPLACEMENT CHARACTER} kept",
    ],
)
def test_pieces_are_whole_characters_and_join_to_the_reply(byte_tokenizer, text):
    stream = TextStream(byte_tokenizer)
    ids = byte_tokenizer(text).input_ids
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) and [p for p in pieces if p] == list(text)


def test_an_unfinished_character_comes_with_the_flush(byte_tokenizer):
    stream = TextStream(byte_tokenizer)
    ids = byte_tokenizer("a🌊").input_ids[:-1]
    assert "".join(stream.push(token) for token in ids) == "a"
    assert stream.flush() == byte_tokenizer.decode(ids)[1:] and stream.flush() == ""
