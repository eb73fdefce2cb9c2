"""Diff Pruning (Guo, Rush and Kim 2021, ACL): learn a sparse difference to the pretrained weights.

theta = theta0 + z * w, with a Hard-Concrete gate z for every weight. The expected L0 norm of the
difference has a gradient and is penalised: *relax*. Then *project* on the k largest differences,
and train those alone: *fix*. In the structured variant a second gate opens or closes a whole group;
a weight is active only where both gates are open.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...gates import Stretch, check_stretch, deterministic_gate, hard_concrete, open_probability
from ...params import head_weights, resolve_budget, weights
from ...selection import Selection, select
from ...training import Phase, constant, fixed_mask
from .calibration import Calibration
from .groups import GROUPINGS, Grouping

U_EPS = 1e-4  # the authors' code keeps u in [1e-4, 1 - 1e-4]


class Relaxed(nn.Module):
    """The model with gated differences: call it in the model's place.

    In training mode every call draws new gates; in evaluation mode the gates are deterministic. The
    model's own weights are theta0 throughout; only the head is trained in place.

    Parameters
    ----------
    model
        Any module; tied weights share one gate.
    groups
        ``None`` (unstructured), ``"tensor"``, ``"head"``, ``"layer"``, or a function like those in
        `groups`.
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
            raise ValueError(
                f"penalty={penalty!r} is unknown; choose 'product' (paper) or 'sum' (authors' code)"
            )
        if isinstance(groups, str) and groups not in GROUPINGS:
            raise ValueError(
                f"groups={groups!r} is unknown; choose one of {tuple(GROUPINGS)}, None or a function"
            )
        theta = weights(model, head)
        grouping = GROUPINGS[groups] if isinstance(groups, str) else groups
        self.model, self.stretch, self.penalty = model, stretch, penalty
        self.threshold = math.log(
            -stretch[0] / stretch[1]
        )  # a deterministic gate is 0 at and below it
        self.names = list(theta)
        self.generator = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterList([torch.zeros_like(p) for p in theta.values()])
        self.log_alpha = nn.ParameterList([torch.full_like(p, log_alpha) for p in theta.values()])
        self.log_alpha_group: nn.Parameter | None = None
        self.group_ids: list[Tensor] = []
        if grouping is not None:
            kinds = {f"{p.dtype} on {p.device}" for p in theta.values()}
            if len(kinds) > 1:
                raise ValueError(
                    f"model has weights of {sorted(kinds)}; gates of groups need one dtype and one device"
                )
            ids = grouping(model, theta)
            device = self.w[0].device
            self.group_ids = [ids[name].to(device) for name in self.names]
            count = 1 + max(int(i.max()) for i in self.group_ids)
            full = torch.full((count,), float(log_alpha), dtype=self.w[0].dtype, device=device)
            self.log_alpha_group = nn.Parameter(full)

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
        composed = {
            name: theta0[name].detach() + delta for name, delta in self.differences().items()
        }
        return functional_call(self.model, composed, args, kwargs)

    def expected_l0(self) -> Tensor:
        """E[L0], the expected number of non-zero differences, a scalar with gradient."""
        terms = self.expected_l0_by_tensor()
        total = torch.stack(list(terms.values())).sum()
        if self.log_alpha_group is not None and self.penalty == "sum":
            # The authors' code: one term for every weight, plus one for every group, as if either
            # gate cost alone.
            total = (
                total + open_probability(self.log_alpha_group, beta=1.0, stretch=self.stretch).sum()
            )
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
            terms[name] = (
                p_open.sum() if group is None else (p_open * group[self.group_ids[i]]).sum()
            )
        return terms

    @torch.no_grad()
    def count_open(self) -> int:
        """How many differences pass the deterministic gates: what a projection can choose from, where w is not 0."""
        group = None if self.log_alpha_group is None else self.log_alpha_group > self.threshold
        count = 0
        for i, alpha in enumerate(self.log_alpha):
            passed = alpha > self.threshold
            count += int((passed if group is None else passed & group[self.group_ids[i]]).sum())
        return count

    @torch.no_grad()
    def project(self, budget: int | float) -> tuple[Selection, dict[str, Tensor]]:
        """The k largest |delta| under deterministic gates, and delta itself.

        Raises
        ------
        ValueError
            If fewer than k differences are non-zero.
        """
        mode, self.training = self.training, False  # of the gates alone: the model is not called
        try:
            delta = self.differences()
        finally:
            self.training = mode
        k = resolve_budget(budget, sum(d.numel() for d in delta.values()))
        found = sum(int(d.count_nonzero()) for d in delta.values())
        if found < k:
            raise ValueError(
                f"budget={budget} asks for {k} weights, but only {found} differences passed their gates: the penalty "
                "was too strong, or the relaxed phase too short; lower lam, add epochs, or lower the budget"
            )
        return select({name: d.abs() for name, d in delta.items()}, k), delta


def weights_by_name(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters of a model, in the order of `names`."""
    named = dict(model.named_parameters())
    return {name: named[name] for name in names}


def diff_pruning(
    model: nn.Module,
    budget: int | float,
    *,
    lr_w: float,
    lr: float,
    epochs: tuple[int, int],
    lr_alpha: float = 0.3,
    lr_head: float | None = None,
    lam: float = 1e-7,
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
        Learning rates of the differences w (linear decay), and of all gates (constant, as in the
        authors' code; they use 0.1 and thousands of steps: a gate has some 13 logits to go).
    lr, lr_head
        Of the selected weights in the fixed-mask phase, and of the head in both phases (default:
        `lr`).
    epochs
        Of the relaxed phase, and of the fixed-mask phase.
    lam
        Where lambda starts; `Calibration` then steers it so that a little more than k gates end
        open.
    groups, penalty, seed, head
        As in `Relaxed`.

    Yields
    ------
    Phase
        ``"relaxed"``, whose ``model`` is the `Relaxed` wrapper and whose ``after_step`` is the
        calibration's; then ``"fixed mask"``. Exactly k weights differ at the end, beside the head.

    Raises
    ------
    ValueError
        For a bad budget or option, or if fewer than k differences survive the relaxed phase (model
        left at theta0).
    """
    relaxed = Relaxed(model, groups=groups, penalty=penalty, seed=seed, head=head)
    k = resolve_budget(budget, sum(p.numel() for p in relaxed.w))
    calibration = Calibration(relaxed, k, lam)
    rate = lr if lr_head is None else lr_head
    alphas = list(relaxed.log_alpha) + (
        [] if relaxed.log_alpha_group is None else [relaxed.log_alpha_group]
    )
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
