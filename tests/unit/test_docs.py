"""Names that the documentation uses exist in the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_names_in_the_request_page_exist():
    text = (ROOT / "docs/request.md").read_text()
    code = "\n".join(p.read_text() for p in (ROOT / "ridgeline").rglob("*.py"))
    names = set(re.findall(r"`([A-Za-z_][\w.]*)`", text))
    assert len(names) > 25
    for name in names:
        last = name.split(".")[-1]
        assert (
            re.search(rf"\b(class|def) {last}\b|\b{last}\b *[:=]", code)
            or (ROOT / "ridgeline" / name).exists()
            or (ROOT / name).exists()
        ), f"docs/request.md names {name}, which is not in the code"


def test_relative_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_run_in_the_readme_is_the_committed_one():
    assert (ROOT / "docs/results/demo.txt").read_text().rstrip() in (ROOT / "README.md").read_text()
