"""selective_lite: choose a few of a pretrained model's own weights, and train only those.

Four verbs: *score* every weight, *select* exactly k, *train* only these, *ship* the difference as
one small file.
"""

from .gates import HardConcrete, deterministic_gate, hard_concrete, open_probability
from .heads import HeadWarning
from .layers.masked import masked
from .layers.small import adapters, add_adapters, linear_weights, merge_adapters, remove_adapters
from .memory import activation_bytes, ledger, predicted_ledger
from .params import head_weights, resolve_budget, snapshot, weights
from .scores import (
    exclude,
    expected_squared_gradient,
    gradient_magnitude,
    magnitude,
    model_loss,
    movement,
    random_scores,
    squared_gradient,
    taylor,
)
from .selection import Selection, random_nonzero, select, select_tensors, shuffled
from .ship.arithmetic import combine
from .ship.delta import Delta, diff, load
from .ship.describe import describe
from .ship.file import DeltaError
from .ship.peft import to_shira
from .training import Phase, constant, cosine_decay, fit, fixed_mask, full_finetuning, linear_decay

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "Delta", "DeltaError", "HardConcrete", "Phase", "Selection", "activation_bytes", "adapters", "add_adapters",
    "combine", "constant", "cosine_decay", "describe", "deterministic_gate", "diff", "exclude",
    "expected_squared_gradient", "fit", "fixed_mask", "full_finetuning", "gradient_magnitude", "hard_concrete",
    "head_weights", "ledger", "linear_decay", "linear_weights", "load", "magnitude", "masked", "merge_adapters",
    "model_loss", "movement", "open_probability", "predicted_ledger", "random_nonzero", "random_scores",
    "remove_adapters", "resolve_budget", "select", "select_tensors", "shuffled", "snapshot", "squared_gradient",
    "taylor", "to_shira", "weights",
]
