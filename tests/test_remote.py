"""The OpenAI-compatible back end against a small local server: same prompts, retries, refusals, clear trouble."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dflash_core.errors import TrainingError
from dflash_core.training import remote
from dflash_core.training.engine import Job
from dflash_core.training.regenerate import run
from dflash_core.training.remote import Server
from tests.test_regenerate import arguments, prompts, stored, target  # noqa: F401 (fixtures)
from tests.tiny import STOP_TOKEN_ID, tiny_tokenizer


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


JOBS = [
    Job(key, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24 + key], 0.8, 12)
    for key in range(6)
]


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
    assert {body["temperature"] for body in sent.values()} == {0.0, 0.8} and {
        body["max_tokens"] for body in sent.values()
    } == {20}


def test_requests_fly_together(fake):
    fake.gate = threading.Event()
    timer = threading.Timer(0.3, fake.gate.set)
    timer.start()
    assert len(list(connect(fake, concurrency=3).generate(JOBS))) == 6
    assert fake.most == 3


def test_token_ids_of_the_server_win_over_its_text(fake):
    fake.answer = lambda body: (
        200,
        {"choices": [{"text": "x", "token_ids": [70, 71, STOP_TOKEN_ID], "finish_reason": "stop"}]},
    )
    assert [reply.tokens.tolist() for reply in connect(fake).generate(JOBS[:2])] == [[70, 71, STOP_TOKEN_ID]] * 2
    fake.answer = lambda body: (200, {"choices": [{"text": "x", "token_ids": [70, 71], "finish_reason": "length"}]})
    (cut,) = connect(fake).generate(JOBS[:1])
    assert cut.tokens.tolist() == [70, 71] and not cut.stopped


def test_a_server_that_knows_no_token_ids_is_asked_without(fake):
    def strict(body):
        return (400, {"error": "unknown field return_token_ids"}) if "return_token_ids" in body else echo(body)

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
