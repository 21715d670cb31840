"""The site builds without a warning, runs its tutorial, needs no network; its links, commands and examples hold."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from _toy import toy_catalog

from pix2mass.catalog import write_catalog
from pix2mass.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "build" not in path.parts)


def _commands(page: Path) -> list[str]:
    """Lines of code blocks that call pix2mass."""
    blocks = re.findall(r"^```\n(.*?)^```|((?:^    .*\n)+)", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(fenced or indented for fenced, indented in blocks)
    return re.findall(r"^ *pix2mass (.+?)(?:\s+#.*)?$", text, re.MULTILINE)


COMMANDS = sorted({command for page in PAGES for command in _commands(page) if "VERB" not in command})


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 25


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    function, _, _ = app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)
    assert function.__module__ == "pix2mass.cli"


def test_every_module_is_in_the_reference():
    package = ROOT / "src" / "pix2mass"
    files = (path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if path.name[0] != "_")
    # The parts of the report are not meant to be called one by one; the command line has a page of another kind.
    modules = {".".join(file.parts) for file in files if file.parts[0] not in ("report", "cli")}
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^\.\. automodule:: pix2mass\.(\S+)$", text, re.MULTILINE))
    assert modules - listed == set(), "give each new module a line in one of the pages in docs/api"


def test_the_source_of_images_in_the_docs_works(tmp_path, monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (DOCS / "own_data.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_catalog(toy_catalog(3, seed=1), "clusters.ecsv")
    names: dict = {"__name__": "example"}
    exec(example, names)
    assert len(names["store"]) == 3


# ---- the site itself -------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """What a page has to click on, what it loads by itself, where one can jump to, and its formulas."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.alt_missing = 0
        self.formulas = 0
        self._in_formula = False
        self.unread: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" or "src" in values:
            self.loads.append(values.get("src", values.get("href", "")))
        self.alt_missing += tag == "img" and not values.get("alt")
        if tag == "math":
            self.formulas, self._in_formula = self.formulas + 1, True

    def handle_endtag(self, tag):
        self._in_formula &= tag != "math"

    def handle_data(self, data):
        if self._in_formula and "\\" in data:
            self.unread.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built from nothing, tutorial and all."""
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-T", "-q", "-b", "html"]
    result = subprocess.run([*command, "-d", out / "doctrees", DOCS, out / "site"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, _Page]:
    return {path: _Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_links_lead_to_places_that_are_there(site, pages):
    broken = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {""}
            if not target.exists() or (unquote(parts.fragment) not in anchors and target.suffix == ".html"):
                broken.append(f"{path.relative_to(site)} -> {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site, pages):
    remote = {load for page in pages.values() for load in page.loads if re.match("(https?:)?//", load)}
    assert remote == set()
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_formulas_are_drawn_and_pictures_described(pages):
    science = next(page for path, page in pages.items() if path.name == "science.html")
    assert science.formulas > 80
    assert [(path.name, page.unread) for path, page in pages.items() if page.unread] == []
    assert [path.name for path, page in pages.items() if page.alt_missing] == []


@pytest.mark.slow
def test_the_tutorial_ran_to_its_end(site):
    page = (site / "tutorial.html").read_text()
    cells = len(re.findall(r"^```{code-cell}", (DOCS / "tutorial.md").read_text(), re.MULTILINE))
    assert cells == page.count('class="cell docutils container"') == 10
    assert "shuffled labels" in page and "mean absolute error" in page and "the map sums to" in page
    assert len(re.findall(r'<img[^>]+src="_images/[^"]+\.png"', page)) == 3
    assert re.search(r"(&#39;|')report\.html(&#39;|')", page)  # the last cell lists the files of the run
