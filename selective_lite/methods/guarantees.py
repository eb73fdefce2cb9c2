"""The guarantees of each method about the weights that it trains; every one of them is tested."""

from __future__ import annotations

from typing import Literal

Promise = Literal["exact k", "rule-sized", "nearest", "rest bit-identical", "sparse", "additive"]

MEANING: dict[Promise, str] = {
    "exact k": "exactly the asked number of weights is trained, and the head",
    "rule-sized": "a rule on names, not a budget, says how many weights are trained",
    "nearest": "the number of trained weights is the nearest to the budget that modules allow",
    "rest bit-identical": "every weight that is neither selected nor of the head keeps its bits",
    "sparse": "the delta holds only the selected weights, small modules and the head",
    "additive": "modules are trained, and the base's own weights keep their bits until a merge",
}

_SELECTED: tuple[Promise, ...] = ("exact k", "rest bit-identical", "sparse")
_RULE: tuple[Promise, ...] = ("rule-sized", "rest bit-identical", "sparse")

# One row a method, by the name of its function; a method that trains every weight has none.
PROMISES: dict[str, tuple[Promise, ...]] = {
    "full_finetuning": (),
    "layerwise_rates": (),
    "child_tuning_f": (),
    "last_layers": ("rule-sized", "rest bit-identical"),  # half of a model is not sparse
    "bitfit": _RULE,
    "fixed_mask": _SELECTED,
    "fish": _SELECTED,
    "child_tuning": _SELECTED,
    "smallest": _SELECTED,
    "lt_sft": _SELECTED,
    "diff_pruning": _SELECTED,
    # Given a budget. Weights that outgrow the threshold stop training and are in the delta.
    "sara": _SELECTED,
    "spt": ("nearest", "rest bit-identical", "sparse"),
    # Merged in the end: a matrix that had a module then differs everywhere.
    "sora": ("additive", "rest bit-identical"),
}


def table() -> str:
    """The promises as a Markdown table: one row a method, one column a promise."""
    columns = list(MEANING)
    rows = [["method", *columns], ["---"] * (1 + len(columns))]
    rows += [
        [f"`{name}`", *("yes" if c in made else "" for c in columns)]
        for name, made in PROMISES.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
