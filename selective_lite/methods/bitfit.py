"""BitFit (Ben Zaken, Ravfogel and Goldberg 2022, ACL): train the biases, nothing else.

A rule is a selection too, and one that sizes itself: about 0.1 % of a BERT. Weights of norms are no
biases. The paper's smaller variant takes the biases of the queries and of the first projection in
the MLP (its b_q and b_m2), half as many.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import nn

from ..params import weights
from ..selection import Selection, select_tensors
from ..training import Phase, fixed_mask

QUERY_AND_MLP = (
    "query",
    "intermediate.dense",
)  # the paper's variant, as `transformers` names BERT's modules


def is_bias(name: str) -> bool:
    """Whether a parameter's own name says that it is a bias: ``bias``, ``in_proj_bias``, ``q_bias``, ``bias_ih_l0``."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.endswith("_bias") or own.startswith("bias_")


def biases(
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

    Raises
    ------
    ValueError
        If the model has no bias (Llama and its kin), or a part is in no bias's name.
    """
    names = [name for name in weights(model, head) if is_bias(name)]
    if not names:
        raise ValueError(
            "model has no bias outside its head, so BitFit has nothing to train; choose a method that selects weights"
        )
    if parts is not None:
        wanted = (parts,) if isinstance(parts, str) else tuple(parts)
        for part in wanted:
            if not any(_has(name, part) for name in names):
                raise ValueError(
                    f"parts={part!r} is in no bias's name; their names are such as {names[:3]}"
                )
        names = [name for name in names if any(_has(name, part) for part in wanted)]
    return select_tensors(model, lambda name, _: name in names, head)


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}."


def bitfit(
    model: nn.Module,
    *,
    lr: float,
    epochs: int,
    parts: Sequence[str] | None = None,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    weight_decay: float = 0.0,
) -> Generator[Phase, None, None]:
    """A method: train the biases and the head.

    Parameters
    ----------
    model, parts, head
        As in `biases`.
    lr, lr_head, epochs, weight_decay
        As in `fixed_mask`.

    Yields
    ------
    Phase
        ``"BitFit"``.

    Raises
    ------
    ValueError
        As in `biases`; the model is then unchanged.
    """
    # (eq-bitfit)  y = W x + b,  only b is trained
    selection = biases(model, parts, head=head)
    yield from fixed_mask(
        model,
        selection,
        lr=lr,
        epochs=epochs,
        lr_head=lr_head,
        head=head,
        weight_decay=weight_decay,
        name="BitFit",
    )
