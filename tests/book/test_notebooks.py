"""The contract of a chapter: template, equations, exercises, and an execution of all of it."""

import ast
import re
from collections import Counter

import nbformat
import pytest
from execute import BOOK, EXECUTED, chapters, code_cells, page_key, read, records

PAGES = chapters(BOOK)
LABEL = re.compile(r"\$\$\s*\(([^()\s]+)\)|\{math\}[^\n]*\n:label:\s*(\S+)")
DIRECTIVE = re.compile(
    r"^(:{3,})\{(exercise|solution)(-start)?\}[ ]*(\S*)[ ]*\n((?::[\w-]+:.*\n?)*)", re.MULTILINE
)

TEMPLATE = {
    "a title": r"\A# \S",
    "the claim": r"(?i)\bclaim\b",
    "time, memory and download": r"(?is)^(?=.*\btime\b)(?=.*\bmemory\b)(?=.*\bdownload)",
    "what breaks": r"(?im)^#+ .*\bbreaks?\b",
    "the box Paper and code": r"(?m)^:{3,}\{admonition\} Paper and code",
    "a summary": r"(?im)^(#+|:{3,}\{\w+\}) .*\b(summary|three lines)\b",
    "exercises": r"(?im)^#+ .*\bexercises\b",
    "references": r"\{bibliography\}|\{cite",
}


@pytest.fixture(params=PAGES, ids=[page.stem for page in PAGES])
def page(request):
    """The path of one chapter in the book."""
    return request.param


@pytest.fixture
def source(page):
    """One chapter as it is committed."""
    return read(page)


@pytest.fixture
def executed(page, source):
    """The executed copy of the same chapter, which the site is built from."""
    record = records().get(page.name, {})
    assert record.get("key") == page_key(source), f"{page.name} is not executed as it is: make book"
    return read(EXECUTED / "chapters" / page.name)


def prose(notebook):
    """The markdown of a notebook as one text."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def labelled(notebook):
    """Every equation label and the index of its cell, in order."""
    return [
        (first or second, index)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
        for first, second in LABEL.findall(cell.source)
    ]


def checks(notebook):
    """Every call `check("eq-...", ..., wrong=...)`: label, cell, whether it has a wrong variant."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "attr", getattr(node.func, "id", "")) == "check"
                ):
                    label = (
                        node.args[0].value
                        if node.args and isinstance(node.args[0], ast.Constant)
                        else None
                    )
                    yield (
                        label,
                        index,
                        len(node.args) > 3 or "wrong" in {keyword.arg for keyword in node.keywords},
                    )


def printed(notebook):
    """What the cells of an executed notebook printed, as lines."""
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return "".join(output.text for output in outputs if output.get("name") == "stdout").splitlines()


def directives(notebook):
    """Every exercise and solution: kind, argument, options."""
    for _, kind, _, argument, block in DIRECTIVE.findall(prose(notebook) + "\n"):
        yield kind, argument, dict(re.findall(r"^:([\w-]+):[ ]*(.*)$", block, re.MULTILINE))


def without_code_and_math(text):
    """Markdown less its fenced code, inline code and formulas, where a `<` means something else."""
    return re.sub(r"(?s)```.*?```|\$\$.*?\$\$|`[^`\n]*`|\$[^$\n]+\$", "", text)


BUDGETS = {"0.005", "0.02", "0.05", "0.1", "0.5", "1", "2", "5", "50", "95", "99.5", "100"}
RESULT = re.compile(r"(?<![\w.])([\d][\d.,]*)\s?(%|per cent|percent\b|points\b)")
# The title has sizes of downloads, the box numbers of papers, solutions what they derive.
TYPED = re.compile(r"^# |^:{3,}\{(admonition\} Paper and code|exercise|solution)", re.MULTILINE)
SAID = re.compile(r"\b(authors|paper|papers|report)\b")


def typed_results(notebook):
    """Percentages and points in prose that are no budget: numbers of a run belong into a cell."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and not TYPED.search(cell.source):
            for paragraph in without_code_and_math(cell.source).split("\n\n"):
                for number, unit in RESULT.findall("" if SAID.search(paragraph) else paragraph):
                    if unit == "points" or number not in BUDGETS:
                        yield f"{number} {unit}"


def test_no_result_is_typed_into_prose(source):
    assert list(typed_results(source)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("FISH reaches 83.5 % here.", ["83.5 %"]),
        ("It gains 1.2 points over chance.", ["1.2 points"]),
        ("At 0.5 % of the weights, `83.5 %` and $83.5 %$ aside.", []),
        (":::{admonition} Paper and code\nThe authors report 80.6 %.\n:::", []),
    ],
)
def test_a_typed_result_is_found(text, found):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    assert list(typed_results(notebook)) == found


# A verdict on a method in prose would stand when the rows say otherwise: cells print verdicts.
SUBJECT = re.compile(
    r"\b(random|chance|FISH|LT-SFT|Diff Pruning|BitFit|SaRA|SoRA|SPT\S*|LoRA|Child-Tuning\S*|full"
    r"|head|shuffled|masks?|lasso|gates?|methods?|scores?|selections?|choice)\b"
)
VERDICT = re.compile(
    r"\b(beat(s|en)?|outperforms?|wins?|won|leads?|saves? more|(better|worse) than|no better"
    r"|as well as|(is|are|was|were|does|do|did) (clearly |no |even )?(better|worse|best|ahead"
    r"|behind|as good|as well)|tells? the|cannot be told|not distinguishable|ends? close"
    r"|comes? close|match(es)?|loses? to|falls? short)\b"
)
OPEN = re.compile(
    r"(?i)\b(if|whether|has to|have to|would|may|might|could|should|unless|suppose|does a|do a"
    r"|which of)\b|\?"
)
ASIDE = re.compile(r"^:{3,}\{(admonition\} Paper and code|exercise|solution)", re.MULTILINE)


def typed_verdicts(notebook):
    """Sentences of prose that judge a method, and neither ask nor quote a paper."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and not ASIDE.search(cell.source):
            for paragraph in without_code_and_math(cell.source).split("\n\n"):
                for sentence in re.split(r"(?<=[.!?;:])\s+", paragraph.replace("*", "")):
                    judged = VERDICT.search(sentence) and SUBJECT.search(sentence)
                    if judged and not OPEN.search(sentence) and not SAID.search(paragraph):
                        yield " ".join(sentence.split())


def test_no_verdict_is_typed_into_prose(source):
    assert list(typed_verdicts(source)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("With few weights FISH beats chance.", True),
        ("The gates do better than random masks, and are small.", True),
        ("A random half percent ends close to full fine-tuning.", True),
        ("These masks cannot be told from the lasso.", True),
        ("On reviews FISH did *worse* than chance.", True),
        ("Whether FISH beats chance is what the cell prints.", False),
        ("A cleverer choice has to beat chance.", False),
        ("The authors report that FISH matches full fine-tuning.", False),
        (":::{admonition} Paper and code\nFISH beats chance.\n:::", False),
        ("It is better to say so early.", False),
    ],
)
def test_a_typed_verdict_is_found(text, found):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    assert bool(list(typed_verdicts(notebook))) == found


def test_the_table_of_contents_lists_every_chapter():
    listed = re.findall(r"file: (chapters/\S+)", (BOOK / "_toc.yml").read_text())
    assert listed == [f"chapters/{page.stem}" for page in PAGES]
    assert listed


def test_notebook_is_valid_and_committed_without_outputs(source):
    nbformat.validate(source)
    assert (source.nbformat, source.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in source.cells}) == len(source.cells)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(source))


def test_what_is_executed_is_what_is_published(source):
    assert "execution" not in source.metadata
    for cell in source.cells:
        assert "skip-execution" not in cell.metadata.get("tags", [])
        assert "nbmake" not in cell.metadata


def test_first_code_cell_prepares_colab_as_in_every_chapter(source):
    first = code_cells(source)[0].source
    assert 'if "google.colab" in sys.modules:' in first
    assert "--no-deps" in first
    assert first == code_cells(read(PAGES[0]))[0].source


def test_page_follows_the_template(source):
    text = prose(source)
    assert [part for part, pattern in TEMPLATE.items() if not re.search(pattern, text)] == []


def test_page_reads_well_unrendered(source):
    text = prose(source)
    assert re.findall(r"^[ ]*`{3,}\{.*", text, re.MULTILINE) == [], (
        "directives stand in colon fences"
    )
    assert (
        re.findall(
            r"</?[a-zA-Z][^<>]*>", re.sub(r"<https?:[^>]*>", "", without_code_and_math(text))
        )
        == []
    )


def test_every_equation_has_a_check_that_states_a_wrong_variant(source):
    equations, checked = dict(labelled(source)), list(checks(source))
    assert equations
    assert [
        label
        for label, count in Counter(label for label, _ in labelled(source)).items()
        if count > 1
    ] == []
    assert [label for label in equations if not label.startswith("eq-")] == []
    assert [label for label, _, wrong in checked if not wrong] == []
    after = {label for label, index, _ in checked if index > equations.get(label, index)}
    assert set(equations) - after == set(), "labelled, but no cell that follows checks it"
    assert {label for label, _, _ in checked} - set(equations) == set(), (
        "checked, but no equation has this label"
    )


def test_every_equation_was_seen_to_hold_and_its_wrong_variant_to_fail(source, executed):
    lines = printed(executed)
    for label, _ in labelled(source):
        assert any(
            re.match(rf"{re.escape(label)} holds: .*; fails when ", line) for line in lines
        ), label


def test_at_least_three_exercises_each_with_a_folded_solution(source):
    found = list(directives(source))
    exercises = [options.get("label") for kind, _, options in found if kind == "exercise"]
    solutions = {argument: options for kind, argument, options in found if kind == "solution"}
    assert len(exercises) >= 3
    assert sorted(exercises) == sorted(solutions)
    assert [
        label
        for label, options in solutions.items()
        if "dropdown" not in options.get("class", "").split()
    ] == []


def test_every_code_cell_was_executed_once_in_order_without_noise(executed):
    cells = code_cells(executed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [
        output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"
    ] == []
