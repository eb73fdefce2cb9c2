"""Execute every chapter once: the site is built from the executed copies, and the tests read them.

``executed/`` is a copy of ``book/``. There a chapter keeps its outputs as long as its key (its
code, the library, the lock and the results) stays the same; a chapter with another key is executed
again, through nbmake, one at a time. Prose may change without an execution. Run this file as a
script.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
EXECUTED = ROOT / "executed"
RECORD = EXECUTED / ".pages.json"  # page -> key and seconds of its last execution
STAMP = (
    EXECUTED / ".stamp"
)  # as new as the last change of the copy: what the site's build depends on
NOT_COPIED = {"_ext", "node_modules", "vendor", ".ipynb_checkpoints", "__pycache__"}

CELL_LIMIT = 240  # seconds; nbmake stops the cell and names it
PAGE_LIMIT = 300  # seconds

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, before one that the user has installed
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def chapters(book: Path) -> list[Path]:
    """The chapters of a book folder, in order."""
    return sorted(book.glob("chapters/*.ipynb"))


def read(path: Path) -> NotebookNode:
    """A notebook, without changing it to a newer minor format."""
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shared_digest() -> str:
    """SHA-256 over what every page depends on: the library, the lock and the results."""
    files = [
        *(ROOT / "selective_lite").rglob("*.py"),
        ROOT / "requirements.lock",
        *(ROOT / "results").glob("*.json"),
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def page_key(notebook: NotebookNode, shared: str) -> str:
    """SHA-256 over a page's code and what it shares with the others."""
    code = [[cell.source, cell.metadata.get("tags", [])] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps([shared, code]).encode()).hexdigest()


def records() -> dict[str, dict[str, Any]]:
    """Key and seconds of every page executed so far."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def remember(page: str, key: str, seconds: float) -> None:
    """Add one executed page to the record, so that an interrupted run keeps the pages it has finished."""
    text = json.dumps({**records(), page: {"key": key, "seconds": round(seconds, 1)}}, indent=1)
    partial = RECORD.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(RECORD)


def with_outputs(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The source page, with the outputs and the widget state of an execution of the same code."""
    for cell, done in zip(code_cells(source), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    source.metadata = NotebookNode({**executed.metadata, **source.metadata})
    return source


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write a file unless it holds this content already, so that the site's build sees what really changed."""
    if path.exists() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


def files_of(folder: Path) -> Iterator[Path]:
    """Every file of the book, or of its copy, relative to that folder; not what the build adds to it."""
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and file not in (RECORD, STAMP) and NOT_COPIED.isdisjoint(relative.parts):
            yield relative


def refresh() -> dict[Path, str]:
    """Bring the copy up to date with the book and give the pages to execute, each with its key."""
    shared, known, wanted = shared_digest(), records(), list(files_of(BOOK))
    stale: dict[Path, str] = {}
    changed = False
    for relative in wanted:
        content = (BOOK / relative).read_bytes()
        copy = EXECUTED / relative
        if BOOK / relative in chapters(BOOK):
            notebook = read(BOOK / relative)
            key = page_key(notebook, shared)
            if copy.exists() and known.get(relative.name, {}).get("key") == key:
                content = nbformat.writes(with_outputs(notebook, read(copy))).encode()
            else:
                stale[copy] = key
        changed |= write_if_changed(copy, content)
    for relative in set(files_of(EXECUTED)) - set(wanted):
        (EXECUTED / relative).unlink()
        changed = True
    if changed:
        STAMP.touch()
    return dict(sorted(stale.items()))


class Recorder:
    """Watch nbmake: limit each page, name the cell that fails or is noisy, remember the pages that pass."""

    def __init__(self, keys: dict[Path, str]) -> None:
        self.keys = keys

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Execute one page within its limit and without noise."""
        # not imported earlier: pytest wants to load its plugins itself
        from nbmake.nb_result import NotebookError, NotebookResult
        from nbmake.pytest_items import NotebookFailedException

        page = item.path.name
        signal.signal(
            signal.SIGALRM, lambda *_: pytest.fail("too late")
        )  # not an Exception, which asyncio might keep
        signal.alarm(PAGE_LIMIT)
        start = time.monotonic()
        try:
            result = yield
        except NotebookFailedException as failure:
            index = failure.args[0].error.failing_cell_index
            item.add_report_section(
                "call", "cell", f"{page}: cell {index + 1} failed, it is printed above"
            )
            raise
        except pytest.fail.Exception as late:
            summary = f"{page} ran for more than {PAGE_LIMIT} s: shorten its experiment"
            raise NotebookFailedException(
                NotebookResult({}, NotebookError(summary, summary, 0))
            ) from late
        finally:
            signal.alarm(0)
        seconds = time.monotonic() - start
        for index, cell in enumerate(read(item.path).cells):
            for output in cell.get("outputs", []):
                if output.get("name") == "stderr":
                    summary = f"{page}: cell {index + 1} wrote to stderr"
                    trace = f"{summary}:\n{output.text}"
                    raise NotebookFailedException(
                        NotebookResult({}, NotebookError(summary, trace, index))
                    )
        remember(page, self.keys[item.path], seconds)
        return result


def times() -> str:
    """The seconds of every page and their sum, as a table."""
    known = records()
    seconds = {
        page.name: known[page.name]["seconds"] for page in chapters(BOOK) if page.name in known
    }
    lines = [f"{name:<40}{value:8.1f} s" for name, value in seconds.items()]
    return "\n".join(
        [*lines, f"{f'{len(seconds)} pages in all':<40}{sum(seconds.values()):8.1f} s"]
    )


def main() -> int:
    """Execute what changed; 0 if every page of the copy is executed and up to date."""
    stale = refresh()
    if stale:
        os.environ.update(ENVIRONMENT)
        options = [
            "-v",
            "--nbmake",
            "--overwrite",
            f"--nbmake-timeout={CELL_LIMIT}",
            f"--rootdir={ROOT}",
        ]
        status = pytest.main([*options, *map(str, stale)], plugins=[Recorder(stale)])
        if status != pytest.ExitCode.OK:
            return int(status)
        if refresh():
            print(
                "The library, the lock or the results changed while the pages were executed: run this again."
            )
            return 1
    print(times())
    return 0


if __name__ == "__main__":
    sys.exit(main())
