"""Targets: what was asked of speed and size, what `results/` says, and whether it is reached."""

from __future__ import annotations

from collections.abc import Iterator

from selective_lite.lab import results

OURS = "selective_lite"
Line = tuple[str, float, float, str]  # what, measured, at most, unit


STEP = {  # over the floor and over LoRA, with the C source and without it
    ("uniform", 0.0002): (1.05, None, 1.07, None),
    ("uniform", 0.005): (1.13, 0.87, 1.22, 0.92),
    ("uniform", 0.05): (1.21, None, 1.42, None),
}


def masked_step() -> Iterator[Line]:
    """A step of MiniLM against forward and input gradients alone (the floor), and against LoRA."""
    for row in results.read("masked_step"):
        config, ours = row["config"], row["bytes"][OURS]
        asked = STEP.get((config["selection"], config["budget"]))
        kind = config["model"], config["dtype"], config["allocator"]
        if asked is None or kind != ("minilm", "float32", "keeps"):
            continue
        what = f"masked step, {config['budget']:.2%}, take {config['take']}"
        found = (
            ("over the floor's", row["ours_over"]["floor"]),
            ("over LoRA's", row["ours_over"]["peft LoRA"]),
            ("without C, over the floor's", row["in_torch_over"]["floor"]),
            ("without C, over LoRA's", row["in_torch_over"]["peft LoRA"]),
        )
        for (ratio, value), most in zip(found, asked, strict=True):
            if most is not None:
                yield f"{what}: seconds {ratio}", value, most, ""
        held = (ours["gradients"] + ours["optimizer"]) / row["trainable"][OURS]
        yield f"{what}: gradient and state", held, 13, "bytes a weight"


def scoring() -> Iterator[Line]:
    """Squared gradients of samples, against one by one and against vmap of dense gradients."""
    for row in results.read("scoring"):
        config, ours = row["config"], row["bytes"][OURS]
        what = f"scoring {config['samples']} samples of {config['model']}"
        if config["model"] == "minilm":
            yield f"{what}: seconds", row["median_seconds"][OURS], 10, "s"
        for way, ratio in row["over_ours"].items():
            yield f"{what}: over {way}'s", 1 / ratio, 1, ""
        chunk = 2**-20 * (ours - row["bytes"]["one by one"])
        yield f"{what}: memory over one by one's", chunk, 512, "MiB"
        yield f"{what}: largest difference, in millionths", 1e6 * row["apart"][OURS], 1, ""


def delta() -> Iterator[Line]:
    """A file of 0.5 % of MiniLM's weights, and how long it takes to put it in and out."""
    for row in results.read("delta"):
        yield "delta file, over entropy and values", row["over_bound"]["gap-lzma"], 1.05, ""
        for verb in ("apply", "revert"):
            yield f"delta, {verb}", 1e3 * row["median_seconds"][verb], 20, "ms"


def delta_half() -> Iterator[Line]:
    """A file of what one step of AdamW at 3e-6 changes in MiniLM in bfloat16."""
    for row in results.read("delta_half"):
        yield "delta file of a bfloat16 step", row["bytes"]["gap-lzma"] / 1e6, 0.77, "MB"


def peak_memory() -> Iterator[Line]:
    """Peak memory of a step of SmolLM2-135M over the loaded model, against that of other ways."""
    peaks = {
        row["config"]["way"]: row["bytes"]["peak over it"] for row in results.read("peak_memory")
    }
    if peaks:
        ours = peaks[OURS]
        yield "peak of a step of SmolLM2", ours / 2**20, 540, "MiB"
        for way in ("peft LoRA", "peft SHiRA"):
            yield f"peak of a step, over {way}'s r=8", ours / peaks[way], 1.00, ""


def selecting() -> Iterator[Line]:
    """Exact top-k; linear means that a score takes as long among 10^9 as among 10^7."""
    rows = results.read("selecting")
    for row in rows:
        scores, budget = row["config"]["scores"], row["config"]["budget"]
        (small,) = (
            r for r in rows if r["config"]["budget"] == budget and r["config"]["scores"] == 10**7
        )
        ratio = row["seconds_selecting"] / small["seconds_selecting"] / (scores / 10**7)
        what = f"top {budget:.2%} of {scores:.0e} scores"
        if scores == 10**9:  # what it holds is fixed, and few scores are not much
            yield f"{what}: memory beside them", 100 * row["extra_over_scores"], 5, "%"
        yield f"{what}: seconds a score, over 1e7's", ratio, 1.25, ""


def importing() -> Iterator[Line]:
    """The import."""
    for row in results.read("importing"):
        yield "import selective_lite after torch", row["milliseconds"][OURS], 50, "ms"


if __name__ == "__main__":
    for measure in (masked_step, scoring, peak_memory, delta, delta_half, selecting, importing):
        rows = results.read(measure.__name__)
        devices = ", ".join(sorted({row["device"] for row in rows}))
        print(f"{measure.__doc__} On {devices or 'nothing yet'}.")
        for what, measured, limit, unit in measure():
            reached = "reached" if measured <= limit else "NOT REACHED"
            print(f"  {what:48} {measured:8.2f} <= {limit:5.2f} {unit:14} {reached}")
