"""Diff Pruning against the numbers of the authors' code (Guo et al. 2021).

Gates, a relaxed step with its gradients, and the start of the fixed phase; only the noise is given.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.diff_pruning import U_EPS, diff_pruning
from tests.parity.authors import AuthorsAdamW

DATA = Path(__file__).resolve().parents[1] / "data"
LAYERS = ("embeddings", "layer.0", "layer.1", "pooler")  # each has its own lambda
LR_W, LR_ALPHA, K = 1e-3, 0.1, 12


def load(name):
    with np.load(DATA / name, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(found, expected):
    """Assert equality to rtol 1e-5, and to 1e-6 of the largest number: many gradients are 3e-5."""
    torch.testing.assert_close(
        found.detach(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_the_authors_concrete_gate_and_its_gradient(case):
    golden = load("diffpruning_concrete.npz")
    log_alpha = golden["alpha"].clone().requires_grad_()
    stretch = float(golden[f"{case}_l"]), float(golden[f"{case}_r"])
    z = sl.hard_concrete(log_alpha, golden[f"{case}_u"], beta=1.0, stretch=stretch, eps=U_EPS)
    close(z, golden[f"{case}_z"])
    assert torch.equal(z == 0, golden[f"{case}_z"] == 0)
    z.sum().backward()
    close(log_alpha.grad, golden[f"{case}_dz_dalpha"])


class Toy(nn.Module):
    """The five-wide model of the golden step."""

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


@pytest.fixture(scope="module")
def golden():
    return load("diffpruning_step_unstructured.npz")


@pytest.fixture
def model(golden):
    model = Toy()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden[f"theta0/{name}"])
        for name, p in model.classifier.named_parameters(prefix="classifier"):
            # The authors train a difference of the head too, without a gate.
            p += golden[f"w/{name}"]
    return model


@pytest.fixture
def begin(golden, model, monkeypatch):
    """begin(lam) -> the relaxed phase at the golden differences, gates and noise, and the rest."""

    def made(lam=1e-4):
        rest = iter(
            diff_pruning(model, K, lr_w=LR_W, lr=LR_W, lr_alpha=LR_ALPHA, epochs=(1, 1), lam=lam)
        )
        phase = next(rest)
        relaxed = phase.model
        with torch.no_grad():
            for name, w, log_alpha in zip(relaxed.names, relaxed.w, relaxed.log_alpha, strict=True):
                w.copy_(golden[f"w/{name}"])
                log_alpha.copy_(golden[f"alpha/{name}"])
        noise = iter([golden[f"u/{name}"] for name in relaxed.names])

        def rand(shape, *, generator, device):
            u = next(noise)
            assert tuple(shape) == u.shape
            return u

        monkeypatch.setattr(torch, "rand", rand)
        return phase, rest

    return made


def cross_entropy(called, batch):
    return nn.functional.cross_entropy(called(batch[0]), batch[1])


def train(model, phases, golden):
    batches = [(golden["ids"], golden["labels"])]
    optimizer = partial(AuthorsAdamW, eps=1e-8)
    return sl.fit(model, phases, batches, loss=cross_entropy, optimizer=optimizer)


def test_the_composed_weights(golden, model, begin):
    phase, _ = begin()
    for name, delta in phase.model.differences().items():
        close(model.get_parameter(name) + delta, golden[f"theta_composed/{name}"])
        opened = golden[f"z_total/{name}"] != 0
        assert torch.equal(delta != 0, opened & (golden[f"w/{name}"] != 0))


def test_the_expected_l0(golden, begin):
    phase, _ = begin(lam=1.0)
    found = phase.model.expected_l0_by_tensor()
    per_layer = [sum(term for name, term in found.items() if key in name) for key in LAYERS]
    close(torch.stack(per_layer).double(), golden["l0_pen_per_layer"])
    close(phase.penalty().double(), golden["l0_pen_sum_elementwise_only"].reshape(()))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_of_the_relaxed_phase(golden, model, begin, layer):
    # The authors' lambda is one number for each layer, ours one number: it is each of theirs in
    # turn, and the gates of that layer are compared.
    lam = float(golden["sparsity_pen_per_layer"][LAYERS.index(layer)])
    phase, _ = begin(lam)
    relaxed, head = phase.model, list(sl.head_weights(model))
    (record,) = train(model, [phase], golden)
    close(torch.tensor(record["loss"]), golden["loss"].reshape(()))
    for name, w, log_alpha in zip(relaxed.names, relaxed.w, relaxed.log_alpha, strict=True):
        # No norm reaches 1: clipping changes no gradient.
        close(w.grad, golden[f"grad_w_preclip/{name}"])
        close(w, golden[f"w_after/{name}"])
        assert torch.equal(model.get_parameter(name), golden[f"theta0/{name}"])
        if layer in name:
            close(log_alpha.grad, golden[f"grad_alpha_preclip/{name}"])
            close(log_alpha, golden[f"alpha_after/{name}"])
    for name in head:
        p = model.get_parameter(name)
        close(p.grad, golden[f"grad_theta/{name}"])
        close(p, golden[f"theta0/{name}"] + golden[f"w_after/{name}"])


def test_the_fixed_phase_starts_where_the_relaxed_phase_ended(golden, model, begin):
    # The authors keep the largest of one drawn sample; the projection here has no noise.
    phase, rest = begin()
    relaxed = phase.model
    train(model, [phase], golden)
    with torch.no_grad():
        for name, log_alpha in zip(relaxed.names, relaxed.log_alpha, strict=True):
            log_alpha.copy_(golden[f"alpha_after/{name}"])
    delta = {
        name: (3 * golden[f"alpha_after/{name}"].sigmoid() - 1.5).clamp(0, 1)
        * golden[f"w_after/{name}"]
        for name in relaxed.names
    }
    least = torch.cat([d.abs().flatten() for d in delta.values()]).sort().values[-K]
    fixed = next(rest)
    for name in relaxed.names:
        chosen = (delta[name].abs() >= least * (1 - 1e-5)).flatten().nonzero()[:, 0]
        found = fixed.selection.indices.get(name, torch.empty(0, dtype=torch.int64))
        assert torch.equal(found, chosen)
    train(model, [fixed], golden)
    rest.close()  # the trained values are in the model
    for name in relaxed.names:
        kept = delta[name].abs() >= least * (1 - 1e-5)
        theta, theta0 = model.get_parameter(name).detach(), golden[f"theta0/{name}"]
        assert torch.equal(theta[~kept], theta0[~kept])
        if kept.any():
            # A first step of Adam moves every weight by the learning rate.
            start = (theta0 + delta[name])[kept]
            close(theta[kept], start + LR_W * torch.sign(theta[kept] - start))
