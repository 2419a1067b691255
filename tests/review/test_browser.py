"""The review in a real browser: keys, marks, edits, several tabs, labels, and a narrow window."""

from __future__ import annotations

import re
import shutil
import threading

import pytest
import uvicorn

from reverie_jax.review.app import make_app
from tests.serve.helpers import SECONDS, until

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=1000 * SECONDS)
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def url(world):
    config = uvicorn.Config(make_app(world.review()), port=0, log_config=None, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def tab(browser, url):
    """Return a function that opens the page; nothing may be on the console at the end."""
    context, said = browser.new_context(), []
    context.set_default_timeout(1000 * SECONDS)

    def open_page(query: str = "", **size: int):
        page = context.new_page()
        page.set_viewport_size({"width": 1280, "height": 900} | size)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url + query)
        return page

    yield open_page
    context.close()
    assert said == []


def says(page, words: str) -> None:
    playwright.expect(page.get_by_role("status")).to_contain_text(words)


def test_a_reviewer_needs_no_mouse(tab, world):
    page = tab("?verdict=accepted")
    for key, words in (("j", ""), ("g", "Marked good"), ("j", ""), ("b", "Marked bad"), ("b", "Mark taken back")):
        page.keyboard.press(key)
        says(page, words)
    page.keyboard.press("e")
    page.keyboard.press("Control+A")
    page.keyboard.type("Is it gjb?")  # keys that mean something elsewhere
    page.keyboard.press("Control+Enter")
    says(page, "Saved")
    playwright.expect(page.get_by_label("Sample 2", exact=True)).to_contain_text("Is it gjb?")
    page.keyboard.press("k")
    page.keyboard.press("e")
    page.keyboard.type("not kept")
    page.keyboard.press("Escape")
    for _ in range(8):
        page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "sample-11"
    page.keyboard.press("j")
    says(page, "last sample")
    rows = [(line["row"], line.get("mark"), line.get("edits")) for line in world.lines()]
    first, second = world.digests[:2]
    assert rows == [
        (first, "good", None),
        (second, "bad", None),
        (second, "", None),
        (second, None, {"question": "Is it gjb?"}),
    ]


def test_keys_lead_from_page_to_page(tab):
    page = tab()
    for _ in range(11):
        page.keyboard.press("j")
    playwright.expect(page.locator("#sample-11")).to_be_focused()
    page.keyboard.press("k")
    playwright.expect(page.locator("#sample-10")).to_be_focused()


def test_two_tabs_at_once(tab, world):
    one, two = tab(), tab()
    one.get_by_label("Mark of sample 1", exact=True).get_by_role("button", name="Good").click()
    two.get_by_label("Mark of sample 2", exact=True).get_by_role("button", name="Bad").click()
    sample = two.get_by_label(re.compile("^Sample 1$"))
    sample.get_by_role("button", name="Edit, note").click()
    sample.get_by_role("textbox", name="note").fill("<b>seen</b>")
    sample.get_by_role("button", name="Save").click()
    says(two, "Saved")
    playwright.expect(two.get_by_label("Sample 1, marked good", exact=True)).to_contain_text("Note: <b>seen</b>")
    found = [(line["row"], line.get("mark"), line.get("note")) for line in world.lines()]
    first, second = world.digests[:2]
    assert sorted(found, key=str) == sorted(
        [(first, "good", None), (second, "bad", None), (first, None, "<b>seen</b>")], key=str
    )


def test_what_cannot_be_saved_is_said_and_kept(tab):
    page = tab()
    sample = page.get_by_label("Sample 1", exact=True)
    sample.get_by_role("button", name="Edit, note").click()
    answer = sample.get_by_role("textbox", name="right answer")
    answer.fill("")
    sample.get_by_role("textbox", name="note").fill("typed")
    page.route("**/marks/**", lambda route: route.fulfill(status=200, content_type="text/html", body="<p>nonsense</p>"))
    sample.get_by_role("button", name="Save").click()
    says(page, "Not saved")
    assert sample.get_by_role("textbox", name="note").input_value() == "typed"
    page.unroute("**/marks/**")
    answer.fill("No")
    sample.get_by_role("button", name="Save").click()
    says(page, "Saved")
    playwright.expect(sample).to_contain_text("Note: typed")


@pytest.mark.parametrize("width", [1280, 360])
def test_everything_has_a_label_and_fits_the_window(tab, width):
    page = tab(width=width)
    page.keyboard.press("j")
    page.keyboard.press("e")
    nameless = """[...document.querySelectorAll("input, select, textarea, button, img, article, nav, form")].filter(
        (one) => !(one.ariaLabel || one.labels?.length || one.textContent.trim() || one.alt))"""
    assert page.evaluate(f"{nameless}.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").count() == 1
    assert page.evaluate("[...document.images].slice(0, 3).every((image) => image.naturalWidth > 0)")
