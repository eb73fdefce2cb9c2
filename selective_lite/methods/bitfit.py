"""BitFit (Ben Zaken, Ravfogel and Goldberg 2022, ACL): train the biases, nothing else.

A rule is a selection too, and its size follows from the model: about 0.1 % of a BERT. Weights of
norms are not biases. The paper's smaller variant takes the biases of the queries and of the first
projection in the MLP (its b_q and b_m2), half as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..params import weights
from ..selection import Selection
from .rules import select_tensors

# The paper's variant, as `transformers` names BERT's modules.
QUERY_AND_MLP = ("query", "intermediate.dense")


def is_bias(name: str) -> bool:
    """Whether a parameter's own name says bias: ``bias``, ``in_proj_bias``, ``bias_ih_l0``."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


def bitfit(
    model: nn.Module, parts: Sequence[str] | None = None, *, head: Sequence[str] | None = None
) -> Selection:
    """All biases outside the head, whole, or those of the modules that `parts` names.

    Parameters
    ----------
    model
        Any module.
    parts
        Whole dotted parts of names, anywhere in a bias's name: ``("query", "intermediate.dense")``.
        ``"output.dense"`` is in the attention blocks as well as in the MLPs. ``None`` takes every
        bias.
    head
        As in `weights`.

    Returns
    -------
    Selection
        Whole tensors; its ``method`` is ``"BitFit"``.

    Raises
    ------
    ValueError
        If the model has no bias (Llama and its kin), or a part is in no bias's name.

    Examples
    --------
    >>> records = fit(model, fixed_mask(model, bitfit(model), lr=1e-3, epochs=3), batches)
    """
    # (eq-bitfit)  y = W x + b,  only b is trained
    names = [name for name in weights(model, head) if is_bias(name)]
    if not names:
        raise ValueError(
            "model has no bias outside its head, so BitFit has nothing to train; "
            "choose a method that selects weights"
        )
    if parts is not None:
        wanted = (parts,) if isinstance(parts, str) else tuple(parts)
        for part in wanted:
            if not any(_has(name, part) for name in names):
                raise ValueError(
                    f"parts={part!r} is in no bias's name; their names are such as {names[:3]}"
                )
        names = [name for name in names if any(_has(name, part) for part in wanted)]
    found = select_tensors(model, lambda name, _: name in names, head)
    return replace(found, method="BitFit")


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."
