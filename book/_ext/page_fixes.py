"""Repair what the stock pages get wrong.

Scripts, the language of Chinese terms, ARIA roles, ids, and docstrings.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

HAN = re.compile(r"([\u3400-\u9fff][\u3000-\u303f\u3400-\u9fff\uff00-\uffef]*)")


class MarkChinese(SphinxPostTransform):
    """Wrap each run of Chinese in ``<span lang="zh">``: it is pronounced and set in Chinese."""

    default_priority = 900

    def run(self, **kwargs: Any) -> None:
        """Split every text node of prose that holds Chinese."""
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(
                text.parent, (nodes.literal, nodes.literal_block, nodes.raw)
            ) or not HAN.search(text):
                continue
            # docutils turns the class language-zh into the attribute lang="zh"
            parts = [
                nodes.inline(part, part, classes=["language-zh"])
                if HAN.match(part)
                else nodes.Text(part)
                for part in HAN.split(text.astext())
                if part
            ]
            text.parent.replace(text, parts)


def keep_scripts_once(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Drop thebe and inline scripts that are listed twice.

    Thebe would load from a network; a second ``let`` of the same name is an error.
    """
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = (getattr(script, "attributes", None) or {}).get("body") or ""
        if "thebe" in f"{script}{body}" or (body and body in seen):
            continue
        seen.add(body)
        kept.append(script)
    context["script_files"] = kept


# what docutils, myst-nb and sphinx-exercise write -> what browsers and screen readers need
MARKUP = {
    # ARIA has withdrawn the former, and a list holds items
    'role="doc-biblioentry"': 'role="listitem"',
    '<summary aria-label="Toggle hidden content">': "<summary>",  # the words in it say more
    # one id for all exercises, and nothing links to it
    '<section id="exercise-content">': "<section>",
    '<section id="solution-content">': "<section>",
}


def correct_markup(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Correct the roles, names and ids of a page's body."""
    for wrong, right in MARKUP.items():
        context["body"] = context.get("body", "").replace(wrong, right)


def keep_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let docstrings write an absolute value as ``|w|``.

    reStructuredText would take that for a substitution.
    """
    for number, line in enumerate(lines):
        parts = line.split("``")
        lines[number] = "``".join(
            part if literal % 2 else part.replace("|", r"\|") for literal, part in enumerate(parts)
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform and the hooks with Sphinx."""
    app.add_post_transform(MarkChinese)
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("html-page-context", keep_scripts_once, priority=900)
    app.connect("html-page-context", correct_markup, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
