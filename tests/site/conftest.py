"""The site as `make docs` built it, over HTTP on this machine, in Debian's Chromium."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build/site"
SCREENSHOTS = ROOT / "build/screenshots"
WIDTHS = {"desktop": 1440, "phone": 390}


@pytest.fixture(scope="session")
def site() -> Path:
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make check-docs builds it and runs these tests")
    return SITE


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium, or CHROMIUM=/path/to/it")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright here: pip install -e '.[docs]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@dataclass
class Visitor:
    """A page of the browser that remembers what went wrong on it."""

    page: Any
    address: str
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on(
            "console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text)
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url}"))
        self.page.on("request", self._is_local)

    def _is_local(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"asked the network for {request.url}")

    def open(self, path: str) -> Any:
        answer = self.page.goto(f"{self.address}/{path}", wait_until="load")
        assert answer.status == 200, f"{path}: {answer.status}"
        return self.page


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """visit(width=390, theme="dark") -> Visitor; what went wrong on any page fails the test."""
    visitors: list[Visitor] = []

    def new(width: int = 1440, theme: str = "light") -> Visitor:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        visitors.append(Visitor(page, address))
        return visitors[-1]

    yield new
    wrong = [text for visitor in visitors for text in visitor.wrong]
    for visitor in visitors:
        visitor.page.close()
    assert not wrong, "\n".join(wrong)
