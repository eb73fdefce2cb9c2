"""FISH mask (Sung, Nair and Raffel 2021, NeurIPS): train the weights with the most information.

The Fisher information of a weight is its expected squared gradient, taken sample by sample. The k
weights that have most of it, over the whole model at once, are chosen before training and never
again: the mask is fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..batches import Batch, Loss, batch_size, model_loss, take, to_device
from ..kernels.checks import one_of
from ..layers.masked import check_candidates
from ..params import resolve_budget, weights
from ..scores import Scores, accumulate, add_square, squared_gradient
from ..scores import exclude as without
from ..selection import Selection, select

Fisher = Literal["empirical", "sampled", "expected"]


def fisher_information(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    samples: int = 1024,
    fisher: Fisher = "empirical",
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
    seed: int = 0,
) -> Scores:
    """The diagonal Fisher information of every candidate, summed over samples.

    Parameters
    ----------
    model
        The model, scored in evaluation mode; its modes are restored.
    batches
        Mappings or tuples of tensors whose first dimension is the sample.
    samples
        Number of samples used, in the order of `batches`; all of them if there are fewer. The
        authors use 1,024.
    fisher
        ``"empirical"`` takes the given labels (the authors' default); ``"sampled"`` draws one label
        a sample from the model; ``"expected"`` weighs every class with its probability (both are
        the true Fisher, for classifiers).
    loss
        ``(model, batch) -> scalar``; the expected form has -log p of the logits instead.
    head
        As in `weights`.
    seed
        Seed of the CPU generator that draws labels.

    Returns
    -------
    dict
        As in `squared_gradient`.

    Raises
    ------
    ValueError
        For an unknown option, fewer than one sample, and as in `squared_gradient` and
        `expected_squared_gradient`.
    """
    one_of("fisher", fisher, ("empirical", "sampled", "expected"))
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    part = first_samples(batches, samples)
    if fisher == "expected":
        return expected_squared_gradient(model, part, head=head)
    # (eq-fish)  F_i = sum_j (d -log p(y_j | x_j) / d theta_i)^2
    labels: Literal["given", "model"] = "given" if fisher == "empirical" else "model"
    return squared_gradient(model, part, labels=labels, loss=loss, head=head, seed=seed)


def expected_squared_gradient(
    model: nn.Module, batches: Iterable[Batch], *, head: Sequence[str] | None = None
) -> Scores:
    """Sum over samples of the squared gradient expected under the model's labels: the true Fisher.

    As many backward passes as there are classes, so it is for classifiers of few of them;
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
                logits = model(**inputs).logits
            if logits.dim() != 2:
                what = f"logits have shape {tuple(logits.shape)}, not (samples, classes)"
                raise ValueError(f"{what}; use squared_gradient")
            for label in range(logits.shape[1]):
                yield {**inputs, "labels": torch.full_like(logits[:, 0], label, dtype=torch.long)}

    def root_of_term(model: nn.Module, part: Batch) -> Tensor:
        inputs = {key: value for key, value in part.items() if key != "labels"}
        log_p = model(**inputs).logits.log_softmax(-1)[0, int(part["labels"])]
        # (eq-expected-fisher)  F_i = sum_j sum_y p(y | x_j) (d -log p(y | x_j) / d theta_i)^2
        # (the root of a term here, which is squared below)
        return -log_p * log_p.detach().exp().sqrt()

    return accumulate(model, parts(), root_of_term, head, add_square, per_sample=True)


def first_samples(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first `samples` samples, in batches; the last one is cut."""
    for batch in batches:
        size = min(samples, batch_size(batch))
        yield take(batch, 0, size)
        samples -= size
        if samples == 0:
            return


def fish(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: int | float,
    *,
    samples: int = 1024,
    fisher: Fisher = "empirical",
    loss: Loss = model_loss,
    head: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Selection:
    """The FISH mask: the k candidates with the most Fisher information, over the whole model.

    The task head is trained in addition to these k weights. In the authors' code it is part of the
    budget: k = int(all * ratio) - |classifier|.

    Parameters
    ----------
    model, batches, samples, fisher, loss, head, seed
        As in `fisher_information`.
    budget
        k, a count or a fraction of the candidates.
    exclude
        Names or prefixes of tensors that are not selected from; they still count in a fraction's
        total.

    Returns
    -------
    Selection
        Exactly k positions; its ``method`` is ``"FISH"``.

    Raises
    ------
    TypeError, ValueError
        For a bad option, or tensors that cannot be selected in part (all of them are named),
        before anything is scored; and as in `fisher_information` and `select`.

    Examples
    --------
    >>> selection = fish(model, batches, 0.005)
    >>> records = fit(model, fixed_mask(model, selection, lr=1e-3, epochs=3), batches)
    """
    candidates = weights(model, head)
    resolve_budget(budget, sum(p.numel() for p in candidates.values()))
    check_candidates(model, head, exclude)
    scores = fisher_information(
        model, batches, samples=samples, fisher=fisher, loss=loss, head=head, seed=seed
    )
    # (eq-fish-mask)  m_i = 1 if F_i is among the k largest, else 0
    return replace(select(without(scores, exclude), budget), method="FISH")
