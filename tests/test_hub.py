"""Pairs from the Hub, against a small server with its protocol: fetched whole, checked early, errors in sentences."""

import json
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

from dflash_core import loading
from dflash_core.errors import LoadError
from dflash_core.loading import load_pair
from tests.tiny import tiny_draft, tiny_llama, tiny_qwen3, write_draft, write_target

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated/model": (403, "GatedRepo"), "broken/model": (500, "")}


class Hub:
    """Serves folders as models; remembers what was asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, verb, revision, *rest = (parts[2:] if is_api else parts) + [""]
        model = f"{owner}/{name}"
        if model in REFUSALS:
            return send(request, REFUSALS[model][0], error=REFUSALS[model][1])
        if model not in self.models:
            return send(request, 401 if is_api else 404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return send(request, 404, error="RevisionNotFound")
        folder = self.models[model]
        if is_api:
            facts = (
                listing(folder) if verb == "tree" else {"id": model, "sha": COMMIT, "siblings": [], "private": False}
            )
            return send(request, 200, json.dumps(facts).encode(), body=body)
        path = folder / "/".join(rest).strip("/")
        if not path.is_file():
            return send(request, 404, error="EntryNotFound")
        if body:
            self.served.append(f"{model}:{path.relative_to(folder)}")
        return send(request, 200, path.read_bytes(), body=body)


def listing(folder: Path) -> list[dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]


def send(
    request: BaseHTTPRequestHandler, status: int, content: bytes = b"", *, error: str = "", body: bool = True
) -> None:
    request.send_response(status)
    for key, value in (
        ("Content-Length", str(len(content))),
        ("Content-Type", "application/json"),
        ("ETag", f'"{sha1(content).hexdigest()}"'),
        ("X-Repo-Commit", COMMIT),
        ("X-Error-Code", error),
    ):
        if value:
            request.send_header(key, value)
    request.end_headers()
    if body:
        request.wfile.write(content)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits longer after every failure
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tiny_qwen3()
    server.models = {
        "some/target": write_target(tmp_path / "target", model),
        "some/draft": write_draft(tmp_path / "draft", tiny_draft(model.config)),
        "some/alien": write_draft(tmp_path / "alien", tiny_draft(tiny_llama(hidden_size=64).config)),
    }
    yield server
    server.stop()


def load(target: str = "some/target", draft: str | None = "some/draft", **options: Any) -> loading.Pair:
    return load_pair(**({"target": target, "draft": draft, "progress": lambda *_: None} | options))


def test_a_pair_comes_whole_and_works_offline_afterwards(hub):
    (hub.models["some/target"] / "original").mkdir()
    for unwanted in (
        "original/model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "README.md",
    ):
        (hub.models["some/target"] / unwanted).write_bytes(b"never fetched")
    seen: list[tuple[str, float | None]] = []
    pair = load(progress=lambda *report: seen.append(report))
    assert (pair.name, pair.block_size) == ("target + draft", 4)
    assert torch.equal(pair.draft.fc.weight, tiny_draft(tiny_qwen3().config).fc.weight)
    names = {name.split(":")[1] for name in hub.served}
    assert "model.safetensors" in names
    assert not names & {
        "original/model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "modeling_x.py",
        "README.md",
    }
    fractions = [
        fraction for message, fraction in seen if message == "Fetching the target from the Hub" and fraction is not None
    ]
    assert fractions and fractions[-1] == 1.0 and all(0.0 < fraction <= 1.0 for fraction in fractions)

    hub.stop()
    again = load(local_files_only=True)
    assert torch.equal(again.draft.fc.weight, pair.draft.fc.weight)


def test_a_draft_for_another_target_is_refused_before_any_weights_are_fetched(hub):
    with pytest.raises(LoadError, match="hidden size is 64, the target's is 32"):
        load(draft="some/alien")
    assert {name.split(":")[1] for name in hub.served} == {"config.json"}


def test_the_revision_belongs_to_the_target_and_the_draft_has_its_own(hub):
    assert load(revision=COMMIT).block_size == 4
    assert load(draft_revision=COMMIT).block_size == 4
    for option in ("revision", "draft_revision"):
        with pytest.raises(LoadError, match="The revision does not exist"):
            load(**{option: "v9"})


REFUSED = {
    "absent/model": "There is no such public model",
    "gated/model": "Access to it is restricted. Accept its licence",
    "broken/model": "could not be fetched from the Hub",
}


@pytest.mark.parametrize("model", REFUSED)
def test_what_the_hub_refuses_is_a_sentence(hub, model):
    with pytest.raises(LoadError, match=REFUSED[model]):
        load(target=model)


def test_a_model_without_config_is_a_sentence(hub):
    (hub.models["some/draft"] / "config.json").unlink()
    with pytest.raises(LoadError, match="It has no config.json"):
        load()


def test_without_network_the_first_start_is_a_sentence(hub):
    hub.stop()
    with pytest.raises(LoadError, match="could not be asked. Connect to the network, or give a local folder"):
        load()


@pytest.mark.parametrize("source", ["a/b/c", "owner\\model", "-/-"])
def test_what_is_no_id_is_a_sentence(hub, source):
    with pytest.raises(LoadError, match="local folder|no such folder"):
        load(draft=source)


def test_a_known_pair_comes_from_the_hub_with_its_settings(hub, monkeypatch):
    entry = loading.KnownPair("some/target", "some/draft", loading.KNOWN_PAIRS["qwen3-4b"].chat_template_kwargs)
    monkeypatch.setattr(loading, "KNOWN_PAIRS", {"qwen3-4b": entry})
    pair = load_pair("qwen3-4b", progress=lambda *_: None)
    assert (pair.name, dict(pair.chat_template_kwargs)) == ("qwen3-4b", {"enable_thinking": False})
