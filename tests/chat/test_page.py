"""The page as a user meets it: the command in a process of its own, and Chromium."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import reverie_jax
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.preferences import find_pairs
from reverie_jax.data.reflection import WHY, WHY_WRONG
from reverie_jax.data.sources import ReadLog
from reverie_jax.models.checkpoints.write_adapters import write_peft
from tests.chat.conftest import adapted
from tests.chat.test_session import IMAGE_FILE, expected

pytestmark = pytest.mark.slow
pytest.importorskip("gradio")
browsers = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on the path", allow_module_level=True)

MILLISECONDS = 120_000
"""Until a test gives up; nothing depends on it."""
DESCRIBE, CUP = "Describe the image.", "Is there a cup in the image?"
browsers.expect.set_options(timeout=MILLISECONDS)
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@contextlib.contextmanager
def serving(folder, *words, **environment):
    """Yield the address of a page whose feedback goes to a folder."""
    command = [sys.executable, "-m", "reverie_jax.cli", "chat", "scenes-base", "--dtype", "float32", "--port", "0"]
    command += ["--max-new-tokens", "24", "--feedback", str(folder), *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as child:
        try:
            line = child.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line + child.stderr.read()
            yield found[0]
        finally:
            child.kill()


@pytest.fixture(scope="module")
def chromium():
    with browsers.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def window(chromium, address, size="wide"):
    """Yield a window that shows the page. Nothing may fail in it, and nothing may be asked of other servers."""
    width, height = SIZES[size]
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(MILLISECONDS)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else wrong.append(request.url),
    )
    page.goto(address)
    page.get_by_label("Question").wait_for()
    yield page
    page.close()
    assert wrong == []


def answers(page, number=1):
    return page.locator(f"#chat-{number} [data-testid=bot]")


def press(page, name, count, number=1):
    """Press a button; return the answer when the status no longer says that it is being decoded."""
    page.get_by_role("button", name=name, exact=True).click()
    return answer(page, count, number)


def answer(page, count, number=1):
    browsers.expect(answers(page, number)).to_have_count(count)
    browsers.expect(page.locator("#status")).to_have_text(re.compile(r"^\s*(Cut: .*)?$"))
    return answers(page, number).last.inner_text().strip() if count else ""


def upload(page, folder):
    (folder / "scene.png").write_bytes(IMAGE_FILE)
    page.locator("#picture input[type=file]").first.set_input_files(folder / "scene.png")
    page.get_by_alt_text("The picture of this chat").wait_for()


def pairs_of(folder):
    with read_mixture([MixtureEntry(file=folder / "pairs.jsonl")], ReadLog()) as mixture:
        (record,) = mixture
    pairs = find_pairs("a", record.conversations)
    return record.image, [tuple(side.turns[-1].text for side in pair) for pair in pairs]


def test_a_chat(chromium, models, tmp_path):
    """Upload, ask, explain, why not, retry, correct: the engine's answers, and the pair in the file."""
    model, folder = models[0], tmp_path / "feedback"
    with serving(folder) as address, window(chromium, address) as page:
        upload(page, tmp_path)
        page.evaluate(
            """() => {
                window.seen = [];
                const chat = document.getElementById("chat-1");
                const look = () => seen.push(chat.querySelector("[data-testid=bot]")?.innerText ?? "");
                new MutationObserver(look).observe(chat, {childList: true, subtree: true, characterData: true});
            }"""
        )
        page.get_by_label("Question").fill(DESCRIBE)
        page.keyboard.press("Enter")
        first = answer(page, 1)
        assert first == expected(model, [DESCRIBE])
        parts = {text.strip() for text in page.evaluate("seen")} - {"", first}
        assert any(first.startswith(part) for part in parts)  # it was streamed
        assert page.get_by_label("Question").input_value() == ""
        assert press(page, "Explain", 2) == expected(model, [DESCRIBE, first, WHY])
        page.get_by_label("Why not …? The answer that you expected").fill("A cat")
        assert press(page, "Why not?", 3) == expected(model, [DESCRIBE, first, WHY_WRONG.format(answer="A cat")])
        assert press(page, "Retry", 3) == expected(model, [DESCRIBE, first, WHY_WRONG.format(answer="A cat")])
        press(page, "New chat", 0)
        page.get_by_label("Question").fill(CUP)
        why = press(page, "Ask, then explain", 2)
        rejected = expected(model, [CUP])
        assert why == expected(model, [CUP, rejected, WHY])
        press(page, "New chat", 0)
        page.get_by_label("Question").fill(DESCRIBE)
        press(page, "Ask", 1)
        page.get_by_text("Feedback on the last answer").click()
        assert page.get_by_label("Corrected answer").input_value() == first
        page.get_by_label("Corrected answer").fill("A <b>cup</b>.")
        page.get_by_role("button", name="Keep the correction").click()
        browsers.expect(page.locator("#status")).to_contain_text("pairs.jsonl")
        assert pairs_of(folder) == (IMAGE_FILE, [("A <b>cup</b>.", first)])


def test_an_adapter_beside_its_base_model(chromium, models, tmp_path):
    """The same prompt, the difference marked, and the better answer in the file."""
    adapter, folder = tmp_path / "adapter", tmp_path / "feedback"
    adapter.mkdir()
    model, _ = reverie_jax.load_model("scenes-base", dtype="float32")
    write_peft(adapted(model), adapter, base_model="scenes-base", projector=False)
    words = ["--adapter", adapter, "--compare-with", "scenes-base"]
    with serving(folder, *words) as address, window(chromium, address) as page:
        upload(page, tmp_path)
        page.get_by_label("Question").fill(DESCRIBE)
        page.keyboard.press("Enter")
        shown = [answer(page, 1, number) for number in (1, 2)]
        assert shown == [expected(model, [DESCRIBE]) for model in reversed(models)]
        marked = page.locator("mark").all_inner_texts()
        assert marked
        assert all(any(text.strip() in one for one in shown) for text in marked)
        page.get_by_text("Feedback on the last answer").click()
        page.get_by_role("button", name="Right is better").click()
        browsers.expect(page.locator("#status")).to_contain_text("pairs.jsonl")
        assert pairs_of(folder)[1] == [tuple(reversed(shown))]


def test_mistakes_stop_and_what_models_and_users_write(chromium, tmp_path):
    with serving(tmp_path / "feedback") as address, window(chromium, address) as page:
        page.get_by_role("button", name="Explain", exact=True).click()
        browsers.expect(page.locator("#status")).to_contain_text("no answer yet")
        page.get_by_label("Question").fill("<img src=x onerror=alert(1)> **two** stars")
        press(page, "Ask", 1)
        # Neither HTML nor Markdown.
        browsers.expect(page.locator("#chat-1 [data-testid=user]")).to_have_text(
            "<img src=x onerror=alert(1)> **two** stars"
        )
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Scene 1").click()
        browsers.expect(answers(page)).to_have_count(0)
        # The picture is below its label.
        picture = page.get_by_alt_text("The picture of this chat")
        picture.wait_for()
        label = page.locator("#picture [data-testid=block-label]").bounding_box()
        assert picture.bounding_box()["y"] >= label["y"] + label["height"]
        page.get_by_label("Question").fill(CUP)
        assert press(page, "Ask", 1)


@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_has_labels_and_works_from_the_keyboard(chromium, tmp_path, size):
    with serving(tmp_path / "feedback") as address, window(chromium, address, size) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.get_by_text("Decoding", exact=True).click()
        page.get_by_text("Feedback on the last answer").click()
        nameless = re.findall(
            r"- (?:button|textbox|slider|spinbutton|radio)$", page.locator("body").aria_snapshot(), re.M
        )
        assert nameless == []
        assert page.locator("#status").get_attribute("aria-live") == "polite"
        page.get_by_label("Question").focus()
        page.keyboard.type(CUP)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.innerText") == "Ask"
        page.keyboard.press("Space")
        assert answer(page, 1)
        if os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{os.environ['SCREENSHOTS']}/{size}.png", full_page=True)


def test_a_password_is_asked_for_where_others_can_reach_it(chromium, tmp_path):
    with serving(tmp_path / "feedback", REVERIE_API_KEY="secret") as address:
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}config")
        assert error.value.code == 401
        page = chromium.new_page()
        page.goto(address)
        page.get_by_label("username").fill("reverie")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name="Login").click()
        page.get_by_label("Question").wait_for(timeout=MILLISECONDS)
        page.close()
