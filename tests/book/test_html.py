"""The built pages as files: nothing from elsewhere, no broken link, no picture without words."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from bs4 import BeautifulSoup

import selective_lite

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts
)
CHAPTERS = [page for page in PAGES if page.startswith("chapters/")]

# what a page loads by itself: selector, attribute
LOADED = [
    ("script[src]", "src"),
    ("img[src]", "src"),
    ("source[src]", "src"),
    ("iframe[src]", "src"),
    ("video[src]", "src"),
    ("object[data]", "data"),
    ("link[rel~=stylesheet]", "href"),
    ("link[rel~=preload]", "href"),
    ("link[rel~=icon]", "href"),
]


@cache
def soup(page):
    return BeautifulSoup((SITE / page).read_text("utf-8"), "html.parser")


@cache
def ids(page):
    return [element["id"] for element in soup(page).select("[id]")]


def local(page, address):
    """The file and fragment that an address on a page points to; None if it leaves the book."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    path = urlsplit(urljoin(page, address)).path if parts.path else page
    return unquote(path), unquote(parts.fragment)


def test_the_book_is_built():
    sources = {path.stem for path in (ROOT / "book" / "chapters").glob("*.ipynb")}
    assert sources
    assert {Path(page).stem for page in CHAPTERS} == sources, (
        f"{SITE} does not hold the chapters; run `make book`"
    )


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(page):
    for selector, attribute in LOADED:
        for element in soup(page).select(selector):
            address = element[attribute]
            if address.startswith("data:"):
                continue
            target = local(page, address)
            assert target, f"{element.name} loads {address}"
            assert (SITE / target[0]).is_file(), (
                f"{element.name} loads {address}, which is not in the book"
            )


@pytest.mark.parametrize(
    "sheet", sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.css"))
)
def test_style_sheets_load_nothing_from_elsewhere(sheet):
    text = re.sub(r"/\*.*?\*/", "", (SITE / sheet).read_text("utf-8"), flags=re.DOTALL)
    for address in re.findall(r"(?:url\(|@import\s+)['\"]?([^'\")\s;]+)", text):
        assert address.startswith(("data:", "#")) or local(sheet, address), (
            f"{sheet} loads {address}"
        )


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in soup(page).select("a[href]"):
        target = local(page, link["href"])
        if target is None:
            continue
        path, fragment = target
        if not (SITE / path).is_file() or (
            fragment and path.endswith(".html") and fragment not in ids(path)
        ):
            broken.append(link["href"])
    assert broken == []


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_words(page):
    pictures = soup(page).select("img")
    # Frames of an explorer wait in the page's widget state.
    for state in soup(page).select('script[type="application/vnd.jupyter.widget-state+json"]'):
        for model in json.loads(state.string)["state"].values():
            pictures += BeautifulSoup(str(model["state"].get("value", "")), "html.parser").select(
                "img"
            )
    assert [
        str(img)[:200]
        for img in pictures
        if not img.get("alt", "").strip() and not is_decoration(img)
    ] == []


def is_decoration(img):
    """The logo stands beside the book's name, which says the same."""
    return img.get("alt") == "" and img.find_parent(class_="navbar-brand") is not None


@pytest.mark.parametrize("page", PAGES)
def test_ids_are_unique(page):
    assert {name: count for name, count in Counter(ids(page)).items() if count > 1} == {}


@pytest.mark.parametrize("page", CHAPTERS)
def test_colab_button_opens_this_chapter(page):
    colab = "https://colab.research.google.com/github/selective-lite/selective_lite/blob/main/book/"
    assert soup(page).select(f'a[href="{colab}{page.removesuffix(".html")}.ipynb"]')


def test_chinese_is_marked_as_chinese():
    """A screen reader and a font must know, so an element says so of all Chinese."""
    unmarked = [
        text
        for page in ("glossary.html", "notation.html")
        for text in soup(page).body.find_all(string=re.compile("[\u4e00-\u9fff]"))
        if text.find_parent(lang="zh") is None and text.find_parent("script") is None
    ]
    assert unmarked == []
    assert len(soup("glossary.html").select("dt [lang=zh]")) > 20


def test_glossary_gives_each_term_in_both_languages():
    entries = [[]]
    for element in (
        soup("glossary.html").select_one("dl.glossary").find_all(["dt", "dd"], recursive=False)
    ):
        if element.name == "dt":
            entries[-1].append(bool(element.select("[lang=zh]")))
        else:
            entries.append([])
    assert [entry for entry in entries[:-1] if entry != [False, True]] == []


def test_reference_names_everything_public():
    missing = [
        name for name in selective_lite.__all__ if f"selective_lite.{name}" not in ids("api.html")
    ]
    assert missing == []
