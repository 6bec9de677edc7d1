"""Shared fixtures: a served app on a scripted pair, a headless browser, a fresh page; knows no single test."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.stage import Stage

BROWSER_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@dataclass
class Served:
    """An app being served."""

    url: str
    app: Any
    stage: Stage | None

    def close(self) -> None:
        self.app.page.close(verbose=False)


def serve(engine: Any, stage: Stage | None = None, **build_options: Any) -> Served:
    """Serve an app on a free port of this machine, its pair loading behind it."""
    from app.ui import build, launch_options

    app = build(engine, **build_options)
    _, url, _ = app.page.launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True, inbrowser=False,
        **launch_options(),
    )  # fmt: skip
    return Served(url, app, stage)


def serve_stage(stage: Stage, *, load: bool = True, **build_options: Any) -> Served:
    from app.engine import Choice, Engine

    engine = Engine(load=stage.load, decode=stage.decode)
    if load:
        engine.load(Choice())
        assert engine.wait(20)
    return serve(engine, stage, **build_options)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One scripted app for all tests that leave it as it was."""
    served = serve_stage(Stage())
    yield served
    served.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(BROWSER_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Any]:
    """A fresh visitor on the scripted app, 1440 px wide. Fails the test on a script error."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(8_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served.url)
    page.wait_for_selector("#dfc-composer textarea")
    yield page
    context.close()
    assert errors == []
