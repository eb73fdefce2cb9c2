"""SPT's allocation: which matrices get a small module, which vectors are whole, which weights.

Everything counts, and tau, the number of most sensitive weights, is the one at which the total size
meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.checks import one_of
from ...kernels.small import Kind, part_shapes
from ...layers.entries import why_refused
from ...layers.small import find_layers, linear_sizes
from ...params import check_names, check_prefixes, is_under, owners, resolve_budget, weights
from ...scores import check_scores
from ...selection import Selection, select
from .sweep import tau_for


def adapter_size(kind: Kind, d_in: int, d_out: int, rank: int) -> int:
    """How many weights a small module trains.

    r (d_in + d_out) for LoRA, 2 r d_out + r + d_out for an Adapter.
    """
    return sum(prod(shape) for shape in part_shapes(kind, d_in, d_out, rank).values())


@dataclass(frozen=True, eq=False)
class Allocation:
    """What a budget is spent on.

    Attributes
    ----------
    structured
        Names of the matrices that get a small module; their own weights stay frozen.
    whole
        Names of the vectors that are tuned whole.
    selection
        The weights that are tuned one by one, in all other tensors.
    kind, rank
        Kind and rank of every small module.
    tau
        Number of most sensitive weights that the budget is spent on.
    counts
        Trained weights: ``{"structured": int, "whole": int, "unstructured": int}``.
    left_out
        Names of the tensors that took no part: excluded, without a score, or refused by masked
        training.
    """

    structured: tuple[str, ...]
    whole: tuple[str, ...]
    selection: Selection
    kind: Kind
    rank: int
    tau: int
    counts: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def charged(self) -> int:
        """The number of weights that are trained, without the head."""
        return sum(self.counts.values())


def allocate(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    budget: int | float,
    *,
    kind: Kind = "lora",
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
    spend: Literal["nearest", "capped"] = "nearest",
    taus: Sequence[int] | None = None,
    exclude: Sequence[str] = (),
    head: Sequence[str] | None = None,
) -> Allocation:
    """Spend a budget on small modules, whole vectors and single weights.

    A pure function of scores and architecture. Only weights of ``nn.Linear`` and Hugging Face's
    ``Conv1D`` become structured; tensors of at most one dimension are vectors; all other tensors
    are tuned weight by weight. The authors freeze the patch and position embeddings of a vision
    transformer: `exclude` does. The sweep over tau (`sweep`) is linear in the number of scores.

    Parameters
    ----------
    model
        Only its modules' types and its tensors' shapes are read.
    scores
        ``{name: sensitivity}``, such as `squared_gradient` gives; tensors without a score take no
        part.
    budget
        Number of trained weights without the head, a count or a fraction of all candidates; see
        `resolve_budget`.
    kind, rank
        ``"lora"`` or ``"adapter"``, and r >= 1; a small budget needs a low rank.
    alpha
        A matrix becomes structured at module size / alpha sensitive weights, alpha >= 1 (authors'
        code: 10).
    beta
        A vector is tuned whole at length / beta sensitive weights, beta >= 1 (authors' code: 5).
    spend
        Spend what is ``"nearest"`` to the budget (authors' code; it may exceed it), or, with
        ``"capped"``, the most within it.
    taus
        The values of tau to choose from, increasing (authors' code: 20,000 to 1.58 million by
        20,000); default: all.
    exclude
        Names or prefixes of tensors that take no part.
    head
        As in `weights`.

    Raises
    ------
    TypeError, ValueError
        For a bad option, budget, name, shape or rank; scores that are all zero or not finite; a
        budget below the size of the smallest module, or above what can be spent.
    """
    one_of("spend", spend, ("nearest", "capped"))
    if not (1 <= alpha < math.inf and 1 <= beta < math.inf):
        raise ValueError(
            f"alpha={alpha}, beta={beta}: both are finite and at least 1; else the number of "
            "trained weights would fall with tau"
        )
    candidates = weights(model, head)
    used = _used(model, scores, exclude, candidates)
    prices = _prices(model, used, kind, rank, alpha, beta)
    k = resolve_budget(budget, sum(p.numel() for p in candidates.values()))
    least = min((price for name, (_, price) in prices.items() if used[name].dim() == 2), default=0)
    if k < least:
        raise ValueError(
            f"budget={budget} is {k} weights, below {least}, the size of the smallest module at "
            f"rank={rank}; raise the budget, lower the rank, or use select for single weights"
        )

    def cost(name: str, count: Tensor) -> Tensor:
        # (eq-spt-charge)  charge(tau) = sizes of modules + lengths of whole vectors
        #                                + all other sensitive weights
        enough, price = prices.get(name, (0, 0))
        return torch.where(count >= enough, price, count) if price else count

    tau = tau_for(used, cost, k, taus=taus, capped=spend == "capped")
    sensitive = select(used, tau)
    bought = [
        n for n, count in sensitive.per_tensor().items() if n in prices and count >= prices[n][0]
    ]
    structured, whole = (
        tuple(n for n in bought if (used[n].dim() == 2) == matrix) for matrix in (True, False)
    )
    selection = Selection(
        {n: i for n, i in sensitive.indices.items() if n not in bought},
        sensitive.shapes,
        method="SPT",
    )
    counts = {
        "structured": sum(prices[name][1] for name in structured),
        "whole": sum(prices[name][1] for name in whole),
        "unstructured": selection.count,
    }
    left_out = tuple(name for name in candidates if name not in used)
    return Allocation(structured, whole, selection, kind, rank, tau, counts, left_out)


def _prices(
    model: nn.Module, used: Mapping[str, Tensor], kind: Kind, rank: int, alpha: float, beta: float
) -> dict[str, tuple[int, int]]:
    """How many sensitive weights a matrix or vector needs to be trained as one, and its size."""
    places, prices = owners(model), {}
    # A linear layer's weight may get a small module, if it is not tied to another.
    linear = [
        n
        for n, s in used.items()
        if s.dim() == 2 and len(places[n]) == 1 and linear_sizes(places[n][0][0])
    ]
    for name, (_, d_in, d_out) in find_layers(model, dict.fromkeys(linear, rank)).items():
        price = adapter_size(kind, d_in, d_out, rank)
        # (eq-spt-structured)  a matrix gets a small module if it has at least C / kappa_M
        #                      sensitive weights
        prices[name] = math.ceil(price / alpha), price
    for name, score in used.items():
        if score.dim() <= 1:
            # (eq-spt-whole)  a vector is tuned whole if it has at least d / kappa_v sensitive
            #                 weights
            prices[name] = math.ceil(score.numel() / beta), score.numel()
    return prices


def _used(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    exclude: Sequence[str],
    candidates: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The scores of tensors that take part."""
    check_names(scores, candidates, "scores")
    exclude = check_prefixes(exclude, candidates, "exclude")
    for name, score in scores.items():
        if score.shape != candidates[name].shape:
            shape = tuple(candidates[name].shape)
            raise ValueError(
                f"scores[{name!r}] has shape {tuple(score.shape)}, the model {shape}; "
                "score this model"
            )
    places = owners(model)
    used = {
        name: score
        for name, score in scores.items()
        if not is_under(name, exclude) and not any(why_refused(*place) for place in places[name])
    }
    if not used:
        raise ValueError("scores and exclude leave no tensor that can be trained in part")
    check_scores(used)
    return used
