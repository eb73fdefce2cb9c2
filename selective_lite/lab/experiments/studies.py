"""The studies by name: a row names the one that made it."""

from . import four_deltas, movies, tweets
from .run import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (movies.STUDY, movies.ALL_DOMAINS, tweets.STUDY, tweets.LARGER, four_deltas.STUDY)
}
