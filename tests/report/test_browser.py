"""The pages in a real browser; and, run as a program, their screenshots:

python tests/report/test_browser.py build/compare/compare.json docs/
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import combinations
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS, SCHEMES, KINDS = (390, 1400), ("light", "dark"), ("comparison", "run")
TALLEST, COLORS = 2500, 256  # of a screenshot
LEAST_TEXT = 9  # pixels, of letters in plots
A4_ACROSS = 1031  # CSS pixels of a landscape A4 page between margins of 12 mm


@contextmanager
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # CI runs as root in a container, where Chromium's own sandbox does not start.
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    from dataclasses import replace

    from pages import comparison, run

    from fewbits.report.page import comparison_page, run_page, write_page

    folder = tmp_path_factory.mktemp("pages")
    given = comparison()
    long = tuple(replace(row, name=f"{'n' * 120} {row.name}") for row in given.rows[1:])
    hostile = replace(given, model=given.model | {"name": "m" * 200}, rows=(given.rows[0], *long))
    experts = tuple(f"mlp.experts.{i}.up_proj" for i in range(8))
    written = {
        "comparison": comparison_page(given, "fewbits compare tiny work --text heldout.txt"),
        "run": run_page(run(folder, "awq+gptq"), "fewbits quantize model out --method awq+gptq"),
        "hostile": comparison_page(hostile, "again " * 60),
        "large": comparison_page(comparison(80, ("self_attn.q_proj", *experts)), "again"),
    }
    for name, html in written.items():
        write_page(html, folder / f"{name}.html")
    return folder


@contextmanager
def opened(chromium, pages, kind, width=1400, scheme="light", **more):
    """A page that may ask for nothing and has nothing to say on the console."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, **more
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    url = (pages / f"{kind}.html").as_uri()
    page.goto(url)
    yield page
    assert said == []
    assert [u for u in asked if u != url and not u.startswith("data:")] == []
    context.close()


def unfold(page) -> None:
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_to_complain_about(chromium, pages, kind, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with opened(chromium, pages, kind, width, scheme) as page:
        unfold(page)
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("kind", [*KINDS, "hostile", "large"])
@pytest.mark.parametrize("width", [320, 390, 1400])
def test_a_page_is_never_wider_than_the_screen(chromium, pages, kind, width):
    with opened(chromium, pages, kind, width) as page:
        unfold(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        across = page.evaluate("[...document.querySelectorAll('.scroll, pre')].map(e => e.clientWidth)")
        assert max(across) <= width


def test_wide_tables_scroll_in_a_place_that_takes_the_focus(chromium, pages):
    with opened(chromium, pages, "comparison", 390) as page:
        place = page.locator("#models .scroll")
        assert place.evaluate("e => e.scrollWidth > e.clientWidth")
        place.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#models .scroll').scrollLeft > 0")


TEXTS = """svg => [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect(), all = svg.getBoundingClientRect();
    const size = parseFloat(getComputedStyle(text).fontSize) * all.width / svg.viewBox.baseVal.width;
    return {
        text: text.textContent, size, fill: getComputedStyle(text).fill,
        left: box.left - all.left, top: box.top - all.top,
        right: box.right - all.left, bottom: box.bottom - all.top,
        width: all.width, height: all.height,
    };
})"""


@pytest.mark.parametrize("kind", [*KINDS, "hostile"])
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_every_text_of_a_plot_is_whole_legible_and_apart(chromium, pages, kind, width):
    with opened(chromium, pages, kind, width) as page:
        plots = page.locator(".plot svg:visible").all()
        assert len(plots) == {"comparison": 2, "hostile": 2, "run": 1}[kind]
        for plot in plots:
            texts = plot.evaluate(TEXTS)
            assert len(texts) > 5
            for text in texts:
                assert text["text"].strip()
                assert text["size"] >= LEAST_TEXT, text
                assert text["left"] >= -0.5, text
                assert text["top"] >= -0.5, text
                assert text["right"] <= text["width"] + 0.5, text
                assert text["bottom"] <= text["height"] + 0.5, text
            for a, b in combinations(texts, 2):
                across = min(a["right"], b["right"]) - max(a["left"], b["left"])
                down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
                # A line is taller than its letters.
                assert across <= 1 or down <= 0.35 * a["size"], (a["text"], b["text"])


def luminance(color: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_plots_stand_out_from_the_paper(chromium, pages, kind, scheme):
    with opened(chromium, pages, kind, 1400, scheme) as page:
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(paper) < 0.5) == (scheme == "dark")
        for plot in page.locator(".plot svg:visible").all():
            for text in plot.evaluate(TEXTS):
                assert contrast(text["fill"], paper) >= 4.5, text
        colors = page.evaluate(
            """[...Array(8).keys()].map(i => {
                const e = document.createElement('i');
                e.style.color = `var(--s${i})`;
                return getComputedStyle(document.body.appendChild(e)).color;
            })"""
        )
        assert len(set(colors)) == 8
        assert all(contrast(color, paper) >= 3 for color in colors)
        used = page.evaluate(
            """[...document.querySelectorAll('.plot svg:not([hidden]) path')]
                .map(e => getComputedStyle(e).stroke)"""
        )
        assert set(colors) & set(used)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_plot_of_each_pair_is_shown_and_has_a_text(chromium, pages, width):
    with opened(chromium, pages, "comparison", width) as page:
        shown = page.locator(".plot svg:visible")
        assert shown.count() == page.locator("figure").count() == 2
        for plot in shown.all():
            name, said = (plot.locator(tag).first.text_content() for tag in ("title", "desc"))
            assert plot.get_attribute("role") == "img"
            assert len(name) > 10
            assert len(said) > 50


def column(page, section: str, number: int) -> list[float | None]:
    """Values of a sortable table's column, without the pinned row."""
    return page.evaluate(
        """([section, number]) => {
            const bodies = document.querySelector(`#${section} table.sortable`).tBodies;
            return [...bodies[bodies.length - 1].rows].map(row => {
                const value = row.cells[number].dataset.value;
                return value === undefined ? row.cells[number].textContent.trim() : Number(value);
            });
        }""",
        [section, number],
    )


def test_heads_sort_by_click_and_say_so(chromium, pages):
    with opened(chromium, pages, "comparison") as page:
        heads = page.locator("#models table thead th")
        for number in (2, 3, 9):
            before = column(page, "models", number)
            for order, reverse in (("ascending", False), ("descending", True)):
                heads.nth(number).locator("button").click()
                assert column(page, "models", number) == sorted(before, reverse=reverse)
                said = [head.get_attribute("aria-sort") for head in heads.all()]
                assert said == [order if i == number else "none" for i in range(len(said))]
        first = page.locator("#models table tbody tr").first
        assert first.locator("th").text_content().strip() == "float"
        heads.nth(0).locator("button").click()
        names = column(page, "models", 0)
        assert names == sorted(names)
        assert names[0].startswith("awq+gptq")


def test_heads_sort_by_the_keyboard_and_the_focus_shows(chromium, pages):
    with opened(chromium, pages, "comparison") as page:
        page.locator("#models .scroll").focus()
        for _ in range(3):
            page.keyboard.press("Tab")
        button = page.locator("#models thead th").nth(2).locator("button")
        assert button.evaluate("e => e === document.activeElement")
        assert button.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
        before = column(page, "models", 2)
        page.keyboard.press("Enter")
        assert column(page, "models", 2) == sorted(before)
        page.keyboard.press("Space")
        assert column(page, "models", 2) == sorted(before, reverse=True)


def test_unknown_values_stay_at_the_end(chromium, pages, tmp_path):
    from dataclasses import replace

    from pages import comparison

    from fewbits.report.page import comparison_page, write_page

    given = comparison()
    unknown = replace(given.rows[2], resident_bytes=None)
    given = replace(given, rows=(*given.rows[:2], unknown, *given.rows[3:]))
    write_page(comparison_page(given, "again"), tmp_path / "unknown.html")
    with opened(chromium, tmp_path, "unknown") as page:
        for _ in range(2):
            page.locator("#models thead th").nth(4).locator("button").click()
            assert isinstance(column(page, "models", 4)[-1], str)


def test_the_first_tab_offers_to_skip_to_the_content(chromium, pages):
    with opened(chromium, pages, "comparison", 390) as page:
        page.keyboard.press("Tab")
        link = page.locator(".skip")
        assert link.evaluate("e => e === document.activeElement && e.getBoundingClientRect().left >= 0")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


def test_details_open_by_the_keyboard(chromium, pages):
    with opened(chromium, pages, "comparison") as page:
        details = page.locator("#models details")
        details.locator("summary").focus()
        page.keyboard.press("Enter")
        assert details.evaluate("e => e.open")


@pytest.mark.parametrize("kind", KINDS)
def test_paper_shows_whole_tables_and_what_was_folded(chromium, pages, kind):
    with opened(chromium, pages, kind, A4_ACROSS, "dark") as page:
        folded = page.locator("details:not(.long):not([open])").count()
        assert folded
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function("!document.querySelector('details:not(.long):not([open])')")
        unfold(page)  # the long ones too: a reader may have opened them
        assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
        tables = page.evaluate(
            """[...document.querySelectorAll('table')].map(t =>
                [t.caption.textContent, t.getBoundingClientRect().right, t.parentElement.clientWidth])"""
        )
        assert tables
        for caption, right, _ in tables:
            assert right <= A4_ACROSS + 0.5, (caption, right)
        assert page.evaluate("document.documentElement.scrollWidth") <= A4_ACROSS
        assert not page.locator("nav").is_visible()
        assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
        page.emulate_media(media="screen")


def screenshots(source: Path, folder: Path) -> None:
    """Of the page made from a `compare.json`, at two widths, light; of its beginning."""
    import tempfile

    from PIL import Image

    from fewbits.comparison import read_comparison
    from fewbits.report.page import comparison_page, write_page

    with tempfile.TemporaryDirectory() as temporary, browser() as started:
        path = Path(temporary) / "report.html"
        write_page(comparison_page(read_comparison(source), "fewbits compare MODEL WORK"), path)
        for width in WIDTHS:
            page = started.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
            page.goto(path.as_uri())
            height = min(TALLEST, page.evaluate("document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": width, "height": height}
            shot = Image.open(BytesIO(page.screenshot(full_page=True, clip=clip)))
            shot.quantize(COLORS, dither=Image.Dither.NONE).save(
                folder / f"report-{width}.png", optimize=True
            )


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]), Path(sys.argv[2]))
