"""What each method promises about the weights that it trains: each promise is tested, and nothing else is claimed."""

from __future__ import annotations

from typing import Literal

Promise = Literal["exact k", "rule-sized", "nearest", "rest bit-identical", "sparse", "additive"]

MEANING: dict[Promise, str] = {
    "exact k": "exactly the asked number of weights is trained, beside the head",
    "rule-sized": "a rule on names, not a budget, says how many weights are trained",
    "nearest": "the number of trained weights is the nearest to the budget that whole modules allow",
    "rest bit-identical": "every weight that is neither selected nor of the head keeps its bits",
    "sparse": "what was trained ships as a delta of the selected weights, small modules and the head alone",
    "additive": "modules are trained beside the base's own weights, which keep their bits until a module is merged",
}

_SELECTED: tuple[Promise, ...] = ("exact k", "rest bit-identical", "sparse")
_RULE: tuple[Promise, ...] = ("rule-sized", "rest bit-identical", "sparse")

# A row a method, by the name of its function; a method that trains every weight promises nothing.
PROMISES: dict[str, tuple[Promise, ...]] = {
    "full_finetuning": (),
    "layerwise_rates": (),
    "child_tuning_f": (),
    "last_layers": ("rule-sized", "rest bit-identical"),  # half of a model is no sparse delta
    "bitfit": _RULE,
    "fixed_mask": _SELECTED,
    "fish": _SELECTED,
    "child_tuning_d": _SELECTED,
    "lt_sft": _SELECTED,
    "diff_pruning": _SELECTED,
    "sara": _SELECTED,  # given a budget; weights that outgrow the threshold stop training, and are still in the delta
    "spt": ("nearest", "rest bit-identical", "sparse"),
    "sora": (
        "additive",
        "rest bit-identical",
    ),  # merged in the end: a matrix that had a module then differs everywhere
}


def table() -> str:
    """The promises as a Markdown table: a row a method, a column a promise."""
    columns = list(MEANING)
    rows = [["method", *columns], ["---"] * (1 + len(columns))]
    rows += [
        [f"`{name}`", *("yes" if c in made else "" for c in columns)]
        for name, made in PROMISES.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
