"""Promises: the table's every promise, on BERT, a ViT and a tied Llama, in several settings.

In float32 and bfloat16, under accumulation, where new tensors are made on another device than the
model's, on a GPU.
"""

import math
from contextlib import closing
from functools import cache, partial

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.bitfit import bitfit
from selective_lite.methods.child_tuning import child_tuning_d, child_tuning_f
from selective_lite.methods.diff_pruning import diff_pruning
from selective_lite.methods.fish import fish
from selective_lite.methods.freezing import last_layers, layerwise_rates
from selective_lite.methods.guarantees import MEANING, PROMISES, table
from selective_lite.methods.lt_sft import lt_sft
from selective_lite.methods.sara import sara
from selective_lite.methods.sora import SoRA, sora
from selective_lite.methods.spt import allocate, spt

K = 60
KINDS = ("bert", "vit", "llama")
SETTINGS = ("float32", "bfloat16", "accumulation", "meta_default", "gpu")
LR, EPOCHS = 0.05, 2
# No part of a ViT's convolution and bare parameters can be masked; Diff Pruning and SaRA select
# from all but the head, so there they count as the head.
FROZEN = {"vit": ("vit.embeddings",)}
HEAD = {(name, "vit"): ("classifier", "vit.embeddings") for name in ("diff_pruning", "sara")}
BUDGET, ALPHA, BETA = 200, 10.0, 5.0  # of SPT: enough for some modules


def fixed_mask(model, data, kind):
    scores = sl.exclude(sl.random_scores(model, 0), FROZEN.get(kind, ()))
    return sl.fixed_mask(
        model, sl.random_nonzero(scores, K, seed=1), lr=LR, epochs=EPOCHS, weight_decay=0.1
    )


def targets(model):
    """What SoRA updates here: some matrices, by their paths."""
    return [name.removesuffix(".weight") for name in sl.linear_weights(model)[1:4]]


def spend(model, data):
    """SPT's scores and what it makes of them: modules, whole vectors and single weights."""
    scores = sl.squared_gradient(model, data, reduction="batch")
    return scores, allocate(model, scores, BUDGET, rank=1, alpha=ALPHA, beta=BETA)


# A row a method: how the tests call it.
METHODS = {
    "full_finetuning": lambda model, data, kind: sl.full_finetuning(model, lr=LR, epochs=EPOCHS),
    "layerwise_rates": lambda model, data, kind: layerwise_rates(
        model, lr=LR, decay=0.5, epochs=EPOCHS
    ),
    "last_layers": lambda model, data, kind: sl.fixed_mask(
        model, last_layers(model, 1), lr=LR, epochs=EPOCHS
    ),
    "fixed_mask": fixed_mask,
    "fish": lambda model, data, kind: fish(
        model, K, data, lr=LR, epochs=EPOCHS, weight_decay=0.1, frozen=FROZEN.get(kind, ())
    ),
    "child_tuning_f": lambda model, data, kind: child_tuning_f(model, lr=LR, epochs=EPOCHS),
    "child_tuning_d": lambda model, data, kind: child_tuning_d(
        model, data, p=0.02, lr=LR, epochs=EPOCHS, weight_decay=0.1, frozen=FROZEN.get(kind, ())
    ),
    "bitfit": lambda model, data, kind: bitfit(model, lr=LR, epochs=EPOCHS, weight_decay=0.1),
    "lt_sft": lambda model, data, kind: lt_sft(
        model,
        K,
        lr=LR,
        epochs=(1, EPOCHS),
        iterations=2,
        weight_decay=0.1,
        frozen=FROZEN.get(kind, ()),
    ),
    "diff_pruning": lambda model, data, kind: diff_pruning(
        model,
        K,
        lr_w=0.02,
        lr=LR,
        lr_alpha=1.0,
        epochs=(3, EPOCHS),
        head=HEAD.get(("diff_pruning", kind)),
    ),
    "sara": lambda model, data, kind: sara(
        model, budget=K, lr=1e-4, lr_head=LR, lam=0, epochs=EPOCHS, head=HEAD.get(("sara", kind))
    ),
    "spt": lambda model, data, kind: spt(
        model, spend(model, data)[1], lr=LR, epochs=EPOCHS, weight_decay=0.1
    ),
    "sora": lambda model, data, kind: sora(
        SoRA(model, 2, targets=targets(model)), lr=LR, lr_head=LR, lam=0.01, epochs=EPOCHS
    ),
}
IMPOSSIBLE = {("bitfit", "llama")}  # no biases


def asked(name, model):
    """The number of weights that was asked for."""
    return {"child_tuning_d": round(0.02 * sum(p.numel() for p in sl.weights(model).values()))}.get(
        name, K
    )


def ruled(name, model):
    """The number of weights that the rule names, beside the head."""
    after = ("layers.1.", "layer.1.", "pooler.", "model.norm.", "vit.layernorm.")
    rules = {
        "bitfit": lambda n: n.endswith(".bias"),
        "last_layers": lambda n: any(part in n for part in after),
    }
    return sum(p.numel() for n, p in sl.weights(model).items() if rules[name](n))


def accumulate(model, phases, data):
    """Another loop than `fit`: two batches a step, as one's own training code has it."""
    with closing(phases):
        for phase in phases:
            called = (phase.model or model).train()
            optimizer = torch.optim.AdamW(
                [{k: v for k, v in g.items() if k != "schedule"} for g in phase.groups]
            )
            for step in range(phase.epochs):
                optimizer.zero_grad()
                for batch in data:
                    (sl.model_loss(called, batch) / len(data)).backward()
                if phase.penalty:
                    phase.penalty().backward()
                for action in (phase.before_step, lambda progress, o: o.step(), phase.after_step):
                    if action:
                        action((step + 1) / phase.epochs, optimizer)
            model.eval()


def pretrained(model, dtype):
    """The model with no weight at zero, as if it had been trained: a new one has biases that are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) / 50)
    return model.to(dtype)


def outside_phase(name, model, data, head):
    """The weights that may change where a phase does not say it: found before the training, without the method."""
    if name == "sara":  # re-selected
        return sl.select(sl.magnitude(model, head), K, largest=False)
    if name == "sora":
        return sl.select_tensors(model, lambda n, p: n.removesuffix(".weight") in targets(model))
    if name == "spt":  # single weights are in its phase's selection, whole vectors are not
        _, spent = spend(model, data)
        whole = {n: torch.arange(model.get_parameter(n).numel()) for n in spent.whole}
        shapes = {n: tuple(p.shape) for n, p in sl.weights(model).items()}
        return sl.Selection({**spent.selection.indices, **whole}, shapes)
    return None


class Run:
    """A method, run on a fresh model: the base's bits, the model after, the selection of the last phase."""

    def __init__(self, build, batches, name, kind, setting, seed, device="cpu"):
        dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
        self.name = name
        self.fresh = lambda: pretrained(build(kind), dtype).to(device)
        self.model = self.fresh()
        self.base, self.keys = sl.snapshot(self.model), list(self.model.state_dict())
        head = HEAD.get((name, kind))
        given = batches(kind, 2 + seed, device=device)
        self.batch, self.data = given[0], given[seed:]  # another seed is another task
        data = self.data
        self.selection = outside_phase(name, self.fresh(), data, head)

        def phases():
            with closing(METHODS[name](self.model, data, kind)) as method:
                for phase in method:
                    self.selection = (
                        self.selection if name in ("sara", "sora", "spt") else phase.selection
                    )
                    yield phase
                    # Trained, and not yet merged or put back.
                    self.inside = {
                        n: p.detach().clone()
                        for n, p in self.model.named_parameters()
                        if n in self.base
                    }

        with torch.random.fork_rng(), torch.device("meta" if setting == "meta_default" else "cpu"):
            torch.manual_seed(seed)
            (accumulate if setting == "accumulation" else sl.fit)(self.model, phases(), data)
        self.candidates = {n: p for n, p in sl.weights(self.model, head).items() if n in self.base}
        self.head = sl.head_weights(self.model, head)
        self.modules = sl.adapters(self.model)
        self.delta = partial(sl.diff, self.base, self.model, head=head, method=name)


@pytest.fixture(scope="module")
def run(build, batches):
    """run(name, kind, setting, seed, device="cpu") -> the `Run`, made once."""
    return cache(partial(Run, build, batches))


@pytest.fixture
def place(setting, request):
    """The device of a setting's model."""
    return request.getfixturevalue("accelerator") if setting == "gpu" else "cpu"


def bits(model):
    return {
        name: p.detach().cpu().view(torch.int16).numpy().tobytes()
        for name, p in model.named_parameters()
    }


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def sized(count, one, other, path):
    """As many weights as asked, or as the rule says, are trained: the selected ones and the head have moved."""
    assert one.selection.count == count(one.name, one.model)
    moved = sum(
        int((one.candidates[n].reshape(-1)[i] != one.base[n].reshape(-1)[i]).sum())
        for n, i in one.selection.indices.items()
    )
    assert (
        moved > 0.5 * one.selection.count
    )  # not all of them: a word may not occur, a step be lost in bfloat16
    assert not any(torch.equal(p, one.base[n]) for n, p in one.head.items())


def rest_identical(one, other, path):
    """Every weight that is neither selected nor of the head has its bits."""
    masks = one.selection.masks()
    assert set(masks) == set(one.candidates)
    assert set(masks) | set(one.head) == set(one.base)
    for n, p in one.candidates.items():
        assert torch.equal(p.detach()[~masks[n]], one.base[n][~masks[n]]), n
    assert [key for key in one.model.state_dict() if ".adapter." not in key] == one.keys


def nearest(one, other, path):
    """No other number of sensitive weights costs what is nearer to the budget; and what is paid for is trained."""
    scores, spent = spend(one.fresh(), one.data)
    scores = {n: s.cpu() for n, s in scores.items() if n not in spent.left_out}
    cost, tensor = torch.zeros(sum(s.numel() for s in scores.values()), dtype=torch.int64), []
    for number, score in enumerate(scores.values()):
        tensor += [number] * score.numel()
    order = (
        torch.cat([s.flatten() for s in scores.values()]).sort(descending=True, stable=True).indices
    )
    tensor = torch.tensor(tensor)[order]  # of the most sensitive weight, of the second, ...
    for number, (name, score) in enumerate(scores.items()):
        count = (tensor == number).cumsum(0)
        linear = name in sl.linear_weights(one.fresh(), head=())
        price = sum(score.shape) if linear else score.numel() if score.dim() <= 1 else 0
        enough = math.ceil(price / (ALPHA if linear else BETA))
        cost += torch.where(count >= enough, price, count) if price else count
    assert abs(spent.charged - BUDGET) == int((cost - BUDGET).abs().min())
    assert spent.structured  # or it would only be a selection
    modules = [p for module in one.modules.values() for p in module.parameters()]
    assert list(one.modules) == list(spent.structured)
    assert spent.charged == one.selection.count + sum(p.numel() for p in modules)
    assert all(p.any() for p in modules)


def additive(one, other, path):
    """Before the modules are merged no weight of the base outside the head has moved; then some have, and travel."""
    assert all(torch.equal(one.inside[n], one.base[n]) for n in one.candidates)
    assert not any(torch.equal(one.inside[n], one.base[n]) for n in one.head)
    assert any(not torch.equal(p, one.base[n]) for n, p in one.candidates.items())
    travels(one, other, path)


def sparse(one, other, path):
    """A small file of what was trained and the head alone, that travels."""
    delta, masks = one.delta(), one.selection.masks()
    modules = sum(p.numel() for module in one.modules.values() for p in module.parameters())
    assert delta.count <= one.selection.count + modules < 0.1 * one.selection.total
    assert all(
        masks[n].reshape(-1)[positions.long()].all() for n, positions in delta.positions.items()
    )
    assert all(masks[n].all() for n in delta.dense)
    travels(one, other, path)


def travels(one, other, path):
    """The delta is saved, loaded, applied and reverted; it is turned on and off, and another one after it."""
    one.delta().save(path)
    base = one.fresh()
    before, tuned, plain = bits(base), bits(one.model), outputs(base, one.batch)
    for _ in range(2):
        with sl.load(path).apply(base):
            assert bits(base) == tuned
            assert torch.equal(outputs(base, one.batch), outputs(one.model, one.batch))
        assert bits(base) == before
        assert torch.equal(outputs(base, one.batch), plain)
    theirs = bits(other.model)
    assert theirs != tuned
    for applied, after in ((other.delta(), theirs), (sl.load(path), tuned)):
        applied = applied.apply(base)
        assert bits(base) == after
        applied.revert()
        assert bits(base) == before


# A check a promise, called with two runs of a method and a path to write to.
CHECKS = {
    "exact k": partial(sized, asked),
    "rule-sized": partial(sized, ruled),
    "rest bit-identical": rest_identical,
    "sparse": sparse,
    "nearest": nearest,
    "additive": additive,
}

CASES = [
    pytest.param(
        *(name, kind, setting, promise),
        id=f"{name}-{kind}-{setting}-{promise}".replace(" ", "_"),
        marks=[pytest.mark.gpu] if setting == "gpu" else [],
    )
    for name, promises in PROMISES.items()
    for promise in promises
    for kind in KINDS
    for setting in SETTINGS
    if (name, kind) not in IMPOSSIBLE
]


@pytest.mark.parametrize(("name", "kind", "setting", "promise"), CASES)
def test_a_promise_holds(run, place, tmp_path, name, kind, setting, promise):
    one, other = (run(name, kind, setting, seed, place) for seed in (0, 1))
    CHECKS[promise](one, other, tmp_path / "delta.safetensors")


@pytest.mark.parametrize(
    ("name", "promise"),
    [(name, p) for name, made in PROMISES.items() for p in CHECKS if p not in made],
)
def test_what_is_not_promised_does_not_hold(run, tmp_path, name, promise):
    one, other = (run(name, "bert", "float32", seed) for seed in (0, 1))
    with pytest.raises(
        (AssertionError, AttributeError, KeyError)
    ):  # without a selection, or a rule, there is none
        CHECKS[promise](one, other, tmp_path / "delta.safetensors")


@pytest.mark.parametrize("setting", ["float32", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", [name for name, promises in PROMISES.items() if not promises])
def test_what_promises_nothing_moves_everything(run, place, name, setting):
    one = run(name, "bert", setting, 0, place)
    assert one.selection is None
    assert not [n for n, p in one.model.named_parameters() if torch.equal(p, one.base[n])]


def test_every_row_of_the_table_is_tested_and_every_promise_explained():
    assert set(PROMISES) == set(METHODS)
    assert (
        {promise for made in PROMISES.values() for promise in made} <= set(CHECKS) <= set(MEANING)
    )
    for made in PROMISES.values():
        assert len(set(made)) == len(made)
        assert len({"exact k", "rule-sized", "nearest"} & set(made)) <= 1


def test_the_table_shows_a_row_a_method_and_a_column_a_promise():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table().splitlines()]
    assert lines[0] == ["method", *MEANING]
    assert set(lines[1]) == {"---"}
    assert {
        row[0].strip("`"): [p for p, cell in zip(lines[0][1:], row[1:], strict=True) if cell]
        for row in lines[2:]
    } == {name: [p for p in MEANING if p in made] for name, made in PROMISES.items()}
