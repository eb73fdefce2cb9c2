"""History: a progress bar while a run lasts, and records that plot themselves afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from IPython import get_ipython

from .figures import plots

T = TypeVar("T")


def _quiet() -> bool:
    """Tell whether nobody watches: the built page (``TQDM_DISABLE=1``), a log file, a pipe."""
    if os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        return True
    shell = get_ipython()
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    return not in_notebook and not sys.stderr.isatty()


def track(iterable: Iterable[T], desc: str = "") -> Iterator[T]:
    """Iterate with a progress bar that writes nothing where nobody watches.

    Parameters
    ----------
    iterable : iterable
        What to go through; the bar shows a total if it has a length.
    desc : str
        A word or two in front of the bar.

    Yields
    ------
    The items, in order.
    """
    if _quiet():
        yield from iterable
        return
    from tqdm.auto import tqdm

    # disable is given, since tqdm reads its variable only once, when it is imported.
    yield from tqdm(iterable, desc=desc, leave=False, disable=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a centred window of a twentieth of the steps, cut short at the ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


class History(Sequence[Mapping[str, Any]]):
    """The records of a training run, as ``fit`` returns them.

    Parameters
    ----------
    records : sequence of dict
        One a step: ``phase`` (str), ``step`` (int), ``loss`` and ``penalty`` (float), and any
        extras.

    Raises
    ------
    ValueError
        There are no records, or one lacks ``phase`` or ``loss``.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._records = list(records)
        if not self._records:
            raise ValueError("records is empty: give the list that fit returned")
        for i, record in enumerate(self._records):
            missing = {"phase", "loss"} - set(record)
            if missing:
                raise ValueError(
                    f"records[{i}] lacks {', '.join(sorted(missing))}: "
                    "give the list that fit returned"
                )

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> History: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | History:
        return History(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    @property
    def phases(self) -> list[str]:
        """Names of the phases, in the order in which they first ran."""
        return list(dict.fromkeys(record["phase"] for record in self._records))

    def values(self, name: str, phase: str | None = None) -> np.ndarray:
        """One quantity at each step that recorded it, float64 (steps,); in one phase, if given."""
        chosen = [r for r in self._records if phase is None or r["phase"] == phase]
        return np.array([float(r[name]) for r in chosen if r.get(name) is not None])

    def last(self, name: str) -> Any:
        """Return the last recorded value of ``name``.

        Raises
        ------
        KeyError
            No record holds ``name``.
        """
        for record in reversed(self._records):
            if record.get(name) is not None:
                return record[name]
        raise KeyError(
            f"name={name!r} was never recorded; there are {', '.join(sorted(self._records[-1]))}"
        )

    def _panel(self, ax: Any, name: str) -> None:
        """Draw one quantity against the step: raw thin, smoothed thick, a colour for each phase."""
        for i, phase in enumerate(self.phases):
            at = [
                n
                for n, r in enumerate(self._records, 1)
                if r["phase"] == phase and r.get(name) is not None
            ]
            values = self.values(name, phase)
            look = {
                "color": plots.PALETTE[i % len(plots.PALETTE)],
                "linestyle": plots.DASHES[i % len(plots.DASHES)],
            }
            ax.plot(at, values, **{**look, "linestyle": "-"}, linewidth=0.8, alpha=0.35)
            ax.plot(at, _smooth(values), label=phase, **look)
        ax.set_ylabel(name)

    def plot(self, alt: str | None = None) -> None:
        """Show the loss by phase, raw and smoothed, and the penalty under it where one was paid.

        Parameters
        ----------
        alt : str, optional
            Alternative text; by default a sentence with each phase's first and last smoothed loss.
        """
        names = ["loss", "penalty"] if self.values("penalty").any() else ["loss"]
        ends = {phase: _smooth(self.values("loss", phase))[[0, -1]] for phase in self.phases}
        parts = ", ".join(
            f"{phase} from {first:.3g} to {last:.3g}" for phase, (first, last) in ends.items()
        )
        alt = (
            alt
            or f"Training {' and '.join(names)} over {len(self)} steps; "
            f"smoothed loss by phase: {parts}."
        )
        with plots.figure(
            alt=alt, height=1.0 + 1.9 * len(names), nrows=len(names), sharex=True
        ) as (_, axes):
            panels = np.atleast_1d(axes)
            for ax, name in zip(panels, names, strict=True):
                self._panel(ax, name)
            panels[-1].set_xlabel("step")
            if len(self.phases) > 1:
                panels[0].legend()
