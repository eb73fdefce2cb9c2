"""FISH mask (Sung, Nair and Raffel 2021, NeurIPS): train the weights with the largest Fisher information.

The Fisher information of a weight is its expected squared gradient, taken sample by sample. The k
weights that have most of it, over the whole model at once, are chosen before training and never
again: the mask is fixed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Literal

from torch import nn

from ..scores import (
    Batch,
    Loss,
    Scores,
    exclude,
    expected_squared_gradient,
    model_loss,
    squared_gradient,
)
from ..selection import Selection, select
from ..training import Phase, fixed_mask

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
        Scored in evaluation mode, and put back.
    batches
        Mappings of tensors whose first dimension is the sample.
    samples
        How many samples are used, in the order of `batches`; all where there are fewer. The authors
        use 1,024.
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
    if fisher not in ("empirical", "sampled", "expected"):
        raise ValueError(
            f"fisher={fisher!r} is unknown; choose 'empirical', 'sampled' or 'expected'"
        )
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    part = first_samples(batches, samples)
    if fisher == "expected":
        return expected_squared_gradient(model, part, head=head)
    # (eq-fish)  F_w = sum_i (d -log p(y_i | x_i) / d w)^2
    labels: Literal["given", "model"] = "given" if fisher == "empirical" else "model"
    return squared_gradient(model, part, labels=labels, loss=loss, head=head, seed=seed)


def first_samples(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first `samples` samples, in batches; the last one is cut."""
    for batch in batches:
        size = min(samples, len(next(iter(batch.values()))))
        yield {key: value[:size] for key, value in batch.items()}
        samples -= size
        if samples == 0:
            return


def fish_mask(scores: Scores, budget: int | float, *, frozen: Sequence[str] = ()) -> Selection:
    """The k weights with the most Fisher information of the whole model; errors as in `select` and `exclude`."""
    # (eq-fish-mask)  M_w = 1 if F_w is among the k largest, else 0
    return select(exclude(scores, frozen), budget)


def fish(
    model: nn.Module,
    budget: int | float,
    batches: Iterable[Batch],
    *,
    lr: float,
    epochs: int,
    samples: int = 1024,
    fisher: Fisher = "empirical",
    loss: Loss = model_loss,
    lr_head: float | None = None,
    head: Sequence[str] | None = None,
    frozen: Sequence[str] = (),
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Generator[Phase, None, None]:
    """A method: score with the Fisher information, select k, train those.

    The head is trained beside the k weights. In the authors' code it is inside: k = int(all *
    ratio) - |classifier|.

    Parameters
    ----------
    model
        Any module, trained in place.
    budget
        k, a count or a fraction of the candidates.
    batches
        What the weights are scored on, such as the training batches.
    lr, lr_head, epochs, weight_decay
        As in `fixed_mask`.
    samples, fisher, loss, head, seed
        As in `fisher_information`.
    frozen
        Names or prefixes of tensors that are not selected from, such as a convolution, which no
        mask can train a part of.

    Yields
    ------
    Phase
        ``"FISH"``. Exactly k weights are trained, beside the head.

    Raises
    ------
    ValueError
        As in `fisher_information`, `select` and `masked`; the model is then unchanged.
    """
    scores = fisher_information(
        model, batches, samples=samples, fisher=fisher, loss=loss, head=head, seed=seed
    )
    selection = fish_mask(scores, budget, frozen=frozen)
    del scores  # as large as the model
    yield from fixed_mask(
        model,
        selection,
        lr=lr,
        epochs=epochs,
        lr_head=lr_head,
        head=head,
        weight_decay=weight_decay,
        name="FISH",
    )
