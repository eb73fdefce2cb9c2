"""SPT's sweep (He et al. 2023): find tau, the number of top weights whose cost meets the budget.

The cost grows with tau, so there is no need to try one tau after the other. Two passes of 16 bits
over the scores, as in `select`, count for every tensor how many of its scores lie above each
cutoff, and find where the cost crosses the budget: linear time, nothing is sorted, and no second
copy of the scores is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter

import torch
from torch import Tensor

from ...selection import BUCKETS, histogram_of, select, sort_keys

# (a tensor's name, counts of its sensitive weights) -> the weights that are then trained
Charge = Callable[[str, Tensor], Tensor]


def crossing(scores: Mapping[str, Tensor], charge: Charge, k: int) -> int:
    """The smallest tau whose charge is at least k; N + 1 for N scores if no tau reaches k.

    Parameters
    ----------
    scores
        ``{name: tensor}``, finite, floating point, any device.
    charge
        ``(name, counts) -> weights trained``, int64 on CPU, element by element; it never falls
        when the count grows.
    k
        The budget, a count.
    """
    wide = any(score.dtype == torch.float64 for score in scores.values())
    keys, bits = partial(sort_keys, scores, True, wide), 64 if wide else 32
    above, prefix = dict.fromkeys(scores, 0), 0

    def histograms(shift: int) -> Iterator[tuple[str, Tensor]]:
        for name, chunks in groupby(keys(), itemgetter(0)):
            histogram = torch.zeros(BUCKETS, dtype=torch.int64, device="cpu")
            for *_, key in chunks:
                histogram += histogram_of(key, shift, prefix)
            yield name, histogram.flip(0)

    for shift in range(bits - 16, -1, -16):
        total = torch.zeros(BUCKETS, dtype=torch.int64, device="cpu")
        for name, histogram in histograms(shift):
            total += charge(name, above[name] + histogram.cumsum(0))
        passed = int((total < k).sum())
        if passed == BUCKETS:
            return sum(score.numel() for score in scores.values()) + 1
        for name, histogram in histograms(shift):
            above[name] += int(histogram[:passed].sum())
        bucket = BUCKETS - 1 - passed
        prefix = bucket - BUCKETS // 2 if shift == bits - 16 else (prefix << 16) | bucket

    # Scores that equal the cutoff follow in the order of the tensors.
    spent = _total(above, charge)
    for name, *_, key in keys():
        ties = int((key == prefix).sum())
        steps = charge(name, above[name] + torch.arange(ties + 1, device="cpu"))
        missing = int((spent + steps - steps[0] < k).sum())
        if missing <= ties:
            return sum(above.values()) + missing
        spent, above[name] = spent + int(steps[-1] - steps[0]), above[name] + ties
    raise AssertionError("the charge fell while the count grew")


def _total(counts: Mapping[str, int], charge: Charge) -> int:
    return sum(
        int(charge(name, torch.tensor([count], device="cpu"))) for name, count in counts.items()
    )


def tau_for(
    scores: Mapping[str, Tensor],
    charge: Charge,
    k: int,
    *,
    taus: Sequence[int] | None = None,
    capped: bool = False,
) -> int:
    """The tau whose charge is nearest to k (the lower of two), or the largest one within it.

    Parameters
    ----------
    scores, charge, k
        As in `crossing`.
    taus
        Values to choose from, increasing; default: all.
    capped
        Whether to stay within k.

    Raises
    ------
    ValueError
        If `taus` is empty, does not increase, or exceeds the number of non-zero scores; if k is
        above what the largest tau charges, or `capped` and below what the smallest does.
    """
    nonzero = {name: int(score.count_nonzero()) for name, score in scores.items()}
    limit = sum(nonzero.values())

    def total(tau: int) -> int:
        return _total(nonzero if tau == limit else select(scores, tau).per_tensor(), charge)

    if taus is None:
        taus = range(1, limit + 1)
    elif not taus or taus[0] < 1 or taus[-1] > limit or any(a >= b for a, b in pairwise(taus)):
        raise ValueError(
            f"taus must increase within [1, {limit}], the number of non-zero scores, and not be "
            "empty"
        )
    i = bisect_left(taus, crossing(scores, charge, k))
    if i == len(taus):
        raise ValueError(
            f"budget asks for {k} weights, but these tensors can take only {total(taus[-1])}; "
            "lower the budget, raise the rank, or give more taus"
        )
    over = total(taus[i]) - k
    if over == 0 or (not capped and (i == 0 or over < k - total(taus[i - 1]))):
        return taus[i]
    if i == 0:
        raise ValueError(
            f"budget asks for at most {k} weights, but the smallest tau, {taus[0]}, trains "
            f"{k + over}"
        )
    return taus[i - 1]
