"""The terminal command: what it streams, colours, counts and says when something is wrong."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_core import DFlashError, Finish, Prefill, SamplingParams, Step, decode, generate
from tests.scripted import reply_of
from tests.tiny import tiny_draft, tiny_llama, tiny_pair, write_draft, write_target

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    model = tiny_llama()
    return write_target(root / "target", model), write_draft(root / "draft", tiny_draft(model.config))


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    return tiny_pair(model, tiny_draft(model.config))


@pytest.fixture
def command(folders, capsys):
    """Run the command; returns its exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        target, draft = folders
        code = generate.main(["--target", str(target), "--draft", str(draft), "--dtype", "float32", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def reply(pair, text: str, system: str | None = None, **params) -> list[int]:
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
    ids = pair.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return reply_of(decode(pair, ids, SamplingParams(**{"max_new_tokens": 20} | params), drafting=False))


def test_a_pipe_gets_the_plain_reply_and_the_numbers_go_beside_it(command, pair):
    code, out, err = command("--max-new-tokens", "20", "tell me a story")
    ids = reply(pair, "tell me a story")
    assert code == 0 and out == pair.tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert f"{len(ids)} tokens in" in err and "tok/s), ended by the length limit" in err and "first token after" in err
    assert re.search(r"τ \d\.\d\d tokens per verify pass", err) and re.search(r"accepted/drafted \d+/\d+ \(", err)
    assert "\x1b" not in out + err


def test_options_reach_the_decoder(command, pair):
    text = "tell me a story"
    _, plain, err = command("--no-draft", "--max-new-tokens", "20", text)
    assert plain == command("--max-new-tokens", "20", text)[1] and "τ" not in err
    _, sampled, _ = command(
        "--max-new-tokens", "20", "--temperature", "1", "--seed", "3", "--top-k", "9", "--top-p", "0.9", text
    )
    ids = reply(pair, text, temperature=1.0, seed=3, top_k=9, top_p=0.9)
    assert sampled == pair.tokenizer.decode(ids, skip_special_tokens=True) + "\n" != plain
    _, with_system, _ = command("--system", "be brief", "--max-new-tokens", "20", text)
    assert with_system == pair.tokenizer.decode(reply(pair, text, "be brief"), skip_special_tokens=True) + "\n"
    raw = reply_of(decode(pair, pair.tokenizer(text).input_ids, SamplingParams(max_new_tokens=20)))
    assert (
        command("--raw", "--max-new-tokens", "20", text)[1]
        == pair.tokenizer.decode(raw, skip_special_tokens=True) + "\n"
    )


def test_json_prints_every_event_as_a_line(command, pair):
    code, out, err = command("--json", "--block-size", "3", "--max-new-tokens", "9", "hello")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["event"] for row in rows] == ["prefill", *["step"] * (len(rows) - 2), "finish"]
    kinds = {"prefill": Prefill, "step": Step, "finish": Finish}
    events = []
    for row in rows:
        values = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name != "event"
        }
        events.append(kinds[row["event"]](**values))  # every field is there, and no other
    assert reply_of(events) == reply(pair, "hello", max_new_tokens=9)
    assert max(len(event.drafted) for event in events if isinstance(event, Step)) == 2
    assert "9 tokens in" in err


def test_show_steps_prints_a_line_per_step_and_then_the_reply(command, pair):
    _, out, _ = command("--show-steps", "--max-new-tokens", "9", "hello")
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert lines[0].startswith("prefill ") and "▲" in steps[0] and "✗" in steps[0] and "accepted" in steps[0]
    assert [int(line.split()[1]) for line in steps] == list(range(len(steps)))
    assert out.endswith(pair.tokenizer.decode(reply(pair, "hello", max_new_tokens=9), skip_special_tokens=True) + "\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--block-size", "9", "hello"], "The block size is too large for this draft."),
        (["--temperature", "-1", "hello"], "'temperature' is -1.0."),
        (["--max-new-tokens", "0", "hello"], "'max_new_tokens' is 0."),
        (["  "], "The prompt is empty."),
        (["x " * 600], "The prompt is too long for this target."),
        (["--device", "abacus", "hello"], "The device is unknown."),
    ],
)
def test_a_users_error_is_one_clean_message(command, arguments, message):
    code, out, err = command(*arguments)
    assert code == 1 and out == "" and message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_a_draft_for_another_target_is_one_clean_message(folders, tmp_path, capsys):
    draft = write_draft(tmp_path, tiny_draft(tiny_llama(num_hidden_layers=6).config))
    assert generate.main(["--target", str(folders[0]), "--draft", str(draft), "hi"]) == 1
    assert "This draft was made for another target." in capsys.readouterr().err


def test_the_prompt_may_come_from_standard_input(command, monkeypatch):
    expected = command("--max-new-tokens", "6", "hello")[1]
    for arguments in (["-"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
        assert command("--max-new-tokens", "6", *arguments)[1] == expected
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    code, _, err = command()
    assert code == 1 and "No prompt was given." in err


def test_an_interrupt_ends_with_the_numbers_so_far(command, pair, monkeypatch):
    closed = []

    def interrupted(*arguments, **options):
        events = decode(*arguments, **options)
        try:
            for count, event in enumerate(events):
                if count == 4:
                    raise KeyboardInterrupt
                yield event
        finally:
            events.close()
            closed.append(True)

    monkeypatch.setattr(generate, "decode", interrupted)
    code, out, err = command("--no-draft", "hello")
    assert code == 130 and closed == [True] and "4 tokens in" in err and "ended by Ctrl-C" in err
    assert out == pair.tokenizer.decode(reply(pair, "hello")[:4], skip_special_tokens=True) + "\n"


def test_a_real_interrupt_of_a_real_process(folders):
    target, draft = folders
    arguments = ["--target", str(target), "--draft", str(draft), "--raw", "--json", "--max-new-tokens", "500", "a"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "dflash_core.generate", *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert json.loads(process.stdout.readline())["event"] == "prefill"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "ended by Ctrl-C" in err and "Traceback" not in err


def test_errors_are_of_the_users_family():
    with pytest.raises(DFlashError):
        generate._prompt_text("\n")
