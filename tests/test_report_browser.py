"""The report in a real browser: opened from files, sorted, filtered, slid and read by keyboard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from reports import BLUR, done, failed, record

from bcseg_batch.report.build import ReportOptions, build_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")

pytestmark = pytest.mark.slow

IMAGES = 60
SCRIPT = "<script>alert(1)<!--.jpg"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs the browser chromium (Debian package chromium)")
    with playwright.sync_playwright() as started:
        # Its sandbox needs rights that a container may lack; it opens our own files alone.
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of images whose counts rise with their numbers; one odd, one flagged, one failed."""
    folder = tmp_path_factory.mktemp("a folder #1 with 100%") / "out"
    outcomes = [
        replace(
            done(folder, f"s{number % 3}_{number:02d}.jpg", confidence=0.99 - 0.001 * number),
            cell_count=number,
        )
        for number in range(IMAGES)
    ]
    record(folder, *outcomes, done(folder, SCRIPT, flags=(BLUR,)), failed("bad.tif"))
    return build_report(folder, ReportOptions(group_pattern="(?P<group>s[0-9])_")).index


@pytest.fixture
def page(browser: playwright.Browser, index: Path) -> Iterator[playwright.Page]:
    """The index, opened; at the end nothing may have gone wrong or to the network."""
    page = browser.new_page()
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url),
    )
    page.goto(index.as_uri())
    playwright.expect(page.get_by_role("status")).to_contain_text(f"{IMAGES + 2} images")
    yield page
    page.close()
    assert wrong == []


def names(page: playwright.Page) -> list[str]:
    return page.locator("#list tbody th > a").all_inner_texts()


def test_the_most_doubtful_come_first_and_names_are_text(page: playwright.Page) -> None:
    assert names(page)[:3] == ["bad.tif", SCRIPT, f"s2_{IMAGES - 1}.jpg"]
    assert page.get_by_text("<i>no</i>").count() == 1
    playwright.expect(page.get_by_title(BLUR.sentence)).to_have_text(BLUR.name)
    assert page.locator("svg.plot").count() == 3
    assert page.locator("table.groups tbody tr").count() == 4


def test_columns_sort_both_ways_and_what_has_no_value_comes_last(page: playwright.Page) -> None:
    head = page.locator("th[data-key=cells]")
    head.get_by_role("button").click()
    playwright.expect(head).to_have_attribute("aria-sort", "ascending")
    assert names(page)[:2] == ["s0_00.jpg", "s1_01.jpg"]
    head.get_by_role("button").press("Enter")
    playwright.expect(head).to_have_attribute("aria-sort", "descending")
    assert names(page)[0] == f"s2_{IMAGES - 1}.jpg"
    page.get_by_label("Rows").select_option("100")
    assert names(page)[-1] == "bad.tif"
    page.get_by_label("Order").select_option("image")
    assert page.locator("th[data-key=cells][aria-sort]").count() == 0
    assert names(page)[-1] == f"s2_{IMAGES - 1}.jpg"


def test_pages_turn(page: playwright.Page) -> None:
    first = names(page)
    assert len(first) == 25
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    assert not set(names(page)) & set(first)
    page.get_by_role("button", name="Next").click()
    assert len(names(page)) == IMAGES + 2 - 50
    assert page.get_by_role("button", name="Next").is_disabled()


def test_back_leads_to_the_list_as_it_was_left(page: playwright.Page) -> None:
    page.get_by_label("Search").fill("jpg")
    page.get_by_label("Order").select_option("image")
    page.get_by_role("button", name="Next").click()
    left = names(page)
    page.locator("#list tbody th > a").first.click()
    playwright.expect(page.locator("main.image")).to_be_visible()
    page.go_back()
    playwright.expect(page.locator("#page")).to_contain_text("page 2")
    assert names(page) == left
    assert page.get_by_label("Search").input_value() == "jpg"
    page.get_by_label("Search").fill("")
    playwright.expect(page.locator("#page")).to_contain_text("page 1")


def test_filters_and_search_leave_what_is_asked_for(page: playwright.Page) -> None:
    page.get_by_label("Search").fill("S1_ 4")
    assert set(names(page)) == {"s1_04.jpg", *(f"s1_{n}.jpg" for n in (34, 40, 43, 46, 49))}
    page.get_by_label("Search").fill("is <i>no")
    assert names(page) == ["bad.tif"]
    page.get_by_label("Search").fill("")
    page.get_by_label("Show").select_option("doubted")
    assert names(page) == ["bad.tif", SCRIPT]
    page.get_by_label("Show").select_option("failed")
    assert names(page) == ["bad.tif"]
    page.get_by_label("Show").select_option("good")
    page.locator("#group").select_option("s2")
    assert len(names(page)) == IMAGES // 3
    page.locator("#group").select_option("no group")
    assert names(page) == []
    playwright.expect(page.locator("#told")).to_have_text(f"0 of {IMAGES + 2} images")
    page.get_by_label("Show").select_option("")
    page.locator("#flag").select_option(BLUR.name)
    assert names(page) == [SCRIPT]


def clip(page: playwright.Page, which: str) -> str:
    style = page.locator(which).first.evaluate("image => getComputedStyle(image).clipPath")
    assert isinstance(style, str)
    return style


def test_the_slider_of_a_row_moves_by_keyboard(page: playwright.Page) -> None:
    slider = page.get_by_label("Photograph or composite of s2_59.jpg")
    row = page.locator("#list tbody tr", has=slider)
    image = row.locator("img.after")
    before = image.evaluate("image => getComputedStyle(image).clipPath")
    slider.press("End")
    after = image.evaluate("image => getComputedStyle(image).clipPath")
    assert before == "inset(0px 0px 0px 50%)"
    assert after == "inset(0px 0px 0px 100%)"


def test_pictures_are_loaded_when_they_are_looked_at(page: playwright.Page) -> None:
    images = page.locator("#list img")
    assert images.evaluate_all("all => all.every(image => image.loading === 'lazy')")
    images.last.scroll_into_view_if_needed()
    page.wait_for_function(
        "[...document.querySelectorAll('#list tr:last-child img')].every(i => i.naturalWidth)"
    )


def open_image(page: playwright.Page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).click()
    playwright.expect(page.get_by_role("heading", level=1)).to_have_text(name)


@pytest.mark.parametrize("name", ["s2_59.jpg", SCRIPT])
def test_an_image_opens_with_its_outlines(page: playwright.Page, name: str) -> None:
    open_image(page, name)
    page.wait_for_function("[...document.images].every(image => image.naturalWidth)")
    outlines = page.locator("#traces path")
    assert outlines.count() == 3
    about = page.locator("#about")
    outlines.nth(2).hover(force=True)
    playwright.expect(about).to_contain_text("Cell 3: white cell")
    playwright.expect(about).to_contain_text("centroid-0")
    page.mouse.move(0, 0)
    playwright.expect(about).to_be_hidden()

    outlines.nth(0).focus()
    playwright.expect(about).to_contain_text("Cell 1: red cell")
    page.keyboard.press("ArrowRight")
    playwright.expect(about).to_contain_text("Cell 2: red cell")
    page.keyboard.press("End")
    playwright.expect(about).to_contain_text("Cell 3: white cell")

    page.get_by_label("White cells").uncheck()
    playwright.expect(outlines.nth(2)).to_be_hidden()
    playwright.expect(outlines.nth(0)).to_be_visible()
    page.get_by_label("Outlines", exact=True).uncheck()
    playwright.expect(outlines.nth(0)).to_be_hidden()

    page.get_by_label("How much of the picture").press("Home")
    assert clip(page, ".compare img.after") == "inset(0px 0px 0px 0%)"
    page.get_by_text("The 3 cells as a table").click()
    playwright.expect(page.locator("#cells tbody tr")).to_have_count(3)


def test_neighbours_are_those_of_the_order_of_doubt(page: playwright.Page) -> None:
    open_image(page, "bad.tif")
    playwright.expect(page.locator("#place")).to_have_text(re.compile(f"^1 of {IMAGES + 2}"))
    assert not page.get_by_role("link", name="Previous").is_visible()
    playwright.expect(page.locator(".error")).to_contain_text("is <i>no</i> image")
    page.get_by_role("link", name="Next").click()
    playwright.expect(page.get_by_role("heading", level=1)).to_have_text(SCRIPT)
    page.get_by_role("link", name="All images").click()
    page.wait_for_selector("#list tbody tr")
    assert names(page)[0] == "bad.tif"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(
    browser: playwright.Browser, index: Path, scheme: str
) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(index.as_uri())
    page.wait_for_selector("#list tbody .flag")
    for where in ("body", ".plot", "td .error", ".flag", "footer", "#list tbody th a", ".few"):
        assert contrast(page, where) >= 4.5, where  # WCAG 2.2, 1.4.3
    page.close()


def contrast(page: playwright.Page, where: str) -> float:
    """Give the contrast of a text with what is behind it, as WCAG 2.2 defines it."""
    ratio = page.locator(where).first.evaluate(
        """(element) => {
          const light = (colour) => {
            const [r, g, b] = colour.match(/[0-9.]+/g).map((value) => {
              const share = value / 255;
              return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let behind = element;
          while (/rgba\\(.*, 0\\)/.test(getComputedStyle(behind).backgroundColor)) {
            behind = behind.parentElement;
          }
          const [a, b] = [
            light(getComputedStyle(element).color),
            light(getComputedStyle(behind).backgroundColor),
          ];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }"""
    )
    assert isinstance(ratio, float | int)
    return float(ratio)
