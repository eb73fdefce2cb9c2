"""The studies by name: a row names the one that made it, so that its code can be asked for."""

from collections.abc import Iterable

from . import below_chance, causal, four_deltas, movies, relaxation, results, reviews, tweets
from .results import Roots, Row
from .run import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        *(reviews.STUDY, reviews.SECOND_STUDY, causal.STUDY, movies.STUDY, movies.ALL_DOMAINS),
        *(below_chance.STUDY, below_chance.CONTROLS, relaxation.STUDY),
        *(tweets.STUDY, tweets.LARGER, four_deltas.STUDY),
    )
}


# provenance: apart, of pages too: a test says whether rows are stale
def roots_of(row: Row) -> Roots:
    """Definitions that a row follows from: by its study and config, else those that it names.

    Files may move: only what a study says today counts for its rows.
    """
    study = STUDIES.get(row.get("study", ""))
    return row["roots"] if study is None else study.roots(row["config"])


def today(row: Row) -> str:
    """Hash of the code that would make a row today; empty if that code is not there any more."""
    return results.today(row, roots_of)


def changed(rows: Iterable[Row]) -> list[Row]:
    """The rows whose code has changed since they were made."""
    return results.changed(rows, roots_of)


def stale(rows: Iterable[Row]) -> list[Row]:
    """The rows whose code has changed, except those of the first edition, which say so instead."""
    return results.stale(rows, roots_of)
