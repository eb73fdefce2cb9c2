"""Recipes: how a config of the movies becomes a method on a loaded model.

A recipe has the name of the method in its configs. All methods have the same head, epochs, batches
and optimizer; each has the learning rate that its own sweep chose.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch

from ...methods.bitfit import bitfit as bitfit_selection
from ...methods.child_tuning import child_tuning
from ...methods.child_tuning import child_tuning_f as child_tuning_f_phases
from ...methods.controls import random_scores
from ...methods.controls import shuffled as shuffled_selection
from ...methods.diff_pruning import diff_pruning
from ...methods.fish import fish as fish_selection
from ...methods.fixed_mask import fixed_mask, full_finetuning
from ...methods.freezing import last_layers as last_layers_selection
from ...methods.lt_sft import lt_sft as lt_sft_phases
from ...methods.sara import sara as sara_phases
from ...methods.sara import smaller_than
from ...methods.sora import SoRA
from ...methods.sora import sora as sora_phases
from ...methods.spt import allocate
from ...methods.spt import spt as spt_phases
from ...params import head_weights, weights
from ...scores import magnitude as largest
from ...scores import squared_gradient
from ...selection import Selection, select
from ...training import Phase, Phases
from ..data.sentiment import Task
from . import results

Config = Mapping[str, Any]
Recipe = Callable[[Any, Any, Config, float], Iterable[Phase]]

LR_HEAD = 1e-3
LR_W, LR_ALPHA = 3e-4, 0.3
LR_DENSE = 3e-5  # for methods that train all weights first: the rate of full fine-tuning
FISH_SAMPLES = 256
THRESHOLD, P = 2e-3, 0.3  # of SaRA's example; of Child-Tuning-F
SORA_SHRINKAGE = 0.67  # of a gate in a run; half of those that N(0, 1) draws are smaller
SPT_RANKS = {0.005: 8, 0.0002: 1}
# Rank, and layers whose queries and values get it: the size nearest to each budget.
LORA = {0.005: (12, range(6)), 0.0002: (1, range(3, 6))}


def head(model: Any, task: Task, config: Config, lr: float) -> Iterator[Phase]:
    """The head that every run starts from, and nothing else."""
    yield from ()


def full(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Full fine-tuning."""
    return full_finetuning(model, lr=lr, lr_head=LR_HEAD, epochs=config["epochs"])


def unstructured(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Diff Pruning with a gate for every weight: half of the epochs relaxed, half with a mask."""
    return _diff_pruning(model, config, lr, groups=None)


def structured(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Diff Pruning with a second gate for every tensor."""
    return _diff_pruning(model, config, lr, groups="tensor")


def random(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The control: positions drawn uniformly; as many as a method, if the budget names one."""
    budget = _size(model, config["budget"])
    return _fixed(model, select(random_scores(model, config["seed"]), budget), config, lr)


def _size(model: Any, budget: float | str) -> float | int:
    """A budget; of a method that has its own size, how many weights that is."""
    sizes: dict[float | str, Callable[[], int]] = {
        "bitfit": lambda: bitfit_selection(model).count,
        "last_layers": lambda: last_layers_selection(model, 1).count,
        "sara_threshold": lambda: smaller_than(model, THRESHOLD).count,
        "child_tuning_f": lambda: round(P * sum(p.numel() for p in weights(model).values())),
    }
    return sizes[budget]() if isinstance(budget, str) else budget


def shuffled(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The control: random positions, as many in every tensor as unstructured Diff Pruning."""
    return _fixed(model, _shuffled("unstructured", model, config), config, lr)


def fish(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """FISH, with the empirical Fisher information of some training examples."""
    batches = task.train.batches(config["batch"], seed=config["seed"])
    samples = config.get("samples", FISH_SAMPLES)
    selection = fish_selection(model, batches, config["budget"], samples=samples)
    return _fixed(model, selection, config, lr)


def fish_shuffled(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The control: random positions, as many in every tensor as FISH."""
    return _fixed(model, _shuffled("fish", model, config), config, lr)


def sara(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """SaRA's smallest weights, exactly k of them, without re-selection and rank loss.

    The k-th smallest weight is smaller than one step at a useful rate, so a re-selection would drop
    all of them.
    """
    return sara_phases(model, budget=config["budget"], lam=0.0, reselect=None, **_rates(config, lr))


def magnitude(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The largest weights."""
    return _fixed(model, select(largest(model), config["budget"]), config, lr)


def sara_threshold(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """SaRA with the threshold of 2e-3 of the authors' example, re-selection and rank loss."""
    return sara_phases(model, threshold=THRESHOLD, seed=config["seed"], **_rates(config, lr))


def spt(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """SPT-LoRA."""
    scores = squared_gradient(model, task.train.batches(config["batch"]), reduction="batch")
    allocation = allocate(model, scores, config["budget"], rank=SPT_RANKS[config["budget"]])
    return spt_phases(model, allocation, seed=config["seed"], **_rates(config, lr))


def lora(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """peft's LoRA on queries and values."""
    rank, layers = LORA[config["budget"]]
    parts = ("query", "value")
    targets = [f"layer.{layer}.attention.self.{part}" for layer in layers for part in parts]
    return _lora(model, config, lr, rank, targets)


def _lora(model: Any, config: Config, lr: float, rank: int, targets: list[str]) -> Phases:
    from peft import LoraConfig, inject_adapter_in_model

    heads = list(head_weights(model).values())
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    added = [p for name, p in model.named_parameters() if "lora_" in name]
    for p in heads:
        p.requires_grad_(True)
    groups = [
        {"params": params, "lr": r, "weight_decay": 0.0}
        for params, r in ((added, lr), (heads, LR_HEAD))
        if params
    ]

    def phases() -> Generator[Phase, None, None]:
        yield Phase("LoRA", groups, config["epochs"])

    return Phases(phases())


def lora_linear(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """peft's LoRA on every linear layer of the encoder, of the rank that is nearest the budget."""
    return nearest_lora(model, config, lr, ["query", "key", "value", "dense"])


def nearest_lora(model: Any, config: Config, lr: float, layers: list[str]) -> Phases:
    """The same on all layers of these names."""
    own = weights(model)
    sides = [p.shape for name, p in own.items() if p.dim() == 2 and name.split(".")[-2] in layers]
    total = sum(p.numel() for p in own.values())
    rank = max(1, round(config["budget"] * total / sum(map(sum, sides))))
    return _lora(model, config, lr, rank, layers)


def bitfit(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """BitFit: all biases."""
    return _fixed(model, bitfit_selection(model), config, lr)


def last_layers(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """The last of the six layers, and the pooler."""
    return _fixed(model, last_layers_selection(model, 1), config, lr)


def child_tuning_f(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Child-Tuning-F, p = 0.3."""
    return child_tuning_f_phases(model, p=P, seed=config["seed"], **_rates(config, lr))


def child_tuning_d(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """Child-Tuning-D at a budget, with the authors' squared gradient of a batch."""
    batches = task.train.batches(config["batch"])
    selection = child_tuning(model, batches, config["budget"], reduction="batch")
    return _fixed(model, selection, config, lr)


def lt_sft(model: Any, task: Task, config: Config, lr: float) -> Phases:
    """LT-SFT: half of the epochs dense, half masked."""
    return rewound(model, config, lr, LR_DENSE)


def rewound(model: Any, config: Config, lr: float, lr_dense: float) -> Phases:
    """The same with another rate of the dense phase."""
    rates = {**_rates(config, lr), "lr_dense": lr_dense, "epochs": _halves(config)}
    return lt_sft_phases(model, config["budget"], **rates)


def sora(
    model: Any, task: Task, config: Config, lr: float
) -> Generator[Phase, None, dict[str, Any]]:
    """SoRA of rank 8 on every matrix of the encoder, with the ranks that it ends with.

    As in the authors' code, a gate shrinks by the same xi at every step, whatever the rate; in a
    run so short xi must be larger than theirs, for a gate to go as far.
    """
    update = SoRA(model, seed=config["seed"])
    steps = config["epochs"] * len(task.train.batches(config["batch"]))
    yield from sora_phases(update, xi=SORA_SHRINKAGE / steps, **_rates(config, lr))
    parts = [part for one in update.updates.values() for part in one.parameters()]
    return {"trained": sum(part.numel() for part in parts), "ranks": list(update.ranks().values())}


def _rates(config: Config, lr: float) -> dict[str, Any]:
    return {"lr": lr, "lr_head": LR_HEAD, "epochs": config["epochs"]}


def _halves(config: Config) -> tuple[int, int]:
    first = config["epochs"] // 2
    return first, config["epochs"] - first


def _diff_pruning(model: Any, config: Config, lr: float, groups: Any) -> Phases:
    return diff_pruning(
        model,
        config["budget"],
        lr_w=LR_W,
        lr_alpha=LR_ALPHA,
        lr=lr,
        lr_head=LR_HEAD,
        epochs=_halves(config),
        groups=groups,
        seed=config["seed"],
    )


def _fixed(model: Any, selection: Selection, config: Config, lr: float) -> Phases:
    return fixed_mask(model, selection, **_rates(config, lr))


def _shuffled(method: str, model: Any, config: Config) -> Selection:
    """Random positions, as many in every tensor as a method's row of the same budget and seed."""
    shapes = {name: tuple(p.shape) for name, p in weights(model).items()}
    counts = _per_tensor(method, config)
    first = {name: torch.arange(count) for name, count in counts.items() if count}
    return shuffled_selection(Selection(first, shapes), config["seed"])


def _per_tensor(method: str, config: Config) -> dict[str, int]:
    """How many weights a method took of each tensor, in a row of the same data, budget and seed."""
    own = ("method", "seed", "seeds", "lr", "start", "grid")
    like = {"method": method, **{key: value for key, value in config.items() if key not in own}}
    for name in ("movies", "domains", "reviews", "reviews_second"):
        for row in (*results.read(name), *results.read(name + "_rates")):
            if like.items() <= row["config"].items():
                seeds = row["config"].get("seeds", [row["config"].get("seed")])
                if config["seed"] in seeds:
                    parts = row.get("per_seed", [row])
                    return parts[seeds.index(config["seed"])]["per_tensor"]
    raise ValueError(
        f"config={dict(config)} shuffles the row of {method}, which is missing; run that first"
    )


# provenance: apart, each row names its own recipe
RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        full, unstructured, structured, random, shuffled, fish, fish_shuffled, sara,
        sara_threshold, spt, lora, bitfit, last_layers, child_tuning_f, child_tuning_d, lt_sft,
        sora,
    )
}  # fmt: skip
