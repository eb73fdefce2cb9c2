"""selective_lite: choose a few of a pretrained model's own weights, and train only those.

Four verbs: *score* every weight, *select* exactly k, *train* only these, *ship* the difference as
one small file. A method that ends in a selection is a function that returns a `Selection`; a method
of several phases is a function that returns phases for `fit`.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from .batches import model_loss
from .heads import HeadWarning
from .layers.small import adapters, add_adapters, linear_weights, merge_adapters, remove_adapters
from .memory import activation_bytes, ledger, predicted_ledger
from .methods.bitfit import bitfit
from .methods.child_tuning import child_tuning, child_tuning_f
from .methods.controls import random, random_nonzero, random_scores, shuffled
from .methods.diff_pruning import diff_pruning
from .methods.fish import expected_squared_gradient, fish, fisher_information
from .methods.fixed_mask import fixed_mask, full_finetuning
from .methods.freezing import last_layers, layerwise_rates
from .methods.hard_concrete import (
    HardConcrete,
    deterministic_gate,
    hard_concrete,
    open_probability,
)
from .methods.lt_sft import lt_sft, movement
from .methods.rules import select_tensors
from .methods.sara import sara, smaller_than, smallest
from .methods.sora import SoRA, sora
from .methods.spt import allocate, spt
from .params import head_weights, resolve_budget, snapshot, weights
from .scores import (
    exclude,
    gradient_magnitude,
    magnitude,
    squared_gradient,
    taylor,
)
from .selection import Selection, select
from .ship.arithmetic import combine, compose
from .ship.delta import Delta, load
from .ship.describe import describe
from .ship.diff import diff
from .ship.file import DeltaError
from .ship.peft import to_shira
from .ship.tuning import Tuning, masked
from .training import (
    Phase,
    Phases,
    Step,
    constant,
    cosine_decay,
    fit,
    linear_decay,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - by verb
    # score
    "exclude",
    "expected_squared_gradient",
    "fisher_information",
    "gradient_magnitude",
    "magnitude",
    "movement",
    "random_scores",
    "squared_gradient",
    "taylor",
    # select
    "Selection",
    "random_nonzero",
    "select",
    "select_tensors",
    "shuffled",
    "smaller_than",
    # methods that are selections
    "bitfit",
    "child_tuning",
    "fish",
    "last_layers",
    "random",
    "smallest",
    # train
    "Phase",
    "Phases",
    "Step",
    "Tuning",
    "constant",
    "cosine_decay",
    "fit",
    "fixed_mask",
    "full_finetuning",
    "linear_decay",
    "masked",
    "model_loss",
    # methods that are phases
    "SoRA",
    "allocate",
    "child_tuning_f",
    "diff_pruning",
    "layerwise_rates",
    "lt_sft",
    "sara",
    "sora",
    "spt",
    # ship
    "Delta",
    "DeltaError",
    "combine",
    "compose",
    "describe",
    "diff",
    "hf",
    "load",
    "to_shira",
    # parameters, gates, small modules, memory
    "HardConcrete",
    "HeadWarning",
    "activation_bytes",
    "adapters",
    "add_adapters",
    "deterministic_gate",
    "hard_concrete",
    "head_weights",
    "ledger",
    "linear_weights",
    "merge_adapters",
    "open_probability",
    "predicted_ledger",
    "remove_adapters",
    "resolve_budget",
    "snapshot",
    "weights",
]

# The first edition's names, each with the one that it has now.
_RENAMED = {"uniform": "random_scores", "rule": "select_tensors", "dense": "full_finetuning"}


def __getattr__(name: str) -> Any:
    """`hf` when it is asked for, since it imports transformers; and the first edition's names."""
    if name == "hf":
        return importlib.import_module(".hf", __name__)
    if name in _RENAMED:
        now = _RENAMED[name]
        warnings.warn(f"sl.{name} is now sl.{now}", DeprecationWarning, stacklevel=2)
        return globals()[now]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
