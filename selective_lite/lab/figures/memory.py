"""Memory: the bytes of several ways of training, printed and drawn next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.small import Kind, part_shapes
from ...layers.small import find_layers
from ...methods.diff_pruning.gated import trained_dtype
from ...methods.diff_pruning.groups import GROUPINGS
from ...params import weights
from . import plots

Ledgers = Mapping[str, Mapping[str, int]]  # way of training -> kind -> bytes

# Colour and hatch of each kind; what all ways of training share is pale.
LOOKS = {
    "weights": ("#BBBBBB", ""),
    "gradients": (plots.PALETTE[0], "//"),
    "optimizer": (plots.PALETTE[1], ".."),
    "index": (plots.PALETTE[2], "xx"),
    "passing": (plots.PALETTE[3], "--"),
    "activations": (plots.PALETTE[5], ""),
}
PREDICTED = tuple(LOOKS)[:5]  # activations are measured only
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}


def small_modules(
    model: nn.Module, names: Sequence[str], *, kind: Kind = "lora", rank: int = 8
) -> list[Tensor]:
    """The tensors that `add_adapters` would add, on the meta device.

    They are for ``predicted_ledger(..., beside=...)``. Arguments and errors as in `add_adapters`.
    """
    places = find_layers(model, dict.fromkeys(names, rank))
    return [
        torch.empty(shape, dtype=layers[0].weight.dtype, device="meta")
        for layers, d_in, d_out in places.values()
        for shape in part_shapes(kind, d_in, d_out, rank).values()
    ]


def gates(
    model: nn.Module,
    groups: Literal["tensor", "head", "layer"] | None = None,
    head: Sequence[str] | None = None,
) -> list[Tensor]:
    """The tensors that Diff Pruning would add, on the meta device: w, log_alpha, a gate a group.

    They are float32 at least, those of half-precision weights too.
    """
    theta = weights(model, head)
    added = [
        torch.empty(p.shape, dtype=trained_dtype(p), device="meta")
        for _ in ("w", "log_alpha")
        for p in theta.values()
    ]
    if groups is not None:
        ids = GROUPINGS[groups](model, theta)
        count = 1 + max(int(i.max()) for i in ids.values())
        added.append(torch.empty(count, dtype=added[0].dtype, device="meta"))
    return added


def show(measured: Ledgers, predicted: Ledgers | None = None) -> None:
    """Print bytes by kind, a line for each way of training, and draw them as stacked bars.

    Parameters
    ----------
    measured
        ``{label: ledger(...)}``, top to bottom; ``"activations"`` may be among its kinds.
        Predictions alone are drawn the same way.
    predicted
        ``{label: predicted_ledger(...)}`` for some or all of these labels: ticks across a bar where
        its parts should end, and a column of the table.

    Raises
    ------
    ValueError
        If there is no ledger, a kind is unknown, or a prediction has a label that `measured` lacks.
    """
    predicted = {} if predicted is None else predicted
    check(measured, predicted)
    print(table(measured, predicted))
    alt = alt_text(measured, predicted)
    with plots.figure(alt=alt, height=1.4 + 0.42 * len(measured), width=6.6) as (_, ax):
        draw(ax, measured, predicted)


def check(measured: Ledgers, predicted: Ledgers) -> None:
    """Raise the errors of `show`."""
    if not measured:
        raise ValueError(
            "measured is empty; give {label: ledger(...)} for one way of training or more"
        )
    for label, ledger in (*measured.items(), *predicted.items()):
        if label not in measured:
            raise ValueError(
                f"predicted names {label!r}, which is not measured; labels are {list(measured)}"
            )
        if unknown := sorted(set(ledger) - set(LOOKS)):
            raise ValueError(
                f"the ledger of {label!r} has a kind {unknown[0]!r}; kinds are {list(LOOKS)}"
            )


def unit(ledgers: Ledgers) -> tuple[str, int]:
    """The largest unit in which the largest sum is at least 10, and its bytes."""
    largest = max(sum(ledger.values()) for ledger in ledgers.values())
    return next((name, size) for name, size in UNITS.items() if largest >= 10 * size or size == 1)


def short(number: float) -> str:
    """A number with three digits, or more if it has more before its point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def verdict(ledger: Mapping[str, int], predicted: Mapping[str, int]) -> str:
    """How well a prediction fits: ``"exact"``, or the kinds that differ and by how many bytes."""
    differences = {kind: ledger.get(kind, 0) - predicted.get(kind, 0) for kind in PREDICTED}
    return ", ".join(f"{kind} {d:+,} bytes" for kind, d in differences.items() if d) or "exact"


def table(measured: Ledgers, predicted: Ledgers) -> str:
    """A line for each way of training: every kind, their sum, and how well the prediction fits."""
    name, size = unit(measured)
    kinds = [kind for kind in LOOKS if any(ledger.get(kind) for ledger in measured.values())]
    width = max(len(label) for label in (*measured, name)) + 1
    lines = [f"{name:<{width}}" + "".join(f"{kind:>12}" for kind in (*kinds, "sum"))]
    for label, ledger in measured.items():
        numbers = [*map(ledger.get, kinds), sum(ledger.values())]
        line = f"{label:<{width}}" + "".join(
            f"{'-' if n is None else f'{n / size:,.2f}':>12}" for n in numbers
        )
        said = f"   {verdict(ledger, predicted[label])}" if label in predicted else ""
        lines.append(line + said)
    if predicted:
        lines[0] += "   prediction"
    return "\n".join(lines)


def draw(ax: Any, measured: Ledgers, predicted: Ledgers) -> None:
    """Draw stacked bars, the first way of training on top, the sum behind each.

    Ticks mark where predicted parts end.
    """
    name, size = unit(measured)
    for y, (label, ledger) in enumerate(measured.items()):
        left = 0.0
        for kind, (color, hatch) in LOOKS.items():
            width = ledger.get(kind, 0) / size
            look = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            ax.barh(y, width, 0.62, left=left, label=kind if y == 0 else None, **look)
            left += width
        ax.text(left, y, f" {short(left)}", va="center")
        if label in predicted:
            ends = list(accumulate(predicted[label].get(kind, 0) / size for kind in PREDICTED))
            ax.plot(ends, [y] * len(ends), "|", color="black", markersize=29, markeredgewidth=1.2)
    handles, labels = ax.get_legend_handles_labels()
    if predicted:
        handles.append(ax.plot([], [], "|", color="black", markersize=11)[0])
        labels.append("predicted")
    ax.legend(handles, labels, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set_yticks(range(len(measured)), list(measured))
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.set(xlabel=name)
    ax.grid(axis="y", visible=False)


def alt_text(measured: Ledgers, predicted: Ledgers) -> str:
    """Alternative text of what `draw` shows."""
    name, size = unit(measured)
    ways = [
        f"{label} {short(sum(ledger.values()) / size)}: "
        + ", ".join(f"{kind} {short(ledger[kind] / size)}" for kind in LOOKS if ledger.get(kind))
        + (f"; prediction {verdict(ledger, predicted[label])}" if label in predicted else "")
        for label, ledger in measured.items()
    ]
    return f"Stacked bars of bytes by kind, in {name}. " + ". ".join(ways) + "."
