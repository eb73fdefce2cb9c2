"""Execute every chapter once: the site is built from the executed copies, and the tests read them.

``executed/`` is a copy of ``book/``. There a chapter keeps its outputs as long as its key stays the
same: a hash of its code, of what this uses in the library and reads of the results (see
`selective_lite.lab.experiments.provenance`), and of the lock. A chapter with another key is
executed again, through nbmake, one at a time, each in a process of its own that leaves no kernel
behind. Prose may change without an execution. Run this file as a script.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbformat import NotebookNode

from selective_lite.lab.experiments.provenance import page_hash, reread

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
EXECUTED = ROOT / "executed"
RECORD = EXECUTED / ".pages.json"  # page -> key and seconds of its last execution
STAMP = EXECUTED / ".stamp"  # as new as the last change of the copy: the site depends on it
NOT_COPIED = {"_ext", "build", "node_modules", "vendor", ".ipynb_checkpoints", "__pycache__"}

CELL_LIMIT = 240  # seconds; nbmake stops the cell and names it
PAGE_LIMIT = 300  # seconds
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h

ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, before one that the user installed
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


def page_key(notebook: NotebookNode) -> str:
    """SHA-256 of what a page's outputs follow from: its code, what this uses, results, the lock."""
    cells = code_cells(notebook)
    files = [*(ROOT / "results").glob("*.json"), *(ROOT / "results").glob("*.safetensors")]
    parts = [
        page_hash([cell.source for cell in cells], files),
        [cell.metadata.get("tags", []) for cell in cells],
        hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def records() -> dict[str, dict[str, Any]]:
    """Key and seconds of every page executed so far."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def record(pages: dict[str, dict[str, Any]]) -> None:
    """Replace the record, complete or not at all."""
    partial = RECORD.with_suffix(".partial")
    partial.write_text(json.dumps(pages, indent=1))
    partial.replace(RECORD)


def with_outputs(source: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The source page, with the outputs and the widget state of an execution of the same code."""
    for cell, done in zip(code_cells(source), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    source.metadata = NotebookNode({**executed.metadata, **source.metadata})
    return source


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write a file unless it holds this content; the site's build sees what really changed."""
    if path.exists() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


def files_of(folder: Path) -> Iterator[Path]:
    """Every file of the book, or of its copy, relative to it; not those that the build adds."""
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and file not in (RECORD, STAMP) and NOT_COPIED.isdisjoint(relative.parts):
            yield relative


def refresh() -> dict[Path, str]:
    """Bring the copy up to date with the book and give the pages to execute, each with its key."""
    known, wanted = records(), list(files_of(BOOK))
    stale: dict[Path, str] = {}
    changed = False
    for relative in wanted:
        content = (BOOK / relative).read_bytes()
        copy = EXECUTED / relative
        if BOOK / relative in chapters(BOOK):
            notebook = read(BOOK / relative)
            key = page_key(notebook)
            if copy.exists() and known.get(relative.name, {}).get("key") == key:
                content = nbformat.writes(with_outputs(notebook, read(copy))).encode()
            else:
                stale[copy] = key
        changed |= write_if_changed(copy, content)
    if forgotten := {copy.name for copy in stale} & set(known):  # their copies have no outputs now
        record({name: page for name, page in known.items() if name not in forgotten})
    for relative in set(files_of(EXECUTED)) - set(wanted):
        (EXECUTED / relative).unlink()
        changed = True
    if changed or not STAMP.exists():  # make deletes it when it is interrupted
        STAMP.touch()
    return dict(sorted(stale.items()))


def execute(page: Path, limit: float = PAGE_LIMIT) -> str | None:
    """Execute a page in place; what is wrong with it, or None.

    Nothing that the page started is left, however this ends: neither its kernel nor what the kernel
    has started.
    """
    options = ["-q", "--no-header", "--nbmake", "--overwrite", f"--nbmake-timeout={CELL_LIMIT}"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={ROOT}", str(page)]
    try:
        status = subprocess.Popen(command, preexec_fn=_end_with_parent).wait(limit)
    except subprocess.TimeoutExpired:
        return f"{page.name} ran for more than {limit:g} s: shorten its experiment"
    finally:
        end_children()
    if status:
        return f"{page.name} failed: the cell is printed above"
    for index, cell in enumerate(read(page).cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                return f"{page.name}: cell {index + 1} wrote to stderr:\n{output.text}"
    return None


def end_children() -> None:
    """Kill every process that this one has started, and theirs."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=1)


def end_with_make() -> None:
    """Turn the signals that end a program into an exit, which ends a page's processes on its way.

    On Linux orphans of those processes become children of this one, so that none gets away, and the
    end of make, even when it is killed, is such a signal too.
    """
    for number in ENDING:
        signal.signal(number, _exit)
    _control(PR_SET_CHILD_SUBREAPER, 1)
    if "MAKELEVEL" in os.environ:
        _control(PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit(number: int, _: Any) -> None:
    """Exit on a signal; further ones do not cut the cleaning up short."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _end_with_parent() -> None:
    """In a new process: be killed when the one that started it ends."""
    _control(PR_SET_PDEATHSIG, signal.SIGKILL)


def _control(option: int, value: int) -> None:
    """Set an option of this process, on Linux."""
    if sys.platform == "linux":
        LIBC.prctl(option, value, 0, 0, 0)


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
    end_with_make()
    os.environ.update(ENVIRONMENT)
    failed = []
    for page, key in refresh().items():
        print(page.name, flush=True)
        start = time.monotonic()
        if wrong := execute(page):
            failed.append(wrong)
            continue
        seconds = round(time.monotonic() - start, 1)
        record({**records(), page.name: {"key": key, "seconds": seconds}})
    print("\n".join(failed) or times())
    reread()
    if not failed and refresh():
        print("The library, the lock or the results changed while pages were executed: run again.")
        return 1
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
