"""selective_lite: choose a few of a pretrained model's own weights, and train only those.

Four verbs: *score* every weight, *select* exactly k, *train* only these, *ship* the difference as one small file.
"""

from .adapters import adapters, add_adapters, linear_weights, merge_adapters, remove_adapters
from .gates import HardConcrete, deterministic_gate, hard_concrete, open_probability
from .ledger import activation_bytes, ledger, predicted_ledger
from .masked import masked
from .params import head_weights, resolve_budget, snapshot, weights
from .scores import (
    exclude,
    expected_squared_gradient,
    gradient_magnitude,
    magnitude,
    model_loss,
    movement,
    squared_gradient,
    taylor,
    uniform,
)
from .select import Selection, random_nonzero, rule, select, shuffled
from .ship.compose import combine
from .ship.container import DeltaError
from .ship.delta import Delta, diff, load
from .ship.describe import describe
from .ship.shira import to_shira
from .train import Phase, constant, cosine_decay, dense, fit, fixed_mask, linear_decay

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "Delta", "DeltaError", "HardConcrete", "Phase", "Selection", "activation_bytes", "adapters", "add_adapters",
    "combine", "constant", "cosine_decay", "dense", "describe", "deterministic_gate", "diff", "exclude",
    "expected_squared_gradient", "fit", "fixed_mask", "gradient_magnitude", "hard_concrete", "head_weights", "ledger",
    "linear_decay", "linear_weights", "load", "magnitude", "masked", "merge_adapters", "model_loss", "movement",
    "open_probability", "predicted_ledger", "random_nonzero", "remove_adapters", "resolve_budget", "rule", "select",
    "shuffled", "snapshot", "squared_gradient", "taylor", "to_shira", "uniform", "weights",
]
