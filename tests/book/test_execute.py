"""Executing the book: a page is executed when its key says so, and no process of it outlives it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import execute
import nbformat
import psutil
import pytest

# The kernel and a process that leaves its session, as torch.distributed's and others do.
ENDLESS = """
import os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("started").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


@pytest.fixture
def book(tmp_path):
    """A checkout that holds only what executes pages; book(source, ...) gives it one page."""
    (tmp_path / "book/build").mkdir(parents=True)
    (tmp_path / "book/chapters").mkdir()
    shutil.copy(execute.__file__, tmp_path / "book/build/execute.py")
    (tmp_path / "requirements.lock").write_text("")
    (tmp_path / "Makefile").write_text(
        f"executed/.stamp: FORCE\n\t{sys.executable} book/build/execute.py\nFORCE:\n"
    )

    def write(*sources):
        cells = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        page = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.write(page, tmp_path / "book/chapters/page.ipynb")
        return tmp_path

    return write


def launched(folder, *command):
    """A process that finds the library of this checkout, wherever it runs."""
    environment = {**os.environ, "PYTHONPATH": f"{execute.ROOT}:{folder / 'book/build'}"}
    return subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait(condition, seconds=60):
    """The first true value of a condition, or its last."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def alive(pids):
    """Those of some processes that are still there."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process.pid for process in processes if process.status() != psutil.STATUS_ZOMBIE]


def test_a_page_that_runs_past_its_limit_leaves_no_process(book):
    folder = book(ENDLESS)
    page, started = folder / "book/chapters/page.ipynb", folder / "book/chapters/started"
    program = (
        "import sys, pathlib, execute; execute.end_with_make();"
        "print(execute.execute(pathlib.Path(sys.argv[1]), float(sys.argv[2])))"
    )
    for limit in (5, 10, 20, 40):  # until the kernel of a busy machine has started
        run = launched(folder, sys.executable, "-c", program, page, limit)
        output = run.communicate()[0]
        assert f"page.ipynb ran for more than {limit} s" in output
        if started.exists():
            break
    assert alive(map(int, started.read_text().split())) == []


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("make", signal.SIGTERM),
        ("make", signal.SIGKILL),
        ("script", signal.SIGINT),
        ("script", signal.SIGHUP),
    ],
)
def test_a_page_does_not_survive_the_end_of_make(book, whom, number):
    folder = book(ENDLESS)
    started = folder / "executed/chapters/started"
    run = launched(folder, "make")
    try:
        assert wait(lambda: started.exists() and len(started.read_text().split()) == 2)
        pids = [int(pid) for pid in started.read_text().split()]
        (script,) = (
            process.pid
            for process in psutil.Process(run.pid).children(recursive=True)
            if process.cmdline()[1:] == ["book/build/execute.py"]
        )
        assert alive([script, *pids]) == [script, *pids]
        os.kill(run.pid if whom == "make" else script, number)
        run.wait(60)
        assert wait(lambda: not alive([script, *pids])), alive([script, *pids])
    finally:
        if alive([run.pid]):
            os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()


def outcome(folder):
    """Exit status and output of one execution of the book."""
    run = launched(folder, "make")
    output = run.communicate()[0]
    return run.returncode, output


def printed(folder):
    """What the page of the executed copy printed."""
    page = nbformat.read(folder / "executed/chapters/page.ipynb", nbformat.NO_CONVERT)
    return "".join(o.get("text", "") for cell in page.cells for o in cell.get("outputs", []))


def test_a_page_is_executed_again_when_its_code_changes_and_not_for_a_comment(book):
    folder = book("import time\nprint(time.time())", "1 + 1")
    assert outcome(folder)[0] == 0
    first = printed(folder)
    book("import time\n\nprint(time.time())  # now", "1 + 1")
    assert outcome(folder)[0] == 0
    assert printed(folder) == first
    book("import time\nprint(time.time())", "1 / 0")
    status, output = outcome(folder)
    assert status != 0
    assert "ZeroDivisionError" in output
    assert "page.ipynb failed" in output
    # As it was: its outputs are gone, although its key is that of an execution that passed.
    book("import time\nprint(time.time())", "1 + 1")
    assert outcome(folder)[0] == 0
    assert float(printed(folder)) > float(first)


def test_a_page_that_writes_to_stderr_is_named(book):
    status, output = outcome(book("1 + 1", "import sys; sys.stderr.write('psst')"))
    assert status != 0
    assert "page.ipynb: cell 2 wrote to stderr:\npsst" in output
