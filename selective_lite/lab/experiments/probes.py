"""Probes: a linear classifier on what a frozen model says of a text.

On the task itself it is the head that every method starts from, and the accuracy that tuning must
beat. On another task it measures forgetting: fitted before the model is tuned, it reads what the
tuned model still says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...params import preserve_modes
from ..data.sentiment import Split, Task

PENALTIES = tuple(10.0**power for power in range(-5, 1))


class Probe(NamedTuple):
    """Weights (classes, d), biases (classes,), and the penalty that validation chose."""

    weight: Tensor
    bias: Tensor
    penalty: float


@torch.no_grad()
def features(model: Any, split: Split, batch_size: int = 128) -> Tensor:
    """What a model's classifier gets of each text, (texts, d), float32, in the split's order."""
    found: list[Tensor] = []
    taken = model.classifier.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    batches = split.batches(batch_size)
    try:
        with preserve_modes(model):
            model.eval()
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        taken.remove()
    order = torch.tensor([i for group in batches.indices() for i in group])
    return torch.cat(found)[order.argsort().to(found[0].device)]


def logistic(inputs: Tensor, labels: Tensor, penalty: float) -> Probe:
    """The logistic regression with the least mean cross entropy + penalty * |W|^2, by L-BFGS."""
    x = inputs.double()
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype, device=x.device)
    bias = weight.new_zeros(len(weight))
    parts = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parts,
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(x @ weight.T + bias, labels)
        value = value + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = (part.detach().to(inputs.dtype) for part in parts)
    return Probe(weight, bias, penalty)


def correct(probe: Probe, inputs: Tensor, labels: Tensor) -> Tensor:
    """Which answers of a probe are right, bool (texts,)."""
    return (inputs @ probe.weight.T + probe.bias).argmax(-1) == labels


def probe(model: Any, task: Task) -> Probe:
    """The probe on a task's training split whose penalty is the best on its validation split."""
    known = {}
    for part, split in (("train", task.train), ("validation", task.validation)):
        inputs = features(model, split)
        known[part] = inputs, torch.tensor(split.labels, device=inputs.device)
    fitted = [logistic(*known["train"], penalty) for penalty in PENALTIES]
    return max(fitted, key=lambda one: float(correct(one, *known["validation"]).float().mean()))


@torch.no_grad()
def install(model: Any, one: Probe) -> None:
    """Make a probe the model's classifier."""
    model.classifier.weight.copy_(one.weight)
    model.classifier.bias.copy_(one.bias)
