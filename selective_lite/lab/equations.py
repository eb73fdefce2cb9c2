"""The equation contract: a formula holds, and a stated wrong variant of it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def _array(value: Any, what: str) -> np.ndarray:
    """A number, array or tensor as a float64 array; TypeError if that is impossible."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to(device="cpu", dtype=torch.float64).numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} is {type(value).__name__}: give a number, an array or a tensor"
        ) from error


def _same_shape(label: str, left: np.ndarray, other: np.ndarray, what: str) -> None:
    # Broadcasting would let a scalar pass for a vector, so equal shapes are part of the equation.
    if left.shape != other.shape:
        raise AssertionError(
            f"{label}: left has shape {left.shape}, {what} has {other.shape}; "
            "bring them to one shape"
        )


def check(
    label: str,
    left: Any,
    right: Any,
    wrong: Mapping[str, Any],
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> None:
    """Check one labelled equation and print one line about it.

    Two values agree when ``abs(a - b) <= atol + rtol * abs(b)`` in every element, in float64.

    Parameters
    ----------
    label : str
        The equation's label in the text, such as ``"eq-stretch"``.
    left : float, array or tensor
        An independent computation of the same thing: a library, autograd, Monte Carlo, brute force.
    right : float, array or tensor
        The formula's right-hand side, written out; same shape as ``left``.
    wrong : dict of str to value
        At least one plausible mistake: what was done wrong, and the value it gives, same shape as
        ``left``.
    rtol, atol : float
        Relative and absolute tolerance.

    Raises
    ------
    AssertionError
        ``left`` and ``right`` differ, or hold nothing to compare; ``wrong`` is empty; or a wrong
        variant also agrees.
    ValueError
        The label does not start with ``eq-``.
    TypeError
        A value is not numeric.
    """
    if not label.startswith("eq-") or label == "eq-":
        raise ValueError(
            f"label={label!r}: an equation's label starts with 'eq-', as in 'eq-stretch'"
        )
    if not wrong:
        raise AssertionError(
            f"{label}: wrong is empty; state at least one wrong variant that must fail"
        )
    a, b = _array(left, "left"), _array(right, "right")
    _same_shape(label, a, b, "right")
    if not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AssertionError(f"{label}: left and right must hold at least one number, all finite")
    error = float(np.abs(a - b).max())
    if not np.allclose(a, b, rtol=rtol, atol=atol):
        raise AssertionError(
            f"{label} does not hold: max error {error:.2g} with rtol={rtol:g}, atol={atol:g}"
        )
    failures: list[str] = []
    for name, value in wrong.items():
        c = _array(value, f"wrong[{name!r}]")
        _same_shape(label, a, c, f"wrong[{name!r}]")
        gap = float(np.abs(a - c).max())
        if np.allclose(a, c, rtol=rtol, atol=atol):
            raise AssertionError(
                f"{label}: the wrong variant {name!r} agrees too (max error {gap:.2g}); "
                "the check is blind"
            )
        failures.append(f"fails when {name} ({gap:.2g})" if not failures else f"{name} ({gap:.2g})")
    print(f"{label} holds: max error {error:.2g}; {'; '.join(failures)}")
