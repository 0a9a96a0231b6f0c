"""The evaluation report in a real headless Chromium: what its script does, how it looks, what keys do.

Needs Chromium (apt-get install chromium); run with `pytest -m browser`, as .ci/run does.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Page, chromium
from PIL import Image
from report_helpers import drawn

from align_cli.evaluation.report import write_report

pytestmark = pytest.mark.browser

ITEMS = 30
PER_PAGE = 24


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report of two arms and its results. Do not change either."""
    folder = tmp_path_factory.mktemp("evaluation")
    results = drawn(folder, ITEMS)
    write_report(results, folder, folder / "report.html")
    return folder / "report.html", results


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report of four arms with long names, and its results."""
    folder = tmp_path_factory.mktemp("many")
    results = drawn(folder, 6, ("base", "aligned", "softrepa and then some more", "strong@0.5"))
    write_report(results, folder, folder / "report.html")
    return folder / "report.html", results


def ids(page: Page) -> list[str]:
    """Items on view, in order."""
    return page.run(
        "[...document.querySelectorAll('#grid .meta')].map((p) => p.textContent.split(' \\u00b7 ')[0])"
    )


def soon(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it becomes true within that time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def focused(page: Page) -> int:
    """Place of the focused card on the page, -1 for none."""
    return page.run("[...document.querySelectorAll('#grid .open')].indexOf(document.activeElement)")


def columns(page: Page) -> int:
    return page.run("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")


def type_search(page: Page, text: str) -> None:
    page.run("document.getElementById('search').focus()")
    page.run("document.getElementById('search').select()")
    page.call("Input.insertText", text=text)
    page.run("new Promise((done) => setTimeout(done, 300))")


def background(page: Page) -> tuple[int, ...]:
    """The page's own colour, from the pixels of its left edge."""
    return tuple(int(x) for x in page.screenshot()[400, 3])


def gains(results: dict[str, Any], metric: str) -> list[float]:
    return [i["scores"][metric]["aligned"] - i["scores"][metric]["base"] for i in results["items"]]


def test_nothing_is_loaded_and_nothing_complains(browser, example):
    with browser.page(example[0]) as page:
        page.settle()
        assert page.complaints() == []
        assert set(page.loaded()) == {example[0].resolve().as_uri(), "data:"}
        assert page.run("document.querySelectorAll('#grid .card').length") == PER_PAGE
        assert "1 to 24 of 30" in page.run("document.getElementById('status').textContent")
        assert page.run("[...document.images].every((i) => i.naturalWidth === 32)") is True
        assert page.run("document.images.length") == 2 * PER_PAGE


def test_screenshot_shows_the_pictures(browser, example):
    """The pixels on the screen are those of the picture that belongs there."""
    path, results = example
    with browser.page(path) as page:
        page.run("document.querySelector('#grid img').scrollIntoView({block: 'center', behavior: 'instant'})")
        shot = page.screenshot()
        boxes = page.run(
            "[...document.querySelectorAll('#grid img')].slice(0, 2).map((i) => i.getBoundingClientRect())"
            ".map((r) => [r.left, r.top, r.width, r.height])"
        )
    assert shot.std() > 10
    for arm, (x, y, w, h) in zip(("base", "aligned"), boxes, strict=True):
        there = np.asarray(Image.open(path.parent / results["items"][0]["images"][arm]).convert("RGB"))
        at = (np.arange(32) + 0.5) / 32
        seen = shot[np.ix_((y + at * h).astype(int), (x + at * w).astype(int))]
        assert (np.abs(seen.astype(int) - there).max(-1) < 12).mean() > 0.97


def test_headline_and_table_are_drawn(browser, example):
    with browser.page(example[0]) as page:
        shot = page.screenshot()
        box = page.run(
            "(() => { const r = document.querySelector('h1').getBoundingClientRect();"
            " return [r.left, r.top, r.right, r.bottom].map(Math.round); })()"
        )
        ink = shot[box[1] : box[3], box[0] : box[2]].astype(int).sum(-1)
        assert (ink < 250).mean() > 0.02  # letters
        assert page.run("document.querySelectorAll('#summary tbody tr').length") >= 5
        bars = page.run(
            "[...document.querySelectorAll('.chart:not([hidden]) rect')]"
            ".filter((r) => r.getBoundingClientRect().width > 1).length"
        )
        assert bars >= 3


@pytest.mark.parametrize("metric", ["pickscore", "clip", "shapes/all"])
def test_sorting_reorders(browser, example, metric):
    path, results = example
    gain = gains(results, metric)
    names = [item["id"] for item in results["items"]]
    with browser.page(path) as page:
        metrics = json.loads(page.run("document.getElementById('data').textContent"))["metrics"]
        assert ids(page) == names[:PER_PAGE]
        page.choose("metric", str(metrics.index(metric)))
        for order, key in (("gain", lambda i: -gain[i]), ("loss", lambda i: gain[i])):
            page.choose("order", order)
            wanted = [names[i] for i in sorted(range(ITEMS), key=key)]
            assert ids(page) == wanted[:PER_PAGE]
            page.run("document.getElementById('next').click()")
            assert ids(page) == wanted[PER_PAGE:]
        for order, sign in (("high", -1), ("low", 1)):
            page.choose("order", order)
            scores = [sign * item["scores"][metric]["aligned"] for item in results["items"]]
            assert ids(page) == [names[i] for i in sorted(range(ITEMS), key=scores.__getitem__)][:PER_PAGE]
        assert page.complaints() == []


def test_items_without_numbers_come_last(browser, example, tmp_path):
    results = copy.deepcopy(example[1])
    results["items"][0]["scores"]["shapes/all"]["aligned"] = None
    write_report(results, example[0].parent, tmp_path / "report.html")
    with browser.page(tmp_path / "report.html") as page:
        for order in ("gain", "loss", "high", "low"):
            page.choose("order", order)
            page.run("document.getElementById('next').click()")
            assert ids(page)[-1] == "p0000"
            assert "\u2013" in page.run("[...document.querySelectorAll('#grid .card')].at(-1).textContent")


def test_search_and_groups(browser, example):
    path, results = example
    with browser.page(path) as page:
        type_search(page, "RED circle")
        wanted = [i["id"] for i in results["items"] if all(w in i["prompt"] for w in ("red", "circle"))]
        assert 0 < len(wanted) <= PER_PAGE and ids(page) == wanted
        type_search(page, "no such thing")
        assert ids(page) == []
        assert page.run("document.getElementById('status').textContent") == "Nothing matches."
        type_search(page, "p0017")
        assert ids(page) == ["p0017"]
        type_search(page, "")
        page.choose("group", '["Challenge","Quantity"]')
        assert ids(page) == [i["id"] for i in results["items"] if i["groups"]["Challenge"] == "Quantity"]


def test_charts_follow_the_scorer(browser, example):
    shown = "[...document.querySelectorAll('.chart')].filter((c) => !c.hidden).map((c) => c.dataset.metric)"
    with browser.page(example[0]) as page:
        assert page.run(shown) == ["shapes/all"] * 2
        page.choose("chart-metric", "clip")
        assert page.run(shown) == ["clip"] * 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_button(browser, example, scheme):
    with browser.page(example[0], scheme=scheme) as page:
        before = background(page)
        assert (np.mean(before) > 200) == (scheme == "light")
        page.run("document.getElementById('theme').click()")
        after = background(page)
        assert (np.mean(after) > 200) == (scheme == "dark")
        page.emulate(scheme="dark" if scheme == "light" else "light")
        assert background(page) == after
        page.run("document.getElementById('theme').click()")
        assert background(page) == before
        assert page.complaints() == []


def test_keys_in_the_grid(browser, example):
    with browser.page(example[0]) as page:
        page.press("Tab")
        assert page.run("document.activeElement.className") == "skip"
        page.press("Enter")
        assert page.run("document.activeElement.id") == "content"
        page.run("document.querySelector('#grid .open').focus()")
        wide = columns(page)
        assert wide >= 2
        for key, place in (
            ("ArrowRight", 1), ("ArrowDown", 1 + wide), ("ArrowLeft", wide), ("ArrowUp", 0), ("End", 23),
            ("Home", 0),
        ):  # fmt: skip
            page.press(key)
            assert focused(page) == place, key
        assert page.run("document.querySelectorAll('#grid .open[tabindex=\"0\"]').length") == 1
        page.press("PageDown")
        assert ids(page)[0] == "p0024" and focused(page) == 0
        page.press("ArrowLeft")
        assert ids(page)[0] == "p0000" and focused(page) == 23
        page.press("ArrowRight")
        assert ids(page)[0] == "p0024" and focused(page) == 0


def test_focus_can_be_seen(browser, example):
    with browser.page(example[0]) as page:
        page.run("document.querySelector('#grid').scrollIntoView({block: 'start', behavior: 'instant'})")
        before = page.screenshot().astype(int)
        page.run("document.querySelector('#grid .open').focus({preventScroll: true, focusVisible: true})")
        assert (np.abs(page.screenshot() - before).max(-1) > 60).sum() > 500


def test_one_picture_large(browser, example):
    path, results = example
    with browser.page(path) as page:
        page.choose("order", "gain")
        order = ids(page)
        page.run("document.querySelector('#grid .open').focus()")
        page.press("ArrowRight")
        page.press("Enter")
        assert page.run("document.getElementById('viewer').open") is True
        item = next(i for i in results["items"] if i["id"] == order[1])
        text = page.run("document.getElementById('viewer').textContent")
        assert item["prompt"] in text and item["images"]["aligned"] in text and f"seed {item['seed']}" in text
        assert all(metric in text for metric in item["scores"]) and "trained on" in text
        page.press("ArrowRight")
        assert order[2] in page.run("document.getElementById('viewer').textContent")
        page.press("Escape")
        assert page.run("document.getElementById('viewer').open") is False
        assert soon(lambda: focused(page) == 2)  # a dialog tells of its closing a moment later
        assert page.complaints() == []


@pytest.mark.parametrize("which", ["example", "many"])
def test_a_narrow_page_has_no_overflow(browser, which, request):
    path, _ = request.getfixturevalue(which)
    with browser.page(path, width=380, height=800) as page:
        assert page.run("document.documentElement.scrollWidth") == 380
        assert page.run("document.documentElement.clientWidth") == 380
        assert columns(page) == 1
        shot = page.screenshot(whole=True)
        assert shot.shape[1] == 380 and shot.std() > 10
        page.run("document.querySelector('#grid .open').click()")
        assert page.run("document.documentElement.scrollWidth") == 380


def test_many_arms(browser, many):
    path, results = many
    with browser.page(path) as page:
        for a, arm in enumerate(results["arms"][1:], 1):
            page.choose("arm", str(a))
            page.choose("order", "gain")
            gain = [
                item["scores"]["shapes/all"][arm["name"]] - item["scores"]["shapes/all"]["base"]
                for item in results["items"]
            ]
            wanted = sorted(range(len(gain)), key=lambda i: -gain[i])
            assert ids(page) == [f"p{i:04d}" for i in wanted]
        assert page.run("document.querySelectorAll('#grid .card:first-child img').length") >= 4
        assert page.complaints() == []


def test_hostile_texts_do_nothing(browser, example, tmp_path):
    text = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> \\ \u2028 <!--"
    results = copy.deepcopy(example[1])
    results["items"][0] |= {"prompt": text, "id": text, "groups": {text: text}}
    results["words"] = results["notes"] = [text]
    write_report(results, example[0].parent, tmp_path / "report.html")
    with browser.page(tmp_path / "report.html") as page:
        page.run("document.querySelector('#grid .open').click()")
        page.settle()
        assert page.run("typeof window.hacked") == "undefined"
        assert page.run("document.getElementById('viewer-title').textContent") == text
        assert page.run("document.querySelector('.words li').textContent") == text
        assert page.complaints() == []
        assert set(page.loaded()) == {(tmp_path / "report.html").resolve().as_uri(), "data:"}


def test_thousands_of_items_are_shown_page_by_page(browser, example, tmp_path):
    """Only what is on view exists as pictures, however many there are."""
    results, n = copy.deepcopy(example[1]), 3200
    known = results["items"]
    results["items"] = [{**known[i % ITEMS], "id": f"p{i:04d}"} for i in range(n)]
    write_report(results, example[0].parent, tmp_path / "report.html")
    with browser.page(tmp_path / "report.html") as page:
        assert "of 3,200" in page.run("document.getElementById('status').textContent")
        assert "6,400 pictures of 3,200 items" in page.run("document.getElementById('pictures').textContent")
        assert page.run("document.images.length") == 2 * PER_PAGE
        page.run(
            "(() => { const box = document.getElementById('order');"
            " box.value = 'loss'; box.dispatchEvent(new Event('change')); })()"
        )
        assert page.run("document.images.length") == 2 * PER_PAGE
        assert "page 1 of 134" in page.run("document.getElementById('page').textContent")


def test_printing(browser, example):
    with browser.page(example[0], scheme="dark") as page:
        page.emulate(media="print", scheme="dark")
        hidden = "['theme', 'search', 'next'].every((id) => !document.getElementById(id).offsetParent)"
        assert page.run(hidden) is True
        charts = page.run("[...document.querySelectorAll('.chart')].map((c) => c.offsetHeight > 0)")
        assert len(charts) == 10 and all(charts)
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.pdf().startswith(b"%PDF")


def test_without_scripts_all_but_the_grid_is_there(browser, example):
    with browser.page(example[0]) as page:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.call("Page.reload")
        browser.wait("Page.loadEventFired", page.session)
        shown = page.call("DOMSnapshot.captureSnapshot", computedStyles=["display"])["strings"]
        assert any("Scripts are off" in text for text in shown)
        assert any("held-out" in text for text in shown)
