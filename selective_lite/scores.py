"""Scores: one number for every candidate weight, the larger the more worth training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from . import params
from .batches import (
    Batch,
    Batches,
    Loss,
    batch_size,
    check_loss,
    model_loss,
    samples_of,
    tensors_of,
    to_device,
    with_tensors,
)
from .heads import Head, Names
from .kernels.checks import one_of
from .kernels.per_sample import Samples, add_gradients
from .kernels.sampled import precise
from .kernels.uses import Add
from .params import in_masked_training, names_under, weights

Scores = dict[str, Tensor]
Order = Literal[1, 2]


def magnitude(model: Module, head: Head = None) -> Scores:
    """|w| for every candidate, in its shape and dtype; ``largest=False`` selects the small ones."""
    return {name: p.detach().abs() for name, p in weights(model, head).items()}


def squared_gradient(
    model: Module,
    batches: Batches,
    *,
    reduction: Literal["per_sample", "batch"] = "per_sample",
    labels: Literal["given", "model"] = "given",
    loss: Loss = model_loss,
    head: Head = None,
    seed: int = 0,
) -> Scores:
    """Sum of squared gradients, the diagonal Fisher information times the number of samples.

    ``"per_sample"`` sums (dL_i/dw)^2 over samples (Sung et al. 2021, FISH); ``"batch"`` sums the
    square of each batch's mean gradient, which is what the code of SPT and Child-Tuning-D computes.

    Samples go together, many in one forward and backward pass, where that gives what they give one
    by one, up to rounding; a first sample is scored both ways to see that it does. Models with
    routed experts, LSTM, Mamba, or hooks are scored one by one: the same scores, up to three times
    slower. A pass keeps about 512 MiB of activations at most, and one weight's gradient of one
    sample.

    Parameters
    ----------
    model
        The model, scored in evaluation mode; mode, gradients and ``requires_grad`` are put back.
    batches
        Mappings of tensors whose first dimension is the sample.
    reduction
        What is squared: each sample's gradient, or each batch's mean gradient.
    labels
        ``"given"`` uses the batch's ``labels`` (empirical Fisher); ``"model"`` draws them from
        ``softmax(logits)`` (true Fisher, by sampling; for classifiers, whose labels belong to the
        logits at their place).
    loss
        ``(model, batch) -> scalar``, a mean over samples.
    head
        As in `weights`.
    seed
        Seed of the CPU generator that draws labels.

    Returns
    -------
    dict
        Non-negative scores in each weight's shape, on its device, float32 (float64 for float64
        weights).

    Raises
    ------
    ValueError
        For an unknown option, no batch, a non-finite score, or scores that are all zero.
    """
    one_of("reduction", reduction, ("per_sample", "batch"))
    one_of("labels", labels, ("given", "model"))
    generator = torch.Generator().manual_seed(seed)

    def labelled() -> Iterator[Batch]:
        for batch in batches:
            if labels == "model":
                batch = to_device(batch, model)
                batch = {**batch, "labels": _drawn_labels(model, batch, generator)}
            yield batch

    per_sample = reduction == "per_sample"
    return accumulate(model, labelled(), loss, head, add_square, per_sample=per_sample)


def gradient_magnitude(
    model: Module, batches: Batches, *, loss: Loss = model_loss, head: Head = None
) -> Scores:
    """|sum of the batches' mean gradients|; arguments, errors as in `squared_gradient`."""
    total = accumulate(model, batches, loss, head, Tensor.add_)
    return {name: g.abs_() for name, g in total.items()}


def taylor(
    model: Module, batches: Batches, *, order: Order = 1, loss: Loss = model_loss, head: Head = None
) -> Scores:
    """How much the loss would change if a weight were set to zero, by Taylor expansion.

    Order 1 is |g w| with the full gradient g (Molchanov et al. 2019). Order 2 is |-g w + h w^2 / 2|
    with the diagonal empirical Fisher as h (LeCun et al. 1990, with Fisher for the Hessian); g and
    h are means over samples. Arguments and errors as in `squared_gradient`.
    """
    one_of("order", order, (1, 2))
    w = {name: p.detach() for name, p in weights(model, head).items()}
    if order == 1:
        g = accumulate(model, batches, loss, head, Tensor.add_)
        return {n: g[n].mul_(w[n]).abs_() for n in w}
    batches = list(batches)
    g = accumulate(model, batches, loss, head, Tensor.add_, per_sample=True)
    h = accumulate(model, batches, loss, head, add_square, per_sample=True)
    samples = sum(map(batch_size, batches))
    return {n: (h[n] * w[n] / 2 - g[n]).mul_(w[n] / samples).abs_() for n in w}


def exclude(scores: Mapping[str, Tensor], names: Names) -> Scores:
    """The scores with zeros for tensors not to be selected from; `select` never takes a zero.

    Parameters
    ----------
    scores
        ``{name: tensor}``; it is not changed, and what is not excluded is not copied.
    names
        Names or dotted prefixes of tensors. They still count in a fraction's total.

    Raises
    ------
    ValueError
        If a prefix names nothing.
    """
    out = set(names_under(names, scores, "exclude"))
    return {name: torch.zeros_like(s) if name in out else s for name, s in scores.items()}


@torch.no_grad()
def _drawn_labels(model: Module, batch: Batch, generator: torch.Generator) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    p = logits.float().softmax(-1).cpu()
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return drawn.reshape(p.shape[:-1]).to(logits.device)


def add_square(total: Tensor, gradient: Tensor) -> None:
    """Add the square of a gradient to a sum."""
    total.addcmul_(gradient, gradient)


def accumulate(
    model: Module, batches: Batches, loss: Loss, head: Head, add: Add, *, per_sample: bool = False
) -> Scores:
    """Sum what `add` makes of the gradients of batches, or of their samples, for every candidate.

    No two gradients are held. Samples are scored many at a time where that gives the same, up to
    rounding, as one by one: see `kernels.per_sample`. ``.grad`` is left alone. Other arguments,
    errors as in `squared_gradient`.
    """
    if in_masked_training(model):
        raise ValueError("model is in masked training; leave that before it is scored")
    candidates = weights(model, head)
    # In half precision a sum of a thousand squares would saturate.
    sums = {p: torch.zeros_like(p, dtype=precise(p)) for p in candidates.values()}
    batch = None

    def alone(batch: Batch) -> None:
        found = loss(model, batch)
        check_loss(found, batch, "in scoring")
        add_gradients(found, sums, add)

    samples = Samples(model, loss, sums, add, alone)
    modes, flags = params.preserve_modes(model), params.only_trainable(model, sums)
    with modes, flags, torch.enable_grad():
        model.eval()
        for batch in batches:
            batch = to_device(batch, model)
            if not per_sample:
                alone(batch)
            elif (tensors := tensors_of(batch)) is not None:
                samples(tensors, partial(with_tensors, batch))
            else:
                for sample in samples_of(batch):
                    alone(sample)
    if batch is None:
        raise ValueError("batches is empty; a gradient score needs at least one batch")
    scores = {name: sums[p] for name, p in candidates.items()}
    check_scores(scores)
    return scores


NOT_FINITE = "scores[{!r}] has a value that is not finite; check the loss and the model's weights"
ALL_ZERO = "scores are zero for every weight; a zero-initialised head passes no gradient: train it"


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` if a score is not finite (it names the tensor), or if all are zero."""
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(NOT_FINITE.format(name))
    if not any(score.any() for score in scores.values()):
        raise ValueError(ALL_ZERO)
