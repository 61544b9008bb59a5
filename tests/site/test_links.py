"""Every link of the site leads somewhere, and no page needs the network."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The ids of a page, what it links to, what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)
                if (tag, name) in LOADED:
                    self.loaded.append(value)


@cache
def page(path: Path) -> Page:
    return Page(path)


def test_links_lead_somewhere(site):
    broken = []
    pages = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    for path in pages:
        for target in page(path).links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            where = f"{path.relative_to(site)}: {target}"
            if not there.exists():
                broken.append(where)
            elif there.suffix == ".html" and parts.fragment and "=" not in parts.fragment:
                broken += [where] if unquote(parts.fragment) not in page(there).ids else []
    assert len(pages) > 40
    assert not broken, "\n".join(broken)


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for target in page(path).loaded:
            assert not urlsplit(target).netloc, f"{path.relative_to(site)} loads {target}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text()), path


def test_links_to_elsewhere_are_https(site):
    for path in site.rglob("*.html"):
        for target in page(path).links:
            if urlsplit(target).netloc:
                assert target.startswith(("https://", "http://127.0.0.1")), f"{path.name}: {target}"
