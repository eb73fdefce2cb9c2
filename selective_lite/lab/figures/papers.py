"""Papers: what their authors report, beside what our rows say of the same comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..experiments.intervals import LEAST, Difference, compared
from ..experiments.results import Row
from ..experiments.run import Cell
from .comparison import points

MARGIN = 0.01  # what may be lost where a paper says that a method matches another


@dataclass(frozen=True)
class Claim:
    """A comparison in a paper.

    Attributes
    ----------
    paper
        Authors and year.
    text
        What is compared, and with what result.
    gain
        What the first gains over the second, in points, as reported; None if they are said to
        match, or if no number is given.
    better
        Whether the first is said to be better; else to match the second.
    ours
        The same comparison in our rows: two methods at budgets; None if we have none like it.
    differs
        What is different there, for a reader who compares the numbers.
    """

    paper: str
    text: str
    gain: float | None
    better: bool
    ours: tuple[Cell, Cell] | None
    differs: str


FULL: Cell = ("full", 1.0)
BERT = "BERT large, nine GLUE tasks"
BENCHMARK = "Llama-3.2-3B, GSM8K, queries and values only, one seed, rates set by hand"
CLAIMS = (
    Claim(
        "Guo et al. 2021",
        "Diff Pruning by groups matches full at 0.5 % (80.6, 80.6)",
        0.0,
        False,
        (("structured", 0.005), FULL),
        f"{BERT}; gates relaxed for 900 steps and many more",
    ),
    Claim(
        "Guo et al. 2021",
        "full is better than Diff Pruning without groups (80.6, 79.4)",
        1.2,
        True,
        (FULL, ("unstructured", 0.005)),
        f"{BERT}; gates relaxed for 900 steps and many more",
    ),
    Claim(
        "Guo et al. 2021",
        "groups improve Diff Pruning (80.6, 79.4)",
        1.2,
        True,
        (("structured", 0.005), ("unstructured", 0.005)),
        f"{BERT}; gates relaxed for 900 steps and many more",
    ),
    Claim(
        "Sung et al. 2021",
        "FISH matches full at 0.5 %",
        None,
        False,
        (("fish", 0.005), FULL),
        f"{BERT}; 1,024 samples; seven passes; three rates, the same for every mask",
    ),
    Claim(
        "Ben Zaken et al. 2022",
        "BitFit matches full on small and medium data",
        None,
        False,
        (("bitfit", "own"), FULL),
        f"{BERT}; a constant rate",
    ),
    Claim(
        "Xu et al. 2021",
        "Child-Tuning is better than full, by 1.5 to 8.6",
        1.5,
        True,
        (("child_tuning_f", "own"), FULL),
        "four models larger than ours; the range is over them, and over F and D",
    ),
    Claim(
        "He et al. 2023",
        "SPT improves the Adapter it allocates, by 1.4 (VTAB-1k) and 4.2 (FGVC)",
        1.4,
        True,
        (("spt", 0.005), ("lora_linear", 0.005)),
        "a vision transformer, images; ours allocates LoRA",
    ),
    Claim(
        "Ding et al. 2023",
        "SoRA is better than LoRA, with 0.7 times its weights",
        None,
        True,
        (("sora", "own"), ("lora_linear", 0.02)),
        "DeBERTa-v3, GLUE; twenty passes",
    ),
    Claim(
        "Ansell et al. 2022",
        "LT-SFT is better than adapters, by up to 3.7",
        3.7,
        True,
        None,
        "transfer between languages, by masks that are added; our task is in one language",
    ),
    Claim(
        "peft's benchmark",
        "random positions (SHiRA, 0.29 %) are better than LoRA of that size (51.0, 47.8)",
        3.2,
        True,
        (("random", 0.005), ("lora_linear", 0.005)),
        BENCHMARK,
    ),
    Claim(
        "peft's benchmark",
        "random positions (SHiRA, 0.29 %) are better than full (51.0, 47.2)",
        3.9,
        True,
        (("random", 0.005), FULL),
        BENCHMARK,
    ),
    Claim(
        "peft's benchmark",
        "largest weights (Supertuning, 0.07 %) match the smallest (39.3, 39.0)",
        0.4,
        False,
        (("magnitude", 0.0002), ("sara", 0.0002)),
        BENCHMARK,
    ),
)


def replicated(claim: Claim, found: Difference | None) -> str:
    """Whether our rows agree with a claim: ``"yes"``, ``"no"`` or ``"cannot tell"``.

    A gain is seen if ours is better by Holm's verdict, and is not if the interval lies below the
    paper's (below zero, where it gives no number). A match is seen if the interval lies above
    `MARGIN` lost, and is not if ours is worse, by a verdict and by an interval below zero that
    reaches past the margin.
    """
    if found is None or found.seeds < LEAST:
        return "cannot tell"
    low, high = found.interval
    if claim.better:
        if found.verdict == "better":
            return "yes"
        return "no" if 100 * high < (claim.gain or 0.0) else "cannot tell"
    if low > -MARGIN:
        return "yes"
    return "no" if found.verdict == "worse" else "cannot tell"


def beside(rows: Iterable[Row]) -> list[tuple[Claim, Difference | None]]:
    """Each claim with our difference, if there are rows; p values hold for all of them together."""
    rows = list(rows)
    cells = {(row["config"]["method"], row["config"]["budget"]) for row in rows}
    pairs = [claim.ours for claim in CLAIMS if claim.ours and set(claim.ours) <= cells]
    found = compared(rows, pairs)
    return [(claim, found.get(claim.ours) if claim.ours else None) for claim in CLAIMS]


def table(rows: Iterable[Row]) -> str:
    """A block of lines for each claim: what is reported, what we find, whether it replicates."""
    lines = []
    for claim, found in beside(rows):
        if claim.ours is None:
            ours = "no such comparison here"
        else:
            ours = f"{points(found)}, {found.seeds} seeds" if found else "not in results"
        lines.append(f"{claim.paper}: {claim.text}")
        lines.append(f"    ours: {ours}. Replicated: {replicated(claim, found)}")
        lines.append(f"    there: {claim.differs}")
    return "\n".join(lines)
