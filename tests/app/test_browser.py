"""A real browser on the pocket base: teach, see it in the library, pick it, draw it; and stop in the middle."""

import pytest
from playwright.sync_api import expect, sync_playwright

from app.interface import build, launch_options
from app.session import Session
from app.tabs.teach import example_concepts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The copy keyword is deprecated")]  # gradio's pandas

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PATIENCE = 300_000  # milliseconds, for slow machines
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def session(tmp_path):
    return Session(library=tmp_path / "library")


@pytest.fixture
def tab(chromium, session):
    """The open page; at the end, that nothing was asked of another machine and the console is clean."""
    served = build(session)
    served.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    foreign, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(PATIENCE)
        tab.on("request", lambda r: foreign.append(r.url) if r.url.startswith("http") else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(served.local_url)
        expect(tab.locator("#base")).to_contain_text("ready")
        yield tab
        browser.close()
    served.close()
    assert [url for url in foreign if not url.startswith(served.local_url)] == [] and errors == []


def open_lesson(tab, usual: int, steps: int) -> None:
    tab.get_by_role("tab", name="Teach").click()
    tab.get_by_role("button", name="robot", exact=True).click()
    count = len(list(example_concepts()["robot"].glob("*.png")))
    expect(tab.locator("#pictures img")).to_have_count(count)
    tab.locator("#teach-settings button").first.click()
    tab.locator("label", has_text="Quick").click()
    expect(tab.locator("#steps input")).to_have_value(str(round(0.4 * usual)))
    tab.locator("#steps input").fill(str(steps))
    tab.locator("#steps input").blur()


def test_teach_then_pick_then_draw(tab, session):
    expect(tab.get_by_text("No concepts yet")).to_be_visible()
    tab.locator("#teach-first").click()
    open_lesson(tab, session.usual()[0], 4)
    tab.locator("#teach").click()
    expect(tab.locator("#progress")).to_contain_text("Learned in 4 steps")
    expect(tab.locator("#previews img")).to_have_count(4)
    expect(tab.locator("#loss polyline")).to_have_count(2)

    tab.get_by_role("tab", name="Library").click()
    card = tab.locator(".card", has_text="<robot>")
    expect(card).to_contain_text("pocket") and expect(card.locator("img")).to_be_visible()

    tab.get_by_role("tab", name="Draw").click()
    tab.locator("#picks label", has_text="<robot>").click()
    expect(tab.locator("#verdict")).to_contain_text("Compatible")
    expect(tab.locator("#prompt textarea")).to_have_value("a <robot> on a blue background")
    tab.get_by_role("button", name="+ <robot>").click()
    expect(tab.locator("#prompt textarea")).to_have_value("a <robot> on a blue background <robot>")
    tab.get_by_label("number input for Strength of robot").fill("0.5")
    tab.keyboard.press("Tab")
    tab.wait_for_timeout(500)
    tab.locator("#draw").click()
    expect(tab.locator("#caption")).to_contain_text("<robot> at 0.5")
    drawn = tab.locator("#stage img")
    expect(drawn).to_be_visible()
    assert drawn.evaluate("image => image.naturalWidth") == 64

    tab.locator("#take button").first.click()
    tab.locator("#fuse").click()
    expect(tab.locator("#fused-file")).to_contain_text("robot")


def test_stop_in_the_middle_keeps_the_concept(tab, session):
    open_lesson(tab, session.usual()[0], 5000)
    tab.locator("#teach").click()
    expect(tab.locator("#progress")).to_contain_text("Step 2")
    tab.reload()  # a page that comes back joins the running training
    tab.get_by_role("tab", name="Teach").click()
    expect(tab.locator("#progress")).to_contain_text("of 5000")
    tab.locator("#stop-teaching").click()
    expect(tab.locator("#progress")).to_contain_text("Stopped after")
    expect(tab.locator("#teach")).to_be_enabled()
    tab.locator("#use").click()
    expect(tab.locator("#prompt textarea")).to_have_value("a <robot> on a blue background")
    assert session.entries().keys() == {"robot"}


def test_an_error_is_a_notice_in_one_sentence(tab):
    tab.locator("#draw").click()
    notice = tab.get_by_test_id("toast-body")
    expect(notice).to_contain_text("Write a prompt first: what should the picture show?")
    expect(tab.locator("#draw")).to_be_enabled()
    tab.get_by_role("tab", name="Teach").click()
    tab.locator("#token input, #token textarea").fill("<rex>")
    tab.locator("#noun input, #noun textarea").fill("dog")
    tab.locator("#teach").click()
    expect(tab.get_by_text("No pictures cannot be learned from")).to_be_visible()
    tab.locator("#base input").fill("/nowhere")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("'/nowhere' could not be opened")).to_be_visible()
    expect(tab.locator("#base input")).to_have_value("pocket")


def test_a_drawing_can_be_stopped(tab):
    tab.locator("#prompt textarea").fill("a dog")
    tab.locator("#settings button").first.click()
    tab.get_by_label("number input for Pictures").fill("8")
    tab.get_by_label("number input for Steps").fill("100")
    tab.locator("#draw").click()
    expect(tab.locator("#stage img")).to_be_visible()
    tab.locator("#stop-drawing").click()
    expect(tab.locator("#caption")).to_contain_text("Stopped")
    tab.get_by_label("number input for Pictures").fill("1")
    tab.get_by_label("number input for Steps").fill("3")
    tab.keyboard.press("Tab")
    tab.locator("#draw").click()
    expect(tab.locator("#caption")).to_contain_text("3 steps")
