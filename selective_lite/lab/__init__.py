"""What the book stands on: assets, models, tasks, progress, plots and explorers."""

from . import explorers, ledgers, plots, results
from .device import device, seed_everything
from .equations import check
from .models import load_classifier, load_language_model
from .progress import History, track
from .tasks import evaluate, load_task

__all__ = [
    "History",
    "check",
    "device",
    "evaluate",
    "explorers",
    "ledgers",
    "load_classifier",
    "load_language_model",
    "load_task",
    "plots",
    "results",
    "seed_everything",
    "track",
]
