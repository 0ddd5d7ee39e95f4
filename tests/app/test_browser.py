"""A real browser on the pocket base: teach, combine, draw with two regions, export; stop, reload, search, delete."""

import os
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

import fusion
from fusion.config import read_base_defaults
from fusion_studio.distillation_jobs import THOROUGHNESS
from fusion_studio.interface import build
from fusion_studio.session import Session
from fusion_studio.tabs.teach import example_concepts
from fusion_studio.theme import launch_options

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The copy keyword is deprecated")]  # gradio's pandas

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
PATIENCE = 300_000  # milliseconds, for slow machines
STEPS = os.environ.get("STUDIO_STEPS", "4")  # of each training; more of them make better pictures of the studio
PICTURES = os.environ.get("STUDIO_PICTURES")  # a folder for them
expect.set_options(timeout=PATIENCE)


def quick_defaults(base, table):
    """The base's own, with fewer denoising steps."""
    return read_base_defaults(base, table) | ({"steps": 6} if table == "generation" else {})


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not PICTURES:
        monkeypatch.setattr("fusion.training.quiet_loss.NOISE_LEVELS", 1)
        monkeypatch.setattr("fusion.models.pipelines.read_base_defaults", quick_defaults)
    return Session(library="out")


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


def photograph(tab, name: str) -> None:
    if PICTURES:
        tab.wait_for_timeout(600)
        tab.screenshot(path=str(Path(PICTURES) / f"studio-{name}.png"))


def open_tab(tab, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def fill_lesson(tab, name: str, steps: str) -> None:
    tab.get_by_role("button", name=name, exact=True).click()
    expect(tab.locator("#pictures img")).to_have_count(len(list(example_concepts()[name].glob("*.png"))))
    expect(tab.locator("#token input, #token textarea")).to_have_value(f"<{name}>")
    if not tab.locator("#all-settings [name=max_train_steps]").is_visible():
        tab.locator("#teach-settings button").first.click()
    tab.locator("#all-settings [name=max_train_steps]").fill(steps)


def make_one_lora(tab) -> None:
    """From the picked concepts to the files and what to do with them."""
    tab.locator("#one-lora-part button").first.click()
    tab.locator("#one-lora-part").get_by_label("Quick").check()
    tab.locator("#make-lora").click()
    expect(tab.locator("#lora-state")).to_contain_text("Learned in")
    expect(tab.locator("#lora-state")).to_contain_text("other prompts change by")
    expect(tab.locator("#lora-files a")).to_have_count(3)  # the LoRA and two embeddings
    photograph(tab, "one-lora")
    tab.locator("#program").get_by_label("diffusers").check()
    expect(tab.locator("#guide-text textarea")).to_have_value(re.compile("load_lora_weights"))
    with tab.expect_download() as download:
        tab.locator("#lora-files a").first.click()
    assert download.value.path().stat().st_size > 10_000


def test_teach_combine_draw_two_regions_and_export(tab, session, monkeypatch):
    if not PICTURES:
        monkeypatch.setitem(THOROUGHNESS, "quick", 0.005)
        for name, count in (("HELD_OUT", 8), ("SCALE_PROMPTS", 4), ("START_PROMPTS", 32)):
            monkeypatch.setattr(f"fusion.distillation.loop.{name}", count)
    expect(tab.locator("#prompt textarea")).to_have_value(fusion.base_example().prompt)  # something to draw at once
    tab.locator("#teach-first").click()
    for name in ("robot", "octopus"):  # the second waits for the first
        fill_lesson(tab, name, STEPS)
        tab.locator("#teach").click()
        expect(tab.locator("#pictures img")).to_have_count(0)
        expect(tab.locator("#teach-cli textarea")).to_have_value(
            re.compile(rf"fusion train .*{name}.*--preset standard", re.DOTALL)
        )
    expect(tab.locator("#progress")).to_contain_text("<octopus>")
    expect(tab.locator("#progress")).to_contain_text(f"Learned in {STEPS} steps")
    expect(tab.locator("#loss polyline")).to_have_count(2)
    expect(tab.locator("#result img")).to_have_count(5)
    tab.locator("#teach-settings button").first.click()
    photograph(tab, "teach")

    open_tab(tab, "Combine")
    for name in ("robot", "octopus"):
        tab.locator("#combine-picks .chip", has_text=name).click()
    expect(tab.locator("#combined .verdict")).to_contain_text("Compatible")
    expect(tab.locator("#combined .heat tbody tr")).to_have_count(2)
    tab.locator("#method input").click()
    tab.get_by_role("option", name="average: the mean").click()
    expect(tab.locator("#combined")).to_contain_text("average: the mean")
    tab.get_by_label("Strength of <octopus>").fill("0.9")
    photograph(tab, "combine")
    tab.locator("#combine-draw").click()

    prompt = "a <robot> on the left and a <octopus> on the right on a red background"
    expect(tab.locator("#prompt textarea")).to_have_value(prompt)
    expect(tab.get_by_label("Strength of <octopus>").first).to_have_value("0.9")
    tab.locator("#regions-part button").first.click()
    tab.get_by_role("button", name="Add left half").click()
    expect(tab.get_by_label("Region 1: prompt")).to_have_value("<robot>")
    plane = tab.locator(".plane").bounding_box()
    tab.mouse.move(plane["x"] + 0.55 * plane["width"], plane["y"] + 5)
    tab.mouse.down()
    tab.mouse.move(plane["x"] + 0.97 * plane["width"], plane["y"] + 0.95 * plane["height"], steps=4)
    tab.mouse.up()
    expect(tab.get_by_label("Region 2: prompt")).to_have_value("<octopus>")
    tab.locator("#draw").click()
    expect(tab.locator("#caption")).to_contain_text("2 regions: a <robot> on the left and a octopus on the right")
    expect(tab.locator("#caption")).to_contain_text("<octopus> at 0.9")
    assert tab.locator("#draw-cli textarea").input_value().count("--region") == 2
    side = session.resolution()
    assert tab.locator("#stage img").evaluate("image => image.naturalWidth") == side
    photograph(tab, "draw")
    tab.locator("#repeat").click()
    expect(tab.locator("#wall img")).to_have_count(2)
    first, second = (Path(entry).read_bytes() for entry in sorted(map(str, session.folder.glob("a-robot*.png"))))
    assert first == second

    open_tab(tab, "Combine")
    tab.locator("#export-part button").first.click()
    tab.get_by_role("radio", name="kohya").check()
    tab.locator("#export").click()
    expect(tab.locator("#files")).to_contain_text("kohya")
    expect(tab.locator("#combine-notes")).to_contain_text("A plain LoRA cannot be gated")
    with tab.expect_download() as download:
        tab.locator("#files a").first.click()
    assert download.value.path().stat().st_size > 10_000
    make_one_lora(tab)
    open_tab(tab, "Library")
    expect(tab.locator(".card")).to_have_count(3)  # the one LoRA, too
    expect(tab.locator("#slices")).to_contain_text("directions are free")
    photograph(tab, "library")


def test_stop_in_the_middle_keeps_the_concept(tab, session):
    open_tab(tab, "Teach")
    fill_lesson(tab, "robot", "5000")
    tab.locator("#teach").click()
    expect(tab.locator("#progress")).to_contain_text("Step 2")
    tab.reload()  # a page that comes back joins the running training
    open_tab(tab, "Teach")
    expect(tab.locator("#progress")).to_contain_text("of 5000")
    tab.locator("#pause").click()
    expect(tab.locator("#progress")).to_contain_text("paused")
    open_tab(tab, "Draw")  # nothing is blocked meanwhile
    expect(tab.locator("#prompt textarea")).not_to_have_value("")
    tab.locator("#draw").click()
    expect(tab.locator("#caption")).to_contain_text("seed")
    open_tab(tab, "Teach")
    tab.locator("#stop-teaching").click()
    expect(tab.locator("#progress")).to_contain_text("Stopped after")
    tab.locator("#use").click()
    expect(tab.locator("#prompt textarea")).to_have_value("a <robot> on a blue background")
    tab.get_by_role("button", name="+ <robot>").click()
    expect(tab.locator("#prompt textarea")).to_have_value("a <robot> on a blue background <robot>")
    assert session.entries().keys() == {"robot"}
    open_tab(tab, "Library")
    tab.locator(".card", has_text="<robot>").click()
    expect(tab.locator("#about")).to_contain_text("seed 0")
    tab.locator("#delete").click()
    tab.locator("#keep").click()
    expect(tab.locator("#yes-delete")).to_be_hidden()
    tab.locator("#delete").click()
    tab.locator("#yes-delete").click()
    expect(tab.locator("#cards")).to_contain_text("The library is empty")
    assert session.entries() == {}


def test_errors_are_notices_and_a_drawing_can_be_stopped(tab):
    expect(tab.locator("#prompt textarea")).not_to_have_value("")
    tab.locator("#prompt textarea").fill(" ")
    tab.locator("#draw").click()
    notice = tab.get_by_test_id("toast-body")
    expect(notice).to_contain_text("Write a prompt first: what should the picture show?")
    expect(tab.locator("#draw")).to_be_enabled()
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
    open_tab(tab, "Teach")
    tab.locator("#token input, #token textarea").fill("<rex>")
    tab.locator("#noun input, #noun textarea").fill("dog")
    tab.locator("#teach").click()
    expect(tab.get_by_text("No pictures cannot be learned from")).to_be_visible()
    tab.locator("#base input").fill("/nowhere")
    tab.keyboard.press("Enter")
    expect(tab.get_by_text("'/nowhere' could not be opened")).to_be_visible()
    expect(tab.locator("#base input")).to_have_value("pocket")


def drag(tab, start, end, **button) -> None:
    """Across the plane of regions, from one place to another, in shares of it."""
    tab.locator(".plane").scroll_into_view_if_needed()
    plane = tab.locator(".plane").bounding_box()
    (x, y), (u, v) = ((plane["x"] + a * plane["width"], plane["y"] + b * plane["height"]) for a, b in (start, end))
    tab.mouse.move(x, y)
    tab.mouse.down(**button)
    tab.mouse.move(u, v, steps=4)
    tab.mouse.up(**button)


def test_what_is_painted_can_be_erased_taken_back_and_cleared(tab):
    canvas, tells = tab.locator(".plane canvas"), tab.locator(".status")

    def covered() -> int:
        """Pixels of the mask that are painted."""
        tab.wait_for_timeout(200)
        count = "data => data.filter((_, i) => i % 4 === 3).reduce((n, alpha) => n + (alpha > 127), 0)"
        return canvas.evaluate(f"c => ({count})(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")

    tab.locator("#regions-part button").first.click()
    tab.get_by_role("button", name="Erase", exact=True).click()
    expect(tells).to_have_text("Nothing is painted yet.")
    tab.get_by_role("button", name="Paint", exact=True).click()
    drag(tab, (0.2, 0.5), (0.8, 0.5))
    expect(tells).to_contain_text("Painting region 1")
    whole = covered()
    undo = tab.get_by_role("button", name="Undo the last change of regions")
    drag(tab, (0.5, 0.2), (0.5, 0.8), button="right")
    assert 0 < covered() < 0.9 * whole
    tab.keyboard.press("Control+z")
    assert abs(covered() - whole) < 0.05 * whole
    tab.get_by_role("button", name="Region 1: erase").focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Region 1: erase")).to_be_focused()
    expect(tells).to_have_text("Erasing region 1.")
    drag(tab, (0.1, 0.5), (0.9, 0.5))
    assert covered() == 0
    undo.click()
    tab.get_by_role("button", name="Region 1: clear").click()
    assert covered() == 0
    drag(tab, (0.5, 0.5), (0.5, 0.5))  # a tap is a dot, in the same region
    assert 0 < covered() < whole
    prompt = tab.get_by_label("Region 1: prompt")
    prompt.fill("a dog")
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("button", name="Remove region 1")).to_be_focused()
    for _ in range(4):  # prompt, dot, clearing, the first stroke
        undo.click()
    expect(canvas).to_have_count(0)
    expect(undo).to_be_disabled()


def test_all_tabs_are_in_sight_on_a_phone(tab):
    tab.set_viewport_size({"width": 390, "height": 844})
    for name in ("Draw", "Teach", "Combine", "Compare", "Library"):
        box = tab.get_by_role("tab", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tops = {tab.get_by_role("tab", name=name).bounding_box()["y"] for name in ("Draw", "Library")}
    assert len(tops) == 1  # one row
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_first_picture_comes_soon(tab):
    began = time.monotonic()
    tab.locator("#draw").click()
    expect(tab.locator("#caption")).to_contain_text("seed")
    assert time.monotonic() - began < 60  # 5 on two free cores; tests share theirs
