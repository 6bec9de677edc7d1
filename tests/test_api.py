"""The endpoints for programs, through gradio_client, on the scripted pair."""

import json
import threading
import time

import pytest

from tests.conftest import serve_stage
from tests.stage import DEFAULT_REPLY, Stage

gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def client(served):
    return gradio_client.Client(served.url, verbose=False)


def test_only_the_two_documented_endpoints_are_offered(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == ["/chat", "/steps"]
    names = [parameter["parameter_name"] for parameter in named["/chat"]["parameters"]]
    assert names == ["message", "system", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "drafting", "block_size"]
    assert "plain text" in named["/chat"]["description"] and '"step"' in named["/steps"]["description"]


def test_chat_returns_the_reply(client, served):
    assert client.predict("say <b>hello</b>", system="Be kind.", api_name="/chat") == "<b>hello</b>"
    assert "system\nBe kind." in served.stage.prompts[-1]


def test_steps_yields_deltas_that_join_to_the_run(client, served):
    job = client.submit("tell me about the sea", api_name="/steps")
    outputs = list(job)
    events = [json.loads(line) for output in outputs for line in output.splitlines()]
    assert len(outputs) > 3
    assert [event["t"] for event in events] == ["prefill", *["step"] * (len(events) - 2), "finish"]
    assert [event["index"] for event in events[1:-1]] == list(range(len(events) - 2))
    text = events[0]["piece"] + "".join("".join(event["pieces"]["committed"]) for event in events[1:-1]) + events[-1]["tail"]
    assert text == DEFAULT_REPLY


def test_options_reach_the_decode(client, served):
    outputs = list(client.submit("say a long sentence of many words", api_name="/steps", max_new_tokens=6, drafting=False))
    events = [json.loads(line) for output in outputs for line in output.splitlines()]
    assert events[-1]["reason"] == "length" and events[-1]["new_tokens"] == 6
    assert all(event["drafted"] == [] for event in events[1:-1])


@pytest.mark.parametrize("options, word", [({"temperature": -1}, "temperature"), ({"block_size": 1}, "block_size")])
@pytest.mark.parametrize("endpoint", ["/chat", "/steps"])
def test_bad_options_are_readable_errors(client, endpoint, options, word):
    with pytest.raises(Exception, match=word):
        client.submit("say hi", api_name=endpoint, **options).result(timeout=10)


def test_cancelling_frees_the_decode(client, served):
    served.stage.steps_per_second, before = 10, served.stage.steps_per_second
    try:
        job = client.submit("tell me about the sea", api_name="/steps")
        end = time.monotonic() + 5
        while not job.outputs() and time.monotonic() < end:
            time.sleep(0.01)
        assert served.stage.live == 1
        job.cancel()
        end = time.monotonic() + 2
        while served.stage.live and time.monotonic() < end:
            time.sleep(0.02)
        assert served.stage.live == 0
    finally:
        served.stage.steps_per_second = before


def test_programs_and_people_take_turns(served):
    served.stage.most_live = 0
    clients = [gradio_client.Client(served.url, verbose=False) for _ in range(3)]
    jobs = [client.submit(f"say number {i}", api_name="/chat") for i, client in enumerate(clients)]
    assert [job.result(timeout=20) for job in jobs] == ["number 0", "number 1", "number 2"]
    assert served.stage.most_live == 1


def test_private_events_are_closed_to_programs(client):
    with pytest.raises(Exception):
        client.predict(api_name="/leave")
    with pytest.raises(Exception):
        client.predict("x", api_name="/_shelved")


def test_a_public_host_caps_size_and_rate():
    from app.limits import Limits

    served = serve_stage(Stage(), limits=Limits(max_new_tokens=8, prompt_characters=50, runs_per_minute=3, pairs=("smollm2-135m",)))
    try:
        client = gradio_client.Client(served.url, verbose=False)
        assert len(client.predict("say abcdefghijklmnopqrstuvwxyz", api_name="/chat", max_new_tokens=500)) <= 8 * 4
        with pytest.raises(Exception, match="too long for this host"):
            client.predict("x" * 60, api_name="/chat")
        client.predict("say a", api_name="/chat")
        client.predict("say b", api_name="/chat")
        with pytest.raises(Exception, match="3 a minute"):
            client.predict("say c", api_name="/chat")
    finally:
        served.close()


def test_no_thread_outlives_the_calls(served):
    end = time.monotonic() + 3
    while any(thread.name.startswith("decode-") for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decode-")]
