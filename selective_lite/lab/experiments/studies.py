"""The studies by name: a row names the study that made it."""

from . import four_deltas, movies, results, tweets
from .run import Study

# The larger studies run on a GPU only.
LARGER = (movies.ALL_DOMAINS, tweets.LARGER)
STUDIES: dict[str, Study] = {
    study.name: study for study in (movies.STUDY, four_deltas.STUDY, tweets.STUDY, *LARGER)
}
results.ROOTS.update({name: study.roots for name, study in STUDIES.items()})
