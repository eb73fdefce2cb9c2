"""Diff Pruning against the numbers of the authors' code (Guo et al. 2021): gates, one relaxed step, its gradients."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.diff_pruning import U_EPS, Relaxed
from tests.parity.authors import AuthorsAdamW

DATA = Path(__file__).resolve().parents[1] / "data"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def load(name):
    with np.load(DATA / name, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_the_authors_concrete_gate_and_its_gradient(case):
    golden = load("diffpruning_concrete.npz")
    log_alpha = golden["alpha"].clone().requires_grad_()
    stretch = float(golden[f"{case}_l"]), float(golden[f"{case}_r"])
    z = sl.hard_concrete(log_alpha, golden[f"{case}_u"], beta=1.0, stretch=stretch, eps=U_EPS)
    torch.testing.assert_close(z.detach(), golden[f"{case}_z"], **TOLERANCE)
    assert torch.equal(z == 0, golden[f"{case}_z"] == 0)
    z.sum().backward()
    torch.testing.assert_close(log_alpha.grad, golden[f"{case}_dz_dalpha"], **TOLERANCE)


class Toy(nn.Module):
    """The five-wide model of the golden step: a mean of embeddings, two residual layers, a pooler, a classifier."""

    def __init__(self):
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = nn.Embedding(7, 5)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(5, 5)}) for _ in range(2)
        )
        self.bert.pooler = nn.Linear(5, 5)
        self.classifier = nn.Linear(5, 3)

    def forward(self, ids):
        hidden = self.bert.embeddings(ids).mean(1)
        for layer in self.bert.encoder.layer:
            hidden = hidden + torch.tanh(layer["dense"](hidden))
        return self.classifier(torch.tanh(self.bert.pooler(hidden)))


class GivenNoise(Relaxed):
    """Relaxed training on stored noise instead of drawn."""

    def __init__(self, model, u):
        super().__init__(model)
        self.u = u

    def _gate(self, log_alpha):
        (noise,) = (u for u, own in zip(self.u, self.log_alpha, strict=True) if own is log_alpha)
        return sl.hard_concrete(log_alpha, noise, beta=1.0, stretch=self.stretch, eps=U_EPS)


@pytest.fixture
def golden():
    return load("diffpruning_step_unstructured.npz")


@pytest.fixture
def relaxed(golden):
    model = Toy()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden[f"theta0/{name}"])
        for p, name in (
            (model.classifier.weight, "classifier.weight"),
            (model.classifier.bias, "classifier.bias"),
        ):
            p += golden[
                f"w/{name}"
            ]  # the authors train a difference of the head too, without a gate
    made = GivenNoise(model, [golden[f"u/{name}"] for name in sl.weights(model)])
    with torch.no_grad():
        for i, name in enumerate(made.names):
            made.w[i].copy_(golden[f"w/{name}"])
            made.log_alpha[i].copy_(golden[f"alpha/{name}"])
    return made


def penalty(relaxed, golden):
    """The authors' lambda is one number a layer: embeddings, blocks, and last the rest."""
    lam = golden["sparsity_pen_per_layer"].float()
    of = {"embeddings": lam[0], "layer.0": lam[1], "layer.1": lam[2], "pooler": lam[3]}
    terms = relaxed.expected_l0_by_tensor()
    return sum(
        next(v for key, v in of.items() if f".{key}." in f"{name}.") * term
        for name, term in terms.items()
    )


def test_the_composed_weights_and_the_loss(golden, relaxed):
    for name, delta in relaxed.differences().items():
        theta = relaxed.model.get_parameter(name) + delta
        torch.testing.assert_close(theta, golden[f"theta_composed/{name}"], **TOLERANCE)
        z = torch.where(
            relaxed.w[relaxed.names.index(name)] == 0,
            0,
            delta / relaxed.w[relaxed.names.index(name)],
        )
        assert torch.equal(z == 0, golden[f"z_total/{name}"] == 0)
    loss = nn.functional.cross_entropy(relaxed(golden["ids"]), golden["labels"])
    torch.testing.assert_close(loss.detach(), golden["loss"].reshape(()), **TOLERANCE)


def test_the_expected_l0(golden, relaxed):
    found = relaxed.expected_l0_by_tensor()
    per_layer = [
        sum(term for name, term in found.items() if key in name)
        for key in ("embeddings", "layer.0", "layer.1", "pooler")
    ]
    torch.testing.assert_close(
        torch.stack(per_layer).double(), golden["l0_pen_per_layer"], **TOLERANCE
    )
    expected = golden["l0_pen_sum_elementwise_only"].float()
    torch.testing.assert_close(relaxed.expected_l0().detach(), expected, **TOLERANCE)


def test_the_gradients_and_the_step(golden, relaxed):
    model, data = relaxed.model, [(golden["ids"], golden["labels"])]
    head = list(sl.head_weights(model))
    steps = []

    def before_step(progress, optimizer):
        for name, w, log_alpha in zip(relaxed.names, relaxed.w, relaxed.log_alpha, strict=True):
            torch.testing.assert_close(w.grad, golden[f"grad_w_preclip/{name}"], **TOLERANCE)
            torch.testing.assert_close(
                log_alpha.grad, golden[f"grad_alpha_preclip/{name}"], **TOLERANCE
            )
        for name in head:
            torch.testing.assert_close(
                model.get_parameter(name).grad, golden[f"grad_theta/{name}"], **TOLERANCE
            )
        steps.append("checked")

    phase = sl.Phase(
        "relaxed",
        [
            {
                "params": [*relaxed.w, *(model.get_parameter(name) for name in head)],
                "lr": float(golden["w_lr"]),
            },
            {"params": list(relaxed.log_alpha), "lr": float(golden["alpha_lr"])},
        ],
        epochs=1,
        penalty=lambda: penalty(relaxed, golden),
        before_step=before_step,
        model=relaxed,
        clip=1.0,
    )
    sl.fit(
        model,
        [phase],
        data,
        loss=lambda called, batch: nn.functional.cross_entropy(called(batch[0]), batch[1]),
        optimizer=partial(AuthorsAdamW, eps=1e-8),
    )
    assert steps == ["checked"]
    for name, w, log_alpha in zip(relaxed.names, relaxed.w, relaxed.log_alpha, strict=True):
        torch.testing.assert_close(w.detach(), golden[f"w_after/{name}"], **TOLERANCE)
        torch.testing.assert_close(log_alpha.detach(), golden[f"alpha_after/{name}"], **TOLERANCE)
        assert torch.equal(model.get_parameter(name), golden[f"theta0/{name}"])
    for name in head:
        theta = golden[f"theta0/{name}"] + golden[f"w_after/{name}"]
        torch.testing.assert_close(model.get_parameter(name).detach(), theta, **TOLERANCE)
