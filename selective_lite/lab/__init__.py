"""Lab: everything under the book that is not the library: data, experiments and figures."""

from . import experiments, upper_layers
from .data.sentiment import evaluate, load_task
from .device import device, seed_everything
from .equations import check
from .experiments import results
from .figures import comparison, explorers, memory, plots
from .history import History, track
from .models import load_classifier, load_language_model

__all__ = [
    "History",
    "check",
    "comparison",
    "device",
    "evaluate",
    "experiments",
    "explorers",
    "load_classifier",
    "load_language_model",
    "load_task",
    "memory",
    "plots",
    "results",
    "seed_everything",
    "track",
    "upper_layers",
]
