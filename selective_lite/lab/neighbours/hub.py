"""LoRAHub (Huang et al. 2024): LoRAs of several tasks, weighed for a new one without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

LoRAs = Mapping[str, tuple[Tensor, Tensor]]  # {weight name: (A, B)}


def combined(hub: Sequence[LoRAs], weights: Sequence[float]) -> LoRAs:
    """One LoRA with the weighted sums of the factors; its product has cross terms, too.

    Parameters
    ----------
    hub
        LoRAs of the same layers and rank: ``{weight name: (A, B)}``, A (r, d_in), B (d_out, r).
    weights
        One for each.

    Raises
    ------
    ValueError
        If there are fewer than two, they differ in layers or shapes, or weights are not as many.

    Examples
    --------
    >>> import torch
    >>> one = {"w": (torch.ones(1, 2), torch.ones(3, 1))}
    >>> A, B = combined([one, one], [0.5, 1.5])["w"]
    >>> (B @ A)[0, 0].item()
    4.0
    """
    check_hub(hub)
    if len(weights) != len(hub):
        raise ValueError(f"weights has {len(weights)} numbers for {len(hub)} LoRAs: one for each")
    # (eq-lorahub)  A = sum_i w_i A_i,  B = sum_i w_i B_i
    found = {}
    for name in hub[0]:
        A, B = (
            torch.stack([w * lora[name][place] for w, lora in zip(weights, hub, strict=True)])
            for place in (0, 1)
        )
        found[name] = A.sum(0), B.sum(0)
    return found


def check_hub(hub: Sequence[LoRAs]) -> None:
    """Raise a ValueError unless there are two LoRAs or more, of the same layers and shapes."""
    if len(hub) < 2:
        raise ValueError(f"hub has {len(hub)} LoRA: weighing takes two at least")
    shapes = [{name: (A.shape, B.shape) for name, (A, B) in lora.items()} for lora in hub]
    for place, found in enumerate(shapes[1:], 1):
        if found != shapes[0]:
            differ = sorted(set(found.items()) ^ set(shapes[0].items()))
            raise ValueError(
                f"hub[{place}] differs from hub[0] in {differ[0][0]!r}: LoRAs of one base, "
                "the same layers and one rank can be summed"
            )


def weigh(
    loss: Callable[[Sequence[float]], float],
    count: int,
    *,
    bound: float = 1.5,
    l1: float = 0.05,
    evaluations: int = 40,
    seed: int = 0,
) -> np.ndarray:
    """Weights for `count` LoRAs that make a loss small, found without gradients.

    Parameters
    ----------
    loss
        Function ``weights -> loss`` on a few examples.
    count
        Number of LoRAs, two or more.
    bound
        Weights stay in [-bound, bound].
    l1
        Times the mean of the absolute weights, added to the loss.
    evaluations
        How often the loss may be asked for.
    seed
        Of the first simplex.

    Returns
    -------
    array
        The best weights that were tried; zeros, the base itself, are tried first.

    Raises
    ------
    ValueError
        If `count` is below two or `evaluations` below ``count + 2``.

    Notes
    -----
    The authors search with Nevergrad; this is SciPy's Nelder-Mead, which has no gradient either.
    """
    if count < 2:
        raise ValueError(f"count={count}: weighing takes two LoRAs at least")
    if evaluations < count + 2:
        raise ValueError(f"evaluations={evaluations}: give {count + 2} at least")
    tried: list[tuple[float, np.ndarray]] = []

    def penalised(weights: np.ndarray) -> float:
        value = float(loss(list(map(float, weights)))) + l1 * float(np.abs(weights).mean())
        tried.append((value, weights.copy()))
        return value

    generator = np.random.default_rng(seed)
    # The base, each LoRA by half, and a little noise, for no two corners may coincide.
    simplex = np.vstack([np.zeros(count), 0.5 * np.eye(count)])
    simplex[1:] += 0.05 * generator.standard_normal((count, count))
    optimize.minimize(
        penalised,
        np.zeros(count),
        method="Nelder-Mead",
        bounds=[(-bound, bound)] * count,
        options={"maxfev": evaluations, "initial_simplex": simplex},
    )
    return min(tried, key=lambda found: found[0])[1]
