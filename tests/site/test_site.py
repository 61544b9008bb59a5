"""The site as a reader sees it: catalog, notebooks, placement, search, both widths, both themes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ridgeline.course.catalog import NOTEBOOKS
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.synth import preset_config
from tests.site.conftest import ROOT, SCREENSHOTS, WIDTHS

PAGES = (
    "index.html",
    "placement.html",
    "bill.html",
    "measured.html",
    "guides/serve.html",
    "ladder.html",
    "quantization.html",
    "architecture.html",
    "program.html",
    "reference/commands.html",
    "reference/settings.html",
    "reference/engine.html",
    "adr/0005-native-kernels.html",
)


def test_twenty_cards_lead_to_twenty_pages_with_plots(visit):
    visitor = visit()
    page = visitor.open("index.html")
    cards = page.locator(".lesson")
    assert cards.count() == len(NOTEBOOKS) == 20
    links = [link.get_attribute("href") for link in page.locator(".lesson h4 a").all()]
    assert [Path(link).stem for link in links] == [entry.code for entry in NOTEBOOKS]
    for entry, link in zip(NOTEBOOKS, links, strict=True):
        page = visitor.open(link)
        heading = page.locator("h1").first.inner_text()
        assert entry.code in heading and entry.title in heading
        plots = page.locator(".cell_output img, .cell_output svg")
        assert plots.count() >= 1, f"{entry.code} has no plot"
        assert page.evaluate(
            "[...document.querySelectorAll('.cell_output img')].every(i => i.complete && i.naturalWidth > 100)"
        )
        folded = page.locator(".tag_solution details")
        assert folded.count() >= 1, f"{entry.code} has no folded solution"
        assert page.locator(".tag_solution details[open]").count() == 0
        assert not page.locator(".tag_solution pre").first.is_visible()


def test_catalog_is_filtered_by_tag(visit):
    page = visit().open("index.html")
    page.locator(".tag", has_text="TTFT").first.click()
    assert page.locator(".lesson:visible").count() == 1
    assert page.locator("output").inner_text() == "1 of 20"
    page.locator("#tag").fill("")
    assert page.locator(".lesson:visible").count() == 20
    page.locator("#tag").fill("hessian")
    assert page.locator(".lesson:visible h4").all_inner_texts()[0].startswith("GPTQ")
    page = visit().open("index.html#tag=vLLM")
    assert page.locator(".lesson:visible").count() == 1


def test_placement_tells_where_to_start(visit):
    page = visit().open("placement.html")
    assert page.locator(".quiz fieldset").count() == 10
    for question in page.locator(".quiz fieldset").all():
        assert question.locator("label.right").count() == 1
        question.locator("label.right input").check()
        assert question.locator("label.right .why").is_visible()
    assert "10 of 10" in page.locator(".result").inner_text()
    page.locator(".quiz button[type=reset]").click()
    for question in page.locator(".quiz fieldset").all():
        question.locator("label.wrong input").first.check()
        assert question.locator(".why:visible").count() == 2
    assert "0 of 10. Start with INF-00" in page.locator(".result").inner_text()
    assert page.locator(".result li").count() > 10


def test_the_arithmetic_question_is_right(visit):
    page = visit().open("placement.html")
    token_bytes = CacheLayout.bytes_per_token(preset_config("smollm2-135m"), "float16")
    assert f"{token_bytes:,}" in page.locator("fieldset").nth(4).locator("label.right").inner_text()


def test_search_works_without_a_network(visit):
    page = visit().open("search.html?q=chunked")
    page.wait_for_selector("ul.search li a", timeout=10_000)
    assert page.locator("ul.search li").count() >= 3


def test_the_bill_says_what_the_results_say(visit):
    sys.path.insert(0, str(ROOT / "docs/_ext"))
    try:
        from results import rung
    finally:
        sys.path.pop(0)
    text = visit().open("bill.html").locator("article").first.inner_text().replace("\N{NO-BREAK SPACE}", " ")
    for name in ("KV cache", "INT8 weights", "torch.compile"):
        times = rung(name)["times"]
        assert (f"× {times:.2f}" if times < 10 else f"× {times:.1f}") in text
    steps = json.loads((ROOT / "docs/results/ladder.json").read_text())["details"]["steps"]
    assert f"{1e6 / steps[0]['measured']['output_tok_s'][0] / 3600:.0f} hours" in text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_and_keep_their_contrast(visit, width, theme):
    visitor = visit(WIDTHS[width], theme)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    notebooks = [
        f"notebooks/{e.code}.html" for e in NOTEBOOKS if (ROOT / f"notebooks/{e.code}.ipynb").exists()
    ]
    for path in (*PAGES, *notebooks):
        page = visitor.open(path)
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{path} is {wide} pixels too wide at {WIDTHS[width]}"
        colours = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert contrast(*colours) > 7, f"{path}: {colours}"
        name = path.removesuffix(".html").replace("/", "-")
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{theme}.png", full_page=path in PAGES[:4])


def contrast(*colours: str) -> float:
    """WCAG 2's ratio of two CSS colours."""
    light = []
    for colour in colours:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)
