"""Data regeneration end to end: prompts in, shards out, on the local device and through a server; resumable, honest."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from dflash_core.errors import TrainingError
from dflash_core.training import regenerate, remote
from dflash_core.training.engine import Job, Reply
from dflash_core.training.meter import Meter, duration
from dflash_core.training.openers import OPENERS, SHARES, Openers, parse_mix, read_openers
from dflash_core.training.prompts import Template, Unique, read_prompts, user_prompt
from dflash_core.training.regenerate import main, parse, run
from dflash_core.training.remote import Server
from dflash_core.training.shards import TokenShards
from dflash_core.training.synthesis import Writer, synthesize
from tests.tiny import STOP_TOKEN_ID, tiny_llama, tiny_tokenizer, write_target

QUESTIONS = [f"what is {n} and {n * n} or so{' and so on' * (n % 5)}" for n in range(24)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("targets") / "tiny", tiny_llama())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}], "category": "ab"[i % 2]} for i, text in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(target, output, *more):
    return parse(["--target", str(target), "--output", str(output), "--batch", "5", "--max-reply", "20", *map(str, more)])


def stored(output):
    """{prompt tokens: (reply tokens, category)}"""
    shards = TokenShards.open(output)
    sequences = ((*shards[i], shards.category(i)) for i in range(len(shards)))
    return {tuple(t[:p].tolist()): (t[p:].tolist(), category) for t, p, category in sequences}


def greedy_reply(model, ids, limit=20):
    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :].tolist()


def test_prompts_become_the_targets_own_replies(target, prompts, tmp_path):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--greedy-fraction", 1))
    tokenizer, model, found = tiny_tokenizer(), tiny_llama(), stored(tmp_path / "out")
    assert len(found) == len(QUESTIONS)
    for index, text in enumerate(QUESTIONS):
        ids = tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert found[tuple(ids)] == (greedy_reply(model, ids), "ab"[index % 2])


def test_the_manifest_tells_how_the_data_was_made(target, prompts, tmp_path):
    facts = run(arguments(target, tmp_path / "out", "--prompts", prompts, "--greedy-fraction", 0.5, "--seed", 3))
    shards = TokenShards.open(tmp_path / "out")
    manifest, (made,) = shards.manifest, shards.manifest["runs"]
    assert manifest["target"] == "tiny" and len(manifest["template_sha256"]) == 64 and manifest["revision"] is None
    assert manifest["counts"]["tokens"] == shards.total_tokens and manifest["counts"]["sequences"] == 24
    assert made == json.loads(json.dumps(facts)) and made["by_category"] == {"a": 12, "b": 12}
    assert 4 <= made["greedy"] <= 20 and made["tokens_per_second"] > 0
    assert made["settings"]["temperature"] == 0.8 and made["settings"]["prompts"] == ["prompts.jsonl"]
    assert made["backend"]["kind"] == "local" and made["backend"]["rows"] == 5
    assert str(tmp_path) not in json.dumps(manifest)


def test_an_interrupted_run_goes_on(target, prompts, tmp_path, monkeypatch, capsys):
    """Interrupted after nine replies, then run again: every prompt once, the same data as in one go."""
    whole = ["--target", target, "--prompts", prompts, "--batch", 5, "--max-reply", 20, "--greedy-fraction", 1]
    assert main([*map(str, whole), "--output", str(tmp_path / "one")]) == 0
    real, seen = regenerate.ShardWriter.add, []

    def add(self, sample):
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(sample.key)
        real(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(regenerate.ShardWriter, "add", add)
        assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 130
    assert len(TokenShards.open(tmp_path / "two")) == 9
    assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 0
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
    assert [made["replies"] for made in TokenShards.open(tmp_path / "two").manifest["runs"]] == [9, 15]
    assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 0
    assert "0 replies" in capsys.readouterr().out.splitlines()[-1]
    assert len(TokenShards.open(tmp_path / "two")) == 24


def test_several_samples_of_one_prompt_differ(target, prompts, tmp_path):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--limit", 2, "--samples", 4, "--greedy-fraction", 0))
    shards = TokenShards.open(tmp_path / "out")
    assert len(shards) == 8 and len({tuple(shards[i][0].tolist()) for i in range(8)}) > 4


def test_duplicates_held_out_and_long_prompts_are_left_out(target, prompts, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTIONS[3].upper()}]}))
    double = tmp_path / "double.jsonl"
    double.write_text(json.dumps({"messages": [{"role": "user", "content": "  " + QUESTIONS[1].replace(" ", "  ")}]}))
    more = ["--prompts", prompts, double, "--exclude", held_out, "--max-prompt", 50]
    facts = run(arguments(target, tmp_path / "out", *more))
    assert (facts["duplicates"], facts["held_out"]) == (1, 1)
    assert facts["too_long"] > 0 and facts["replies"] == 24 - 1 - facts["too_long"]
    assert all(len(prompt) <= 50 for prompt in stored(tmp_path / "out"))


def test_time_up_ends_the_run_with_what_there_is(target, prompts, tmp_path, monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(regenerate.Clock, "past", lambda self, share=1.0: next(calls) > 10)
    facts = run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-minutes", 1))
    assert 8 <= facts["replies"] < 24 and len(stored(tmp_path / "out")) == facts["replies"]


def test_the_target_writes_prompts_and_answers_them(target, tmp_path, prompts):
    """A random target writes noise, but unique noise; a second run uses the same prompts again."""
    more = ["--synthesize", 6, "--mix", "maths=1,code=1", "--max-prompt", 200]
    facts = run(arguments(target, tmp_path / "out", *more))
    pool = list(read_prompts(tmp_path / "out" / "prompts.jsonl"))
    assert len(pool) == 6 == len({prompt.normalised for prompt in pool}) and {p.category for p in pool} <= {"maths", "code"}
    assert facts["replies"] + facts["too_long"] == 6
    again = run(arguments(target, tmp_path / "out", *more, "--prompts", prompts))
    assert again["replies"] == 24 and len(list(read_prompts(tmp_path / "out" / "prompts.jsonl"))) == 6


def scripted(texts):
    """A `generate` whose replies are given; they end with the stop token unless they end with '…'."""
    supply = iter(texts)

    def generate(jobs):
        for job in jobs:
            text = next(supply)
            ids = tiny_tokenizer()(text.rstrip("…"))["input_ids"]
            stopped = not text.endswith("…")
            yield Reply(job, np.array([*ids, STOP_TOKEN_ID] if stopped else ids, np.int32), stopped)

    return generate


def test_written_prompts_are_whole_unique_and_kept(tmp_path):
    template = Template(tiny_tokenizer())
    writer = Writer(template, Openers({"maths": ["Tom has 3"]}, {"maths": 1.0}, seed=0), capacity=400, seed=0)
    texts = [" red hats.", " RED   hats.", "", " tall trees. How many? And then he…", " words without an end…", " new <|im caps.", " cats and dogs!"]
    made = synthesize(scripted(texts), writer, 3, Unique(), tmp_path / "pool", lambda *_: None, lambda: False)
    assert [prompt.messages[0]["content"] for prompt in made] == ["Tom has 3 red hats.", "Tom has 3 tall trees. How many?", "Tom has 3 cats and dogs!"]
    assert list(read_prompts(tmp_path / "pool")) == made and {p.category for p in made} == {"maths"}


def test_a_target_that_repeats_itself_does_not_write_forever(tmp_path):
    writer = Writer(Template(tiny_tokenizer()), Openers({"free": [""]}, {"free": 1.0}, seed=0), capacity=400, seed=0)
    made = synthesize(scripted(["the same thing."] * 9999), writer, 5, Unique(), tmp_path / "pool", lambda *_: None, lambda: False)
    assert len(made) == 1 and writer.tries < 600


def test_openers_come_by_their_share_with_filled_slots():
    openers = Openers(OPENERS, SHARES, seed=1)
    drawn = [openers.draw() for _ in range(4000)]
    assert not [opener for opener in drawn if "{" in opener.text]
    shares = Counter(opener.category for opener in drawn)
    assert set(shares) == set(OPENERS) and abs(sum(SHARES.values()) - 1) < 1e-9
    assert all(abs(shares[name] / 4000 - share) < 0.03 for name, share in SHARES.items())
    assert len({opener.text for opener in drawn if opener.category == "maths"}) > 400


def test_own_openers_and_mixes(tmp_path):
    path = tmp_path / "seeds.txt"
    path.write_text("law\tIs it legal to\nWhat\\nnext\n\n")
    assert read_openers(path) == {"law": ["Is it legal to"], "other": ["What\nnext"]}
    assert parse_mix("law=3, other=1", ["law", "other"]) == {"law": 3.0, "other": 1.0}
    for bad in ("law", "laws=1", "law=-1", "law=0", "law=x"):
        with pytest.raises(TrainingError, match="mix cannot be used"):
            parse_mix(bad, ["law", "other"])
    path.write_text("\n")
    with pytest.raises(TrainingError, match="empty"):
        read_openers(path)


def test_only_the_last_user_turn_waits_for_a_reply(tmp_path):
    path = tmp_path / "chat.jsonl"
    talk = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "why"), ("assistant", "because")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text, "extra": 1} for role, text in talk]}))
    (prompt,) = read_prompts(path)
    assert [(m["role"], m["content"]) for m in prompt.messages] == talk[:4] and prompt.category == "other"
    assert prompt.key() == prompt.key(0) != prompt.key(1) and prompt.key() != user_prompt("why").key()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "There are no prompts"),
        (b"\n \n", "There are no prompts"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n{"messages": oh}', r"line 2"),
        (b'{"prompt": "a"}', "line 1.*no list 'messages'"),
        (b'{"messages": [{"role": "user"}]}', "line 1.*lacks"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1.*no user message"),
        (b"\xff\xfe\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_prompt_files_are_named_before_a_model_loads(tmp_path, content, message, monkeypatch):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(regenerate, "open_backend", lambda args: pytest.fail("loaded"))
    with pytest.raises(TrainingError, match=message) as caught:
        run(arguments("nowhere", tmp_path / "out", "--prompts", path))
    assert "bad.jsonl" in str(caught.value)


def test_settings_that_cannot_work_are_refused(target, prompts, tmp_path, capsys):
    for bad in (["--samples", 0], ["--greedy-fraction", 2], ["--temperature", 0], ["--max-minutes", 0], ["--template-args", "[1"]):
        assert main(["--output", str(tmp_path), "--prompts", str(prompts), *map(str, bad)]) == 1
    assert main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("error: ") == 6
    with pytest.raises(TrainingError, match="longer than the target's context.*512"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-prompt", 500))
    with pytest.raises(TrainingError, match="Every prompt is too long"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-prompt", 3))


def test_a_folder_of_other_data_and_a_full_disk_are_refused(target, prompts, tmp_path, monkeypatch):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--limit", 1))
    with pytest.raises(TrainingError, match="holds other data.*template_sha256"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--template-args", '{"enable_thinking": false}'))
    monkeypatch.setattr(regenerate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    with pytest.raises(TrainingError, match="disk is full.*0 MB are needed"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts))


def test_the_meter_says_how_fast_and_how_long(capsys):
    with Meter("Replies", 10) as meter:
        meter.show(5, 1234)
        assert meter.line().startswith("Replies: 5 of 10 · 1,234 tokens · ") and "tokens/s" in meter.line()
    assert capsys.readouterr().err.count("\n") == 1
    assert [duration(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]


class Fake(BaseHTTPRequestHandler):
    """An OpenAI-compatible server around the tiny tokenizer: it repeats the prompt's last words."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        body, state = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with state.lock:
            state.requests.append(body)
            state.flying += 1
            state.most = max(state.most, state.flying)
            script = state.script.pop(0) if state.script else None
        if state.gate is not None:
            state.gate.wait(timeout=5)
        with state.lock:
            state.flying -= 1
        self.send(*(script or state.answer(body)))


def echo(body):
    text = tiny_tokenizer().decode(body["prompt"][-20:-10])
    return 200, {"choices": [{"text": text, "finish_reason": "stop"}]}


@pytest.fixture
def fake(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.models, server.requests, server.script, server.answer = ["tiny-chat"], [], [], echo
    server.lock, server.flying, server.most, server.gate = threading.Lock(), 0, 0, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(remote.Server, "sleep", staticmethod(lambda seconds: None))
    yield server
    server.shutdown()
    server.server_close()


def address(fake):
    return f"http://127.0.0.1:{fake.server_address[1]}"


def server_arguments(fake, target, output, prompts, *more):
    return arguments(target, output, "--prompts", prompts, "--server", address(fake), "--concurrency", 4, *more)


def connect(fake, **options):
    return Server(address(fake), None, tiny_tokenizer(), (STOP_TOKEN_ID,), sleep=lambda seconds: None, **options)


JOBS = [Job(key, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24 + key], 0.8, 12) for key in range(6)]


def test_a_server_answers_with_the_same_prompts_and_resumes(fake, target, prompts, tmp_path):
    fake.script = [(503, {"error": "busy"}), (429, {"error": "slow down"})]
    first = run(server_arguments(fake, target, tmp_path / "out", prompts, "--limit", 10, "--greedy-fraction", 0.5))
    assert first["replies"] == 10 and len(fake.requests) == 12 and first["backend"]["answered"] == 10
    second = run(server_arguments(fake, target, tmp_path / "out", prompts, "--greedy-fraction", 0.5))
    assert second["replies"] == 14 and first["backend"]["model"] == "tiny-chat"
    sent = {tuple(body["prompt"]): body for body in fake.requests}
    found = stored(tmp_path / "out")
    assert set(found) == set(sent) and len(found) == 24
    for prompt, (reply, _) in found.items():
        text = echo({"prompt": list(prompt)})[1]["choices"][0]["text"]
        assert reply == [*tiny_tokenizer()(text)["input_ids"], STOP_TOKEN_ID]
    assert {body["temperature"] for body in sent.values()} == {0.0, 0.8} and {body["max_tokens"] for body in sent.values()} == {20}


def test_requests_fly_together(fake):
    fake.gate = threading.Event()
    timer = threading.Timer(0.3, fake.gate.set)
    timer.start()
    assert len(list(connect(fake, concurrency=3).generate(JOBS))) == 6
    assert fake.most == 3


def test_token_ids_of_the_server_win_over_its_text(fake):
    fake.answer = lambda body: (200, {"choices": [{"text": "x", "token_ids": [70, 71, STOP_TOKEN_ID], "finish_reason": "stop"}]})
    assert [reply.tokens.tolist() for reply in connect(fake).generate(JOBS[:2])] == [[70, 71, STOP_TOKEN_ID]] * 2
    fake.answer = lambda body: (200, {"choices": [{"text": "x", "token_ids": [70, 71], "finish_reason": "length"}]})
    (cut,) = connect(fake).generate(JOBS[:1])
    assert cut.tokens.tolist() == [70, 71] and not cut.stopped


def test_a_server_that_knows_no_token_ids_is_asked_without(fake):
    strict = lambda body: (400, {"error": "unknown field return_token_ids"}) if "return_token_ids" in body else echo(body)
    fake.answer = strict
    assert len(list(connect(fake, concurrency=1).generate(JOBS))) == 6
    assert sum("return_token_ids" in body for body in fake.requests) == 1


def test_one_refused_prompt_is_left_out_many_end_the_run(fake):
    fake.answer = lambda body: (400, {"error": "too long"}) if body["prompt"][-1] == 26 else echo(body)
    server = connect(fake)
    assert {reply.job.key for reply in server.generate(JOBS)} == {0, 1, 3, 4, 5} and server.refused == 1
    fake.answer = lambda body: (400, {"error": "no such thing"})
    with pytest.raises(TrainingError, match="refuses the prompts.*no such thing"):
        list(connect(fake).generate(JOBS * 3))


@pytest.mark.parametrize(
    "answer, message",
    [
        ((500, {"error": "broken"}), "does not answer.*HTTP 500.*broken.*to go on"),
        ((401, {}), "wants a key"),
        ((404, {}), "does not know what is asked"),
        ((200, {"choices": []}), "answer cannot be read"),
        ((200, "hm"), "answer cannot be read"),
    ],
)
def test_server_trouble_is_told(fake, answer, message):
    fake.answer = lambda body: answer
    with pytest.raises(TrainingError, match=message):
        list(connect(fake).generate(JOBS))


def test_the_key_is_sent_and_the_model_is_checked(fake):
    assert connect(fake, api_key="secret")._client.headers["Authorization"] == "Bearer secret"
    assert connect(fake).check() == "tiny-chat"
    fake.models = ["one", "two"]
    with pytest.raises(TrainingError, match="Asked for: none; served: one, two"):
        connect(fake).check()


def test_an_unreachable_server_is_told_after_the_retries():
    waits = []
    server = Server("http://127.0.0.1:9", "m", None, (), sleep=waits.append)
    with pytest.raises(TrainingError, match="does not answer.*127.0.0.1:9"):
        server.check()
    assert len(waits) == remote.RETRIES and waits == sorted(waits) and 0.7 < waits[0] < 1.3
    with pytest.raises(TrainingError, match="http://"):
        Server("localhost:8000", "m", None, ())
