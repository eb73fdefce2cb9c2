"""Scores: one number for every candidate weight, the larger the more worth training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from .batches import Batch, Loss, check_loss, model_loss, samples_of, to_device
from .params import (
    check_prefixes,
    evaluating,
    in_masked_training,
    is_under,
    only_trainable,
    weights,
)

Scores = dict[str, Tensor]


def magnitude(model: nn.Module, head: Sequence[str] | None = None) -> Scores:
    """|w| for every candidate, in the weight's shape and dtype; ``select(..., largest=False)`` takes the small ones."""
    return {name: p.detach().abs() for name, p in weights(model, head).items()}


def movement(
    model: nn.Module, start: Mapping[str, Tensor], head: Sequence[str] | None = None
) -> Scores:
    """|theta - theta0|, how far training moved each weight (Ansell et al. 2022, LT-SFT).

    Parameters
    ----------
    model
        The trained model, theta.
    start
        Its `snapshot` before training, theta0.
    head
        As in `weights`.

    Raises
    ------
    ValueError
        If `start` lacks a candidate, or holds it in another shape.
    """
    candidates = weights(model, head)
    for name, p in candidates.items():
        if name not in start or start[name].shape != p.shape:
            raise ValueError(
                f"start has no {name!r} of shape {tuple(p.shape)}; give a snapshot of this model"
            )
    return {name: (p.detach() - start[name]).abs() for name, p in candidates.items()}


def random_scores(model: nn.Module, seed: int, head: Sequence[str] | None = None) -> Scores:
    """The control: uniform random scores in (0, 1), float32 on CPU.

    They are a function of `seed` and of the candidates' shapes only.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator, dtype=torch.float32, device="cpu")
    # rand is in [0, 1), and a score of 0 would never be selected
    return {name: 1 - draw(p.shape) for name, p in weights(model, head).items()}


def squared_gradient(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    reduction: Literal["per_sample", "batch"] = "per_sample",
    labels: Literal["given", "model"] = "given",
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
    seed: int = 0,
) -> Scores:
    """Sum of squared gradients, the diagonal Fisher information times the number of samples.

    ``"per_sample"`` sums (dL_i/dw)^2 over samples (Sung et al. 2021, FISH); ``"batch"`` sums the
    square of each batch's mean gradient, which is what the code of SPT and Child-Tuning-D computes.

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
    _one_of("reduction", reduction, ("per_sample", "batch"))
    _one_of("labels", labels, ("given", "model"))
    generator = torch.Generator().manual_seed(seed)

    def parts() -> Iterator[Batch]:
        for batch in batches:
            if labels == "model":
                batch = to_device(batch, model)
                batch = {**batch, "labels": _drawn_labels(model, batch, generator)}
            yield from samples_of(batch) if reduction == "per_sample" else (batch,)

    return _accumulate(model, parts(), loss, head, torch.square)


def gradient_magnitude(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
) -> Scores:
    """|sum of the batches' mean gradients|, the full gradient's size; arguments, errors as in `squared_gradient`."""
    total = _accumulate(model, batches, loss, head, lambda g: g)
    return {name: g.abs_() for name, g in total.items()}


def taylor(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    order: Literal[1, 2] = 1,
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
) -> Scores:
    """How much the loss would change if a weight were set to zero, by Taylor expansion.

    Order 1 is |g w| with the full gradient g (Molchanov et al. 2019). Order 2 is |-g w + h w^2 / 2|
    with the diagonal empirical Fisher as h (LeCun et al. 1990, with Fisher for the Hessian); g and
    h are means over samples. Arguments and errors as in `squared_gradient`.
    """
    _one_of("order", order, (1, 2))
    candidates = weights(model, head)
    if order == 1:
        gradient = _accumulate(model, batches, loss, head, lambda g: g)
        return {name: (gradient[name] * p.detach()).abs_() for name, p in candidates.items()}
    samples = [sample for batch in batches for sample in samples_of(batch)]
    g = _accumulate(model, samples, loss, head, lambda g: g / len(samples))
    h = _accumulate(model, samples, loss, head, lambda g: g.square() / len(samples))
    return {
        name: (h[name] * p.detach() / 2 - g[name]).mul_(p.detach()).abs_()
        for name, p in candidates.items()
    }


def expected_squared_gradient(
    model: nn.Module, batches: Iterable[Batch], *, head: Sequence[str] | None = None
) -> Scores:
    """Sum over samples of the expected squared gradient under the model's own labels: the true Fisher, exactly.

    One backward pass for every sample and class, so it is for classifiers of few classes;
    ``squared_gradient(..., labels="model")`` draws one label a sample instead. Given labels are
    ignored. Source: the ``expect`` of the code of Sung et al. 2021 (FISH).

    Parameters
    ----------
    model
        A classifier whose output has ``logits`` of shape (samples, classes), scored as in
        `squared_gradient`.
    batches, head
        As in `squared_gradient`.

    Returns
    -------
    dict
        As in `squared_gradient`.

    Raises
    ------
    ValueError
        If the logits have another shape, for no batch, a non-finite score, or scores that are all
        zero.
    """

    def parts() -> Iterator[Batch]:
        for batch in batches:
            inputs = {k: v for k, v in to_device(batch, model).items() if k != "labels"}
            with torch.no_grad():
                shape = model(**inputs).logits.shape
            if len(shape) != 2:
                raise ValueError(
                    f"logits have shape {tuple(shape)}, not (samples, classes); use squared_gradient"
                )
            for sample in samples_of(inputs):
                yield from (
                    {**sample, "labels": torch.tensor(c, device="cpu")} for c in range(shape[1])
                )

    def root_of_term(model: nn.Module, part: Batch) -> Tensor:
        log_p = model(
            **{key: value for key, value in part.items() if key != "labels"}
        ).logits.log_softmax(-1)
        log_p = log_p[0, int(part["labels"])]
        # (eq-expected-fisher)  F = sum_i sum_c p(c | x_i) (d -log p(c | x_i) / d w)^2;  the root is squared below
        return -log_p * log_p.detach().exp().sqrt()

    return _accumulate(model, parts(), root_of_term, head, torch.square)


def exclude(scores: Mapping[str, Tensor], names: str | Sequence[str]) -> Scores:
    """The scores with zeros for tensors that must not be selected from; `select` never takes a zero.

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
    prefixes = check_prefixes(names, scores, "exclude")
    return {
        name: torch.zeros_like(s) if is_under(name, prefixes) else s for name, s in scores.items()
    }


def _one_of(argument: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is unknown; choose one of {allowed}")


@torch.no_grad()
def _drawn_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    probabilities = logits.float().softmax(-1).cpu()
    drawn = torch.multinomial(
        probabilities.reshape(-1, probabilities.shape[-1]), 1, generator=generator
    )
    return drawn.reshape(probabilities.shape[:-1]).to(logits.device)


def _accumulate(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    head: Sequence[str] | None,
    of: Callable[[Tensor], Tensor],
) -> Scores:
    """Sum `of(gradient)` over batches for every candidate, holding no two gradients; ``.grad`` is left alone."""
    if in_masked_training(model):
        raise ValueError("model is in masked training; leave that before it is scored")
    candidates = weights(model, head)
    # In half precision a sum of a thousand squares would saturate.
    sums = {
        p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for p in candidates.values()
    }
    batch = None
    with evaluating(model), only_trainable(model, sums), torch.enable_grad():
        for batch in batches:
            batch = to_device(batch, model)
            found = loss(model, batch)
            check_loss(found.detach(), batch, "in scoring")
            _add_gradients(found, sums, of)
    if batch is None:
        raise ValueError("batches is empty; a gradient score needs at least one batch")
    scores = {name: sums[p] for name, p in candidates.items()}
    check_scores(scores)
    return scores


def _add_gradients(
    loss: Tensor, sums: Mapping[nn.Parameter, Tensor], of: Callable[[Tensor], Tensor]
) -> None:
    """Add `of(gradient)` to every sum, and drop each gradient as soon as it is complete."""

    def add(total: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        total += of(gradient.to(total.dtype))
        # What autograd holds in its place: one zero.
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    with ExitStack() as hooks:  # only now: computing the loss may take gradients, too
        for p, total in sums.items():
            hooks.enter_context(p.register_hook(partial(add, total)))
        torch.autograd.grad(loss, list(sums), allow_unused=True)


NOT_FINITE = "scores[{!r}] has a value that is not finite; check the loss and the model's weights"
ALL_ZERO = "scores are zero for every weight; a zero-initialised head passes no gradient: initialise or train it first"


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` that names the tensor if a score is not finite, or if every score is zero."""
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(NOT_FINITE.format(name))
    if not any(score.any() for score in scores.values()):
        raise ValueError(ALL_ZERO)
