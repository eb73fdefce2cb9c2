"""The built book in Chromium: no network, explorers that move, no accessibility violation."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts
)
WITH_EXPLORER = [
    page
    for page in PAGES
    if "application/vnd.jupyter.widget-view+json" in (SITE / page).read_text("utf-8")
]


def drive(base, pages, *, axe=False, screenshots=None):
    """Open `pages` under `base` with the driver; its report is ``{page: what was seen}``."""
    programs = {name: shutil.which(name) for name in ("node", "chromium")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"not installed: {missing}; `make setup` installs them or says how"
    job = {
        "modules": str(ROOT / "book"),
        "chromium": programs["chromium"],
        "base": base,
        "pages": pages,
        "axe": axe,
        "screenshots": screenshots and str(screenshots),
    }
    command = [programs["node"], str(Path(__file__).with_name("visit.cjs")), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that keeps its log to itself."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="session")
def report():
    """What the driver saw on every page, served from localhost."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        yield drive(base, PAGES, axe=True, screenshots=ROOT / "_build" / "screenshots")
        server.shutdown()


@pytest.fixture(scope="session")
def report_from_disk():
    """What the driver saw without a server: title page, search page, a page with an explorer."""
    return drive(SITE.as_uri() + "/", ["index.html", "search.html?q=gate", *WITH_EXPLORER[:1]])


def test_the_book_is_built_and_has_explorers():
    assert len(WITH_EXPLORER) >= 2, (
        f"{len(PAGES)} pages and explorers on {WITH_EXPLORER} in {SITE}; run `make book`"
    )


@pytest.mark.parametrize("page", PAGES)
def test_page_is_self_contained(report, page):
    assert report[page]["external"] == []
    assert report[page]["failed"] == []


@pytest.mark.parametrize("page", PAGES)
def test_page_has_no_console_error(report, page):
    assert report[page]["errors"] == []


@pytest.mark.parametrize("page", WITH_EXPLORER)
def test_explorers_follow_the_keyboard(report, page):
    explorers = report[page]["explorers"]
    assert explorers, "no explorer was rendered"
    for steps in explorers:
        assert [step for step in steps if not step["moved"]] == []
        assert [step for step in steps if not step["name"] or not all(step["alt"])] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("chapters/")])
def test_solutions_open_by_keyboard(report, page):
    assert report[page]["opened"], "no solution in a dropdown"
    assert all(report[page]["opened"])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_page_has_no_accessibility_violation(report, page, theme):
    assert report[page][theme] == []


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(report, page):
    assert report[page]["overflow"] <= 0, "the page scrolls sideways at a width of 390 pixels"


def test_book_opens_from_disk(report_from_disk):
    for page, seen in report_from_disk.items():
        assert (page, seen["external"], seen["failed"], seen["errors"]) == (page, [], [], [])
        assert all(step["moved"] for steps in seen["explorers"] for step in steps)
    assert any(seen["explorers"] for seen in report_from_disk.values())
