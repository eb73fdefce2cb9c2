"""Lab: everything under the book that is not the library: data, experiments and figures."""

from . import experiments, upper_layers
from .data.sentiment import evaluate, load_task
from .device import device, seed_everything
from .equations import check
from .experiments import results
from .figures import advice, atlas, comparison, explorers, memory, papers, plots
from .history import History, track
from .models import load_classifier, load_language_model

__all__ = [
    "History",
    "advice",
    "atlas",
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
    "papers",
    "plots",
    "results",
    "seed_everything",
    "track",
    "upper_layers",
]
