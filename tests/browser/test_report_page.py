"""A run's report as a reader has it: from disk, offline, on a phone and a wide screen, by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _run_folder import N, make_run

from pix2mass.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("run") / "example"))


@pytest.fixture
def open_page(chromium: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report; at the end of the test there must be no error, no warning and no request but for the file."""
    contexts, complaints, requests = [], [], []

    def complain(message: Any) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def visit(width: int = 1600, scheme: str = "light") -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} == {report.as_uri()}


def table(page: Any, name: str) -> Any:
    return page.locator(f'table[aria-label="{name}"]')


def column(page: Any, name: str, number: int) -> list[str]:
    """Texts of a column, shown rows alone."""
    script = """(table, number) => [...table.tBodies[0].rows].filter((row) => row.checkVisibility())
                .map((row) => row.cells[number].textContent.trim())"""
    return table(page, name).evaluate(script, number)


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("−", "-")) for text in texts]


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_there_and_the_page_fits_the_screen(open_page, width, scheme):
    page = open_page(width, scheme)
    page.locator("details").evaluate_all("(all) => all.forEach((one) => { one.open = true; })")
    images = page.locator("img").evaluate_all(
        """async (images) => { for (const image of images) await image.decode();
           return images.map((i) =>
               [i.naturalWidth, i.naturalHeight, i.clientWidth, i.clientHeight, i.alt.length]); }"""
    )
    assert len(images) > 10
    for natural_width, natural_height, shown_width, shown_height, alt in images:
        assert natural_width > 100 and natural_height > 100 and alt > 20
        # The smallest words in figures are 8 points, 10.7 pixels in the natural size: never below 8.5 on the screen.
        assert shown_width / natural_width > 0.8
        assert shown_height / shown_width == pytest.approx(natural_height / natural_width, rel=0.05)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        """Math.min(...[...document.querySelectorAll("main *")]
           .filter((e) => e.checkVisibility() && e.textContent.trim())
           .map((e) => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 12


def test_page_and_figures_follow_the_dark_scheme(open_page):
    def brightness(page: Any, selector: str) -> float:
        """Mean of the middle value of a picture of the element's upper left corner, 0 to 1."""
        script = """async (image) => { await image.decode();
            const canvas = Object.assign(document.createElement("canvas"), { width: 60, height: 60 });
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0, 60, 60);
            const values = [...pen.getImageData(0, 0, 60, 60).data].filter((_, i) => i % 4 === 1);
            return values.sort((a, b) => a - b)[values.length / 2] / 255; }"""
        return page.locator(selector).first.evaluate(script)

    def ground(page: Any) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")[:3])

    light, dark = open_page(scheme="light"), open_page(scheme="dark")
    assert ground(light) > 700 and ground(dark) < 120
    assert brightness(light, "#masses ~ .grid img") > 0.9 and brightness(dark, "#masses ~ .grid img") < 0.25


def test_a_click_sorts_by_number_and_a_second_one_turns_the_order(open_page):
    page = open_page()
    head = table(page, "All clusters").locator("th", has_text="residual").first
    before = column(page, "All clusters", 7)
    assert len(before) == N and head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert numbers(column(page, "All clusters", 7)) == sorted(numbers(before))
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert numbers(column(page, "All clusters", 7)) == sorted(numbers(before), reverse=True)
    table(page, "All clusters").get_by_role("button", name="cluster").click()
    assert column(page, "All clusters", 0) == [f"c{i}" for i in range(N)]  # c2 before c10
    assert head.get_attribute("aria-sort") is None


def test_the_keyboard_sorts_too(open_page):
    page = open_page()
    button = table(page, "Folds").get_by_role("button", name="MAE", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    values = numbers(column(page, "Folds", 2))
    assert len(values) == 4 and values == sorted(values)


def test_rows_without_a_value_come_last_either_way(open_page):
    page = open_page()
    button = table(page, "All clusters").get_by_role("button", name="richness")
    for _ in range(2):
        button.click()
        texts = column(page, "All clusters", 3)
        assert texts[-2:] == ["–", "–"] and "–" not in texts[:-2]


@pytest.mark.parametrize(
    "words, holds",
    [
        ("z>0.3", lambda row: row["z"] > 0.3),
        ("z<=0.2 residual>0.1", lambda row: row["z"] <= 0.2 and row["residual"] > 0.1),
        ("C11", lambda row: "c11" in row["id"]),
        ("fold=2", lambda row: row["fold"] == 2),
    ],
)
def test_the_filter_leaves_the_rows_that_hold(open_page, words, holds):
    page = open_page(400)
    columns = {"id": 0, "fold": 1, "z": 2, "residual": 7}
    read = {name: column(page, "All clusters", number) for name, number in columns.items()}
    rows = [
        {"id": read["id"][i], **{name: numbers(read[name])[i] for name in ("fold", "z", "residual")}} for i in range(N)
    ]
    expected = [row["id"] for row in rows if holds(row)]
    assert 0 < len(expected) < N
    page.get_by_label("Filter").fill(words)
    assert column(page, "All clusters", 0) == expected
    assert page.locator("output").inner_text() == f"{len(expected)} of {N}"
    page.get_by_label("Filter").fill("")
    assert len(column(page, "All clusters", 0)) == N


def test_links_inside_the_page_lead_somewhere(open_page):
    page = open_page()
    dangling = page.evaluate(
        """[...document.querySelectorAll("a[href^='#']")].map((a) => a.getAttribute("href"))
           .filter((href) => !document.getElementById(href.slice(1)))"""
    )
    assert dangling == []
    link = table(page, "All clusters").locator("a").first
    name = link.inner_text()
    link.click()
    assert page.locator("article:target h4").inner_text() == name
