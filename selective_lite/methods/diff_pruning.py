"""Diff Pruning (Guo, Rush and Kim 2021, ACL): learn a sparse difference to the pretrained weights.

theta = theta0 + z * w, with a Hard-Concrete gate z for every weight. The expected L0 norm of the difference has a
gradient and is penalised: *relax*. Then *project* on the k largest differences, and train those alone: *fix*. In the
structured variant a second gate opens or closes a whole group; a weight is active only where both gates are open.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..gates import Stretch, check_stretch, deterministic_gate, hard_concrete, open_probability
from ..groups import GROUPINGS, Grouping
from ..params import head_weights, resolve_budget, weights
from ..select import Selection, select
from ..train import Phase, constant, fixed_mask

U_EPS = 1e-4  # the authors' code keeps u in [1e-4, 1 - 1e-4]


class Relaxed(nn.Module):
    """The model with gated differences: call it in the model's place.

    In training mode every call draws new gates; in evaluation mode the gates are deterministic. The model's own
    weights are theta0 throughout; only the head is trained in place.

    Parameters
    ----------
    model
        Any module; tied weights share one gate.
    groups
        ``None`` (unstructured), ``"tensor"``, ``"head"``, ``"layer"``, or a function like those in `groups`.
    penalty
        ``"product"`` of the probabilities (the paper), or ``"sum"`` (the authors' code).
    stretch, log_alpha
        Of all gates; the authors' (-1.5, 1.5) and 5. beta is 1.
    seed
        Of the CPU generator that draws gates.
    head
        As in `weights`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Literal["tensor", "head", "layer"] | Grouping | None = None,
        penalty: Literal["product", "sum"] = "product",
        stretch: Stretch = (-1.5, 1.5),
        log_alpha: float = 5.0,
        seed: int = 0,
        head: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_stretch(stretch)
        if penalty not in ("product", "sum"):
            raise ValueError(f"penalty={penalty!r} is unknown; choose 'product' (paper) or 'sum' (authors' code)")
        if isinstance(groups, str) and groups not in GROUPINGS:
            raise ValueError(f"groups={groups!r} is unknown; choose one of {tuple(GROUPINGS)}, None or a function")
        theta = weights(model, head)
        grouping = GROUPINGS[groups] if isinstance(groups, str) else groups
        self.model, self.stretch, self.penalty = model, stretch, penalty
        self.names = list(theta)
        self.generator = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterList([torch.zeros_like(p) for p in theta.values()])
        self.log_alpha = nn.ParameterList([torch.full_like(p, log_alpha) for p in theta.values()])
        self.log_alpha_group: nn.Parameter | None = None
        if grouping is not None:
            ids = grouping(model, theta)
            device = self.w[0].device
            self.group_ids = [ids[name].to(device) for name in self.names]
            count = 1 + max(int(i.max()) for i in self.group_ids)
            self.log_alpha_group = nn.Parameter(torch.full((count,), float(log_alpha), device=device))

    def _gate(self, log_alpha: Tensor) -> Tensor:
        if not self.training:
            return deterministic_gate(log_alpha, stretch=self.stretch)
        u = torch.rand(log_alpha.shape, generator=self.generator, device="cpu").to(log_alpha)
        return hard_concrete(log_alpha, u, beta=1.0, stretch=self.stretch, eps=U_EPS)

    def differences(self) -> dict[str, Tensor]:
        """delta = z * w (structured: z * z_group * w) for every candidate: a sample, or deterministic in evaluation."""
        group = None if self.log_alpha_group is None else self._gate(self.log_alpha_group)
        found = {}
        for i, name in enumerate(self.names):
            # (eq-diff)  delta = z * w;  structured: delta = z * z_g * w
            delta = self._gate(self.log_alpha[i]) * self.w[i]
            found[name] = delta if group is None else delta * group[self.group_ids[i]]
        return found

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's output at theta0 + delta."""
        theta0 = weights_by_name(self.model, self.names)
        composed = {name: theta0[name].detach() + delta for name, delta in self.differences().items()}
        return functional_call(self.model, composed, args, kwargs)

    def expected_l0(self) -> Tensor:
        """E[L0], the expected number of non-zero differences, a scalar with gradient."""
        terms = self.expected_l0_by_tensor()
        total = torch.stack(list(terms.values())).sum()
        if self.log_alpha_group is not None and self.penalty == "sum":
            # The authors' code: one term for every weight, plus one for every group, as if either gate cost alone.
            total = total + open_probability(self.log_alpha_group, beta=1.0, stretch=self.stretch).sum()
        return total

    def expected_l0_by_tensor(self) -> dict[str, Tensor]:
        """The weights' terms of `expected_l0`, ``{name: scalar}``."""
        group = None
        if self.log_alpha_group is not None and self.penalty == "product":
            group = open_probability(self.log_alpha_group, beta=1.0, stretch=self.stretch)
        terms = {}
        for i, name in enumerate(self.names):
            # (eq-expected-l0)  E[L0] = sum P(z != 0);  structured: sum P(z != 0) P(z_g != 0)
            p_open = open_probability(self.log_alpha[i], beta=1.0, stretch=self.stretch)
            terms[name] = p_open.sum() if group is None else (p_open * group[self.group_ids[i]]).sum()
        return terms

    @torch.no_grad()
    def count_open(self) -> int:
        """How many differences pass the deterministic gates: what a projection can choose from, where w is not 0."""
        left, right = self.stretch
        threshold = math.log(-left / right)  # (eq-deterministic) is 0 below it
        group = None if self.log_alpha_group is None else self.log_alpha_group > threshold
        count = 0
        for i, alpha in enumerate(self.log_alpha):
            passed = alpha > threshold
            count += int((passed if group is None else passed & group[self.group_ids[i]]).sum())
        return count

    @torch.no_grad()
    def project(self, budget: int | float) -> tuple[Selection, dict[str, Tensor]]:
        """The k largest |delta| under deterministic gates, and delta itself.

        Raises
        ------
        ValueError
            If fewer than k differences are non-zero: the penalty was too strong for this budget.
        """
        mode, self.training = self.training, False  # of the gates alone: the model is not called
        try:
            delta = self.differences()
        finally:
            self.training = mode
        return select({name: d.abs() for name, d in delta.items()}, budget), delta


def weights_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters of a model, in the order of `names`."""
    named = dict(model.named_parameters())
    return {name: named[name] for name in names}


class Calibration:
    """Find lambda while training: lead E[L0] from N to the budget along a path.

    The path is the one of gates that all close at one speed: the logit of the share P(z != 0) falls linearly to
    `closed` during the first `reach` of the phase, on top of the weights that are to stay. Half-open gates count in
    E[L0] but not in the projection, which needs k gates that are open: E[L0] is led to where `slack` * k are.
    log(lambda) is steered by the error in logits, in proportion (`gain`) and by its running sum (`memory`).
    """

    def __init__(
        self,
        relaxed: Relaxed,
        k: int,
        lam: float,
        *,
        slack: float = 1.2,
        closed: float = -8.0,
        reach: float = 0.9,
        gain: float = 4.0,
        memory: float = 0.05,
    ) -> None:
        self.relaxed, self.k, self.lam, self.start_lam = relaxed, k, lam, lam
        self.slack, self.closed, self.reach, self.gain, self.memory = slack, closed, reach, gain, memory
        self.total = sum(p.numel() for p in relaxed.w)
        self.expected = self.start = float(relaxed.expected_l0().detach())
        self.open = self.total
        self.errors = 0.0
        self.path: list[dict[str, float]] = []

    def target(self, progress: float) -> float:
        """Where E[L0] should be when the fraction `progress` of the phase is done."""
        half_open = min(max(self.expected / max(self.open, 1), 1.0), 3.0)
        keep = min(self.slack * self.k * half_open, 0.9 * self.start)
        start = _logit((self.start - keep) / (self.total - keep))
        logit = start + (self.closed - start) * min(progress / self.reach, 1.0)
        return keep + (self.total - keep) / (1 + math.exp(-logit))

    def penalty(self) -> Tensor:
        """lambda * E[L0], a scalar with gradient."""
        l0 = self.relaxed.expected_l0()
        self.expected = float(l0.detach())
        return self.lam * l0

    def update(self, progress: float) -> None:
        """One step of lambda; a step's error counts as two logits at most, and lambda never exceeds 1e-3."""
        self.open = self.relaxed.count_open()
        target = self.target(progress)
        self.path.append({"lambda": self.lam, "expected_l0": self.expected, "target": target, "open": float(self.open)})
        error = _logit(self.expected / self.total) - _logit(target / self.total)
        error = max(-2.0, min(2.0, error))
        self.errors += error
        self.lam = min(1e-3, self.start_lam * math.exp(self.gain * error + self.memory * self.errors))


def _logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)  # "sum" counts the groups too, and a saturated gate is surely open
    return math.log(p / (1 - p))


def diff_pruning(
    model: nn.Module,
    budget: int | float,
    *,
    lr_w: float,
    lr: float,
    epochs: tuple[int, int],
    lr_alpha: float = 0.2,
    lr_head: float | None = None,
    lam: float = 1e-6,
    groups: Literal["tensor", "head", "layer"] | Grouping | None = None,
    penalty: Literal["product", "sum"] = "product",
    seed: int = 0,
    head: Sequence[str] | None = None,
) -> Generator[Phase, None, None]:
    """A method: relax, project to exactly k weights, train those.

    Parameters
    ----------
    model
        Any module, trained in place. Its weights stay theta0 until the projection.
    budget
        k, a count or a fraction of the candidates.
    lr_w, lr_alpha
        Learning rates of the differences w (linear decay), and of all gates (constant, as in the authors' code; they
        use 0.1 and thousands of steps: a gate has some 13 logits to go).
    lr, lr_head
        Of the selected weights in the fixed-mask phase, and of the head in both phases (default: `lr`).
    epochs
        Of the relaxed phase, and of the fixed-mask phase.
    lam
        Where lambda starts; `Calibration` then steers it so that a little more than k gates stay open.
    groups, penalty, seed, head
        As in `Relaxed`.

    Yields
    ------
    Phase
        ``"relaxed"``, whose ``model`` is the `Relaxed` wrapper and whose ``after_step`` is the calibration's; then
        ``"fixed mask"``. Exactly k weights differ at the end, beside the head.

    Raises
    ------
    ValueError
        For a bad budget or option, or if fewer than k differences survive the relaxed phase (model left at theta0).
    """
    relaxed = Relaxed(model, groups=groups, penalty=penalty, seed=seed, head=head)
    k = resolve_budget(budget, sum(p.numel() for p in relaxed.w))
    calibration = Calibration(relaxed, k, lam)
    rate = lr if lr_head is None else lr_head
    alphas = list(relaxed.log_alpha) + ([] if relaxed.log_alpha_group is None else [relaxed.log_alpha_group])
    heads = list(head_weights(model, head).values())
    yield Phase(
        "relaxed",
        [
            {"params": list(relaxed.w), "lr": lr_w, "weight_decay": 0.0},
            {"params": alphas, "lr": lr_alpha, "weight_decay": 0.0, "schedule": constant},
            *([{"params": heads, "lr": rate, "weight_decay": 0.0}] if heads else []),
        ],
        epochs[0],
        penalty=calibration.penalty,
        after_step=calibration.update,
        model=relaxed,
    )
    selection, delta = relaxed.project(k)
    # Gates and their gradients, four times the model, are freed before the second phase.
    del relaxed, calibration, alphas
    theta = weights(model, head)
    with torch.no_grad():
        for name, index in selection.indices.items():
            theta[name].view(-1)[index] += delta[name].view(-1)[index]
    del delta
    yield from fixed_mask(model, selection, lr=lr, epochs=epochs[1], lr_head=rate, head=head)
