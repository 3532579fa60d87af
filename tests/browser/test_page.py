"""The page in headless Chromium: quiet, offline, and within reach of a keyboard."""

import json
import os
import shutil

import pytest

from theodolite.survey.run import survey

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    from theodolite.core.builtin import builtin

    folder = tmp_path_factory.mktemp("atlas")
    survey(builtin("digits"), folder, code="subject = theodolite.subject('digits')")
    return folder


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(atlas, browser):
    pages = []

    def open_page(**options):
        context = browser.new_context(**options)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((atlas / "index.html").as_uri())
        pages.append(context)
        return page

    yield open_page
    for context in pages:
        context.close()


def slugs(atlas):
    return sorted(path.stem for path in (atlas / "findings").glob("*.json"))


def draw_all(page, count):
    for place in range(count):
        page.locator(".plot").nth(place).scroll_into_view_if_needed()
    wait_for_figures(page, count)


def wait_for_figures(page, count):
    page.locator(".plot[data-drawn]").nth(count - 1).wait_for()


@pytest.mark.parametrize("options", [
    {"viewport": {"width": 1280, "height": 900}},
    {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "device_scale_factor": 2},
    {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
], ids=["desk", "phone", "dark"])  # fmt: skip
def test_every_figure_is_drawn_without_a_word_on_the_console_or_a_request(opened, atlas, options, tmp_path):
    page = opened(**options)
    found = slugs(atlas)
    draw_all(page, len(found))
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in page.asked if url.startswith("file:")]) == 1
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= options["viewport"]["width"], "the page is wider than the screen"
    shots = os.environ.get("THEODOLITE_SCREENSHOTS")
    page.screenshot(path=f"{shots or tmp_path}/{'-'.join(map(str, options['viewport'].values()))}"
                    f"{options.get('color_scheme', '')}.png", full_page=True)  # fmt: skip
    for slug in found:
        headline = json.loads((atlas / "findings" / f"{slug}.json").read_text())["headline"]
        assert page.locator(f"#{slug} h3").inner_text() == headline


def test_every_card_is_reached_with_the_tab_key(opened, atlas):
    page = opened(viewport={"width": 1280, "height": 900})
    reached = set()
    for _ in range(400):
        page.keyboard.press("Tab")
        place = page.evaluate("document.activeElement.tagName === 'ARTICLE' ? document.activeElement.id : ''")
        reached |= {place} - {""}
        if reached == set(slugs(atlas)):
            break
    assert reached == set(slugs(atlas))


def test_a_headline_leads_to_its_card(opened, atlas):
    page = opened(viewport={"width": 1280, "height": 900})
    first = page.locator("#look li a").first
    target = first.get_attribute("href").lstrip("#")
    first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == f"#{target}"


def test_it_prints(opened, atlas):
    page = opened(viewport={"width": 1280, "height": 900})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    wait_for_figures(page, len(slugs(atlas)))
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert page.said == []
