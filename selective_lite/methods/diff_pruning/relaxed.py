"""Diff Pruning's relaxed model: theta0 plus gated differences, their expected number, the cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...params import head_weights, preserve_modes, resolve_budget, unwrap, weights
from ...selection import Selection, select
from ..hard_concrete import HardConcrete, Stretch
from .gated import Penalty, gated_weights, trained_dtype
from .groups import Groups

U_EPS = 1e-4  # the authors' code keeps u in [1e-4, 1 - 1e-4]
STRETCH: Stretch = (-1.5, 1.5)  # the authors' interval


class Relaxed(nn.Module):
    """The model with gated differences: call it instead of the model.

    In training mode every call draws new gates; in evaluation mode the gates are deterministic. The
    model's own weights stay theta0; differences and gates are float32 for a model in half
    precision, and so is the head that is trained.

    Parameters
    ----------
    model
        Any module; tied weights share one gate.
    groups
        Groups of the second gates: ``None`` (unstructured), ``"tensor"``, ``"head"``, ``"layer"``,
        or a function like those in `groups`.
    penalty
        ``"product"`` of the probabilities (the paper), or ``"sum"`` (the authors' code).
    stretch, log_alpha
        Interval and initial location of all gates; the authors' are (-1.5, 1.5) and 5. beta is 1.
    seed
        Seed of the CPU generator that draws the gates.
    head
        Prefixes of the task head, as in `weights`.
    exclude
        Names or prefixes of candidates without a gate, which stay theta0. They still count in a
        fraction's total.

    Attributes
    ----------
    names
        The gated weights' names, in model order; `w`, `log_alpha` and `group_ids` have this order.
    w
        The differences, one parameter per gated weight, zero at first.
    log_alpha, log_alpha_group
        Locations of the gates, a list of parameters like `w`; and of the groups' gates, a vector,
        or None.
    head
        What to train of the task head: its own parameters, or float32 copies of those in half
        precision, which `store_head` writes back.
    threshold
        A deterministic gate is 0 if its log_alpha is at or below it.

    Raises
    ------
    ValueError
        For an option outside its range, groups that do not fit the model, or a grouped model of
        several dtypes or devices.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> x = torch.ones(1, 3)
    >>> bool((Relaxed(model)(x) == model(x)).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Groups = None,
        penalty: Penalty = "product",
        stretch: Stretch = STRETCH,
        log_alpha: float = 5.0,
        seed: int = 0,
        head: Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        theta, ids = gated_weights(model, groups, penalty, stretch, head, exclude)
        model = unwrap(model)
        self.shapes = {name: tuple(p.shape) for name, p in weights(model, head).items()}
        # functional_call wants names as torch has them, wrappers inside the model included.
        paths = {id(p): path for path, p in model.named_parameters()}
        heads = list(head_weights(model, head).values())
        self.model, self.penalty, self.names = model, penalty, list(theta)
        self.threshold = math.log(-stretch[0] / stretch[1])
        self.generator = torch.Generator().manual_seed(seed)
        self.paths = [paths[id(p)] for p in theta.values()]
        self.head_paths = [paths[id(p)] for p in heads]
        self.head = nn.ParameterList(
            p if p.dtype == trained_dtype(p) else nn.Parameter(p.detach().to(trained_dtype(p)))
            for p in heads
        )
        self.w = nn.ParameterList(
            torch.zeros_like(p, dtype=trained_dtype(p)) for p in theta.values()
        )

        def gates(shape: Sequence[int], like: Tensor) -> HardConcrete:
            return HardConcrete(
                shape,
                beta=1.0,
                stretch=stretch,
                eps=U_EPS,
                log_alpha=log_alpha,
                dtype=like.dtype,
                device=like.device,
            )

        modules = nn.ModuleList(gates(w.shape, w) for w in self.w)
        self.gates = cast("Sequence[HardConcrete]", modules)  # a ModuleList forgets what it holds
        self.group_gates: HardConcrete | None = None
        self.group_ids: list[Tensor] = []
        if ids is not None:
            self.group_ids = [ids[name].to(self.w[0].device) for name in self.names]
            self.group_gates = gates((1 + max(int(i.max()) for i in self.group_ids),), self.w[0])

    @property
    def log_alpha(self) -> list[nn.Parameter]:
        """Locations of the weights' gates, in the order of `names`."""
        return [gates.log_alpha for gates in self.gates]

    @property
    def log_alpha_group(self) -> nn.Parameter | None:
        """Locations of the groups' gates, if there are groups."""
        return None if self.group_gates is None else self.group_gates.log_alpha

    def differences(self) -> dict[str, Tensor]:
        """The differences of all gated weights.

        Returns
        -------
        dict
            ``{name: delta}``, shapes of the weights, at least float32, with gradient: a sample in
            training mode, under deterministic gates in evaluation mode.
        """
        group = None if self.group_gates is None else self.group_gates(self.generator)
        found = {}
        for i, name in enumerate(self.names):
            # (eq-diff)  delta = z * w;  structured: delta = z * z_g * w
            delta = self.gates[i](self.generator) * self.w[i]
            found[name] = delta if group is None else delta * group[self.group_ids[i]]
        return found

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's output at theta0 + delta."""
        composed: dict[str, Tensor] = {}
        for path, delta in zip(self.paths, self.differences().values(), strict=True):
            theta0 = self.model.get_parameter(path).detach()
            composed[path] = (theta0 + delta).to(theta0.dtype)
        for path, trained in zip(self.head_paths, self.head, strict=True):
            own = self.model.get_parameter(path)
            if trained is not own:
                composed[path] = trained.to(own.dtype)
        return functional_call(self.model, composed, args, kwargs)

    def expected_l0(self) -> Tensor:
        """E[L0], the expected number of non-zero differences, a scalar with gradient."""
        terms = self.expected_l0_by_tensor()
        total = torch.stack(list(terms.values())).sum()
        if self.group_gates is not None and self.penalty == "sum":
            # The authors' code: one term for every weight, plus one for every group, as if an open
            # gate of either kind cost something by itself.
            total = total + self.group_gates.expected_l0()
        return total

    def expected_l0_by_tensor(self) -> dict[str, Tensor]:
        """The weights' terms of `expected_l0`, ``{name: scalar}``."""
        group = None
        if self.group_gates is not None and self.penalty == "product":
            group = self.group_gates.open_probability()
        terms = {}
        for i, name in enumerate(self.names):
            # (eq-expected-l0)  E[L0] = sum P(z != 0);  structured: sum P(z != 0) P(z_g != 0)
            p_open = self.gates[i].open_probability()
            terms[name] = (
                p_open.sum() if group is None else (p_open * group[self.group_ids[i]]).sum()
            )
        return terms

    @torch.no_grad()
    def count_open(self) -> int:
        """How many differences pass the deterministic gates.

        A projection can choose from these, except where w is 0.
        """
        shared = self.log_alpha_group
        group = None if shared is None else shared > self.threshold
        count = 0
        for i, alpha in enumerate(self.log_alpha):
            passed = alpha > self.threshold
            count += int((passed if group is None else passed & group[self.group_ids[i]]).sum())
        return count

    @torch.no_grad()
    def project(self, budget: int | float) -> tuple[Selection, dict[str, Tensor]]:
        """The k largest |delta| under deterministic gates, and delta itself.

        Parameters
        ----------
        budget
            k, a count or a fraction of the candidates.

        Returns
        -------
        Selection
            Exactly k positions.
        dict
            ``{name: delta}``, as `differences` in evaluation mode.

        Raises
        ------
        ValueError
            If fewer than k differences are non-zero.
        """
        with preserve_modes(self):
            delta = self.eval().differences()
        k = resolve_budget(budget, sum(map(prod, self.shapes.values())))
        found = sum(int(d.count_nonzero()) for d in delta.values())
        if found < k:
            raise ValueError(
                f"budget={budget} asks for {k} weights, but only {found} differences passed their "
                "gates: the penalty was too strong, or the relaxed phase too short; lower lam, add "
                "epochs, or lower the budget"
            )
        selection = select({name: d.abs() for name, d in delta.items()}, k)
        return replace(selection, shapes=self.shapes, method="Diff Pruning"), delta

    @torch.no_grad()
    def store_head(self) -> None:
        """Write the head's float32 copies, if there are any, into the model."""
        for path, trained in zip(self.head_paths, self.head, strict=True):
            self.model.get_parameter(path).copy_(trained)
