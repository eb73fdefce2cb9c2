"""Print what each page of the book took, at the end of the tests that read it."""

from execute import times


def pytest_terminal_summary(terminalreporter):
    """Show the seconds of the last execution of every page."""
    terminalreporter.section("seconds to execute each page")
    terminalreporter.write_line(times())
