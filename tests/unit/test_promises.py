"""Promises: every promise of the table, on BERT, a ViT and a tied Llama, in several settings.

In float32 and bfloat16, under accumulation, where new tensors are made on another device than the
model's, on a GPU.
"""

import math
from contextlib import closing
from functools import cache, partial

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.guarantees import MEANING, PROMISES, table

K = 60
KINDS = ("bert", "vit", "llama")
SETTINGS = ("float32", "bfloat16", "accumulation", "meta_default", "gpu")
LR, EPOCHS = 0.05, 2
BUDGET, ALPHA, BETA = 200, 10.0, 5.0  # of SPT: enough for some modules


def targets(model):
    """What SoRA updates here: some matrices, by their paths."""
    return [name.removesuffix(".weight") for name in sl.linear_weights(model)[1:4]]


def spend(model, data):
    """SPT's scores and what it makes of them: modules, whole vectors and single weights."""
    scores = sl.squared_gradient(model, data, reduction="batch")
    return scores, sl.allocate(model, scores, BUDGET, rank=1, alpha=ALPHA, beta=BETA)


# How each method's selection is made, and how each method of phases is called.
SELECTIONS = {
    "fixed_mask": lambda model, data: sl.random(model, K, seed=1),
    "fish": lambda model, data: sl.fish(model, data, K),
    "child_tuning": lambda model, data: sl.child_tuning(model, data, 0.02),
    "smallest": lambda model, data: sl.smallest(model, K),
    "bitfit": lambda model, data: sl.bitfit(model),
    "last_layers": lambda model, data: sl.last_layers(model, 1),
}
PHASES = {
    "full_finetuning": lambda model, data: sl.full_finetuning(model, lr=LR, epochs=EPOCHS),
    "layerwise_rates": lambda model, data: sl.layerwise_rates(
        model, lr=LR, decay=0.5, epochs=EPOCHS
    ),
    "child_tuning_f": lambda model, data: sl.child_tuning_f(model, lr=LR, epochs=EPOCHS),
    "lt_sft": lambda model, data: sl.lt_sft(
        model, K, lr=LR, epochs=(1, EPOCHS), iterations=2, weight_decay=0.1
    ),
    "diff_pruning": lambda model, data: sl.diff_pruning(
        model, K, lr_w=0.02, lr=LR, lr_alpha=1.0, epochs=(3, EPOCHS)
    ),
    "sara": lambda model, data: sl.sara(model, budget=K, lr=1e-4, lr_head=LR, lam=0, epochs=EPOCHS),
    "spt": lambda model, data: sl.spt(
        model, spend(model, data)[1], lr=LR, epochs=EPOCHS, weight_decay=0.1
    ),
    "sora": lambda model, data: sl.sora(
        sl.SoRA(model, 2, targets=targets(model)), lr=LR, lr_head=LR, lam=0.01, epochs=EPOCHS
    ),
}
IMPOSSIBLE = {("bitfit", "llama")}  # it has no bias


def method(name, model, data):
    """The phases of a method; a selection is trained under decay."""
    if name in PHASES:
        return PHASES[name](model, data)
    selection = SELECTIONS[name](model, data)
    return sl.fixed_mask(model, selection, lr=LR, epochs=EPOCHS, weight_decay=0.1)


def asked(name, model):
    """The number of weights that was asked for."""
    total = sum(p.numel() for p in sl.weights(model).values())
    return round(0.02 * total) if name == "child_tuning" else K


def ruled(name, model):
    """The number of weights that the method's rule names, without the head; 0 if it has none."""
    after = ("layers.1.", "layer.1.", "pooler.", "model.norm.", "vit.layernorm.")
    rules = {
        "bitfit": lambda n: n.endswith(".bias"),
        "last_layers": lambda n: any(part in n for part in after),
    }
    rule = rules.get(name, lambda n: False)
    return sum(p.numel() for n, p in sl.weights(model).items() if rule(n))


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
                now = sl.Step(step + 1, phase.epochs, optimizer)
                for action in (phase.before_step, lambda at: at.optimizer.step(), phase.after_step):
                    if action:
                        action(now)
            model.eval()


def pretrained(model, dtype):
    """The model as if it had been trained, with no weight at zero: biases of a new one are."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) / 50)
    return model.to(dtype)


def outside_phase(name, model, data):
    """The weights that may change if the phase does not say it: found before the training."""
    if name == "sara":  # re-selected
        return sl.smallest(model, K)
    if name == "sora":
        return sl.select_tensors(model, lambda n, p: n.removesuffix(".weight") in targets(model))
    if name == "spt":  # single weights are in its phase's selection, whole vectors are not
        _, spent = spend(model, data)
        whole = {n: torch.arange(model.get_parameter(n).numel()) for n in spent.whole}
        return sl.Selection({**spent.selection.indices, **whole}, shapes_of(model))
    return None


def shapes_of(model):
    return {n: tuple(p.shape) for n, p in sl.weights(model).items()}


class Run:
    """A method, run on a fresh model.

    `base` holds the bits before, `declared` the selection that the method says it trains (nothing,
    if it says none), `selection` the same, or else every weight that moved.
    """

    def __init__(self, build, batches, name, kind, setting, seed, device="cpu"):
        dtype = torch.bfloat16 if setting == "bfloat16" else torch.float32
        self.name = name
        self.fresh = lambda: pretrained(build(kind), dtype).to(device)
        self.model = self.fresh()
        self.base, self.keys = sl.snapshot(self.model), list(self.model.state_dict())
        given = batches(kind, 2 + seed, device=device)
        self.batch, self.data = given[0], given[seed:]  # another seed is another task
        declared = outside_phase(name, self.fresh(), self.data)

        def phases():
            nonlocal declared
            with closing(method(name, self.model, self.data)) as made:
                for phase in made:
                    if name not in ("sara", "sora", "spt"):
                        declared = phase.selection
                    yield phase
                    # Trained, and not yet merged or restored.
                    self.inside = {
                        n: p.detach().clone()
                        for n, p in self.model.named_parameters()
                        if n in self.base
                    }

        with torch.random.fork_rng(), torch.device("meta" if setting == "meta_default" else "cpu"):
            torch.manual_seed(seed)
            (accumulate if setting == "accumulation" else sl.fit)(self.model, phases(), self.data)
        self.candidates = {n: p for n, p in sl.weights(self.model).items() if n in self.base}
        self.head = sl.head_weights(self.model)
        self.modules = sl.adapters(self.model)
        self.declared = declared or sl.Selection({}, shapes_of(self.fresh()))
        self.selection = declared or self.moved()
        self.delta = partial(sl.diff, self.base, self.model, method=name)

    def moved(self):
        """Every candidate weight that is not what it was."""
        found = {
            n: (p.detach() != self.base[n]).reshape(-1).nonzero().squeeze(1).cpu()
            for n, p in self.candidates.items()
        }
        return sl.Selection({n: i for n, i in found.items() if len(i)}, shapes_of(self.fresh()))


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
    """As many weights as asked, or as the rule says, are trained, and the head moves."""
    assert one.selection.count == count(one.name, one.model)
    moved = sum(
        int((one.candidates[n].reshape(-1)[i] != one.base[n].reshape(-1)[i]).sum())
        for n, i in one.selection.indices.items()
    )
    # not all of them: a word may not occur, a step be lost in bfloat16
    assert moved > 0.5 * one.selection.count
    assert not any(torch.equal(p, one.base[n]) for n, p in one.head.items())


def rest_identical(one, other, path):
    """Every weight that is neither selected nor of the head has its bits."""
    masks = one.declared.masks()
    assert set(masks) == set(one.candidates)
    assert set(masks) | set(one.head) == set(one.base)
    for n, p in one.candidates.items():
        assert torch.equal(p.detach()[~masks[n]], one.base[n][~masks[n]]), n
    assert [key for key in one.model.state_dict() if ".adapter." not in key] == one.keys


def nearest(one, other, path):
    """No other tau costs what is nearer to the budget, and what is paid for is trained."""
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
    """No weight outside the head has moved before the merge; then some have, and travel."""
    assert all(torch.equal(one.inside[n], one.base[n]) for n in one.candidates)
    assert not any(torch.equal(one.inside[n], one.base[n]) for n in one.head)
    assert any(not torch.equal(p, one.base[n]) for n, p in one.candidates.items())
    travels(one, other, path)


def sparse(one, other, path):
    """A small file of only what was trained and the head, which travels."""
    delta, masks = one.delta(), one.selection.masks()
    modules = sum(p.numel() for module in one.modules.values() for p in module.parameters())
    assert delta.count <= one.selection.count + modules < 0.1 * one.selection.total
    assert all(
        masks[n].reshape(-1)[positions.long()].all() for n, positions in delta.positions.items()
    )
    assert all(masks[n].all() for n in delta.dense)
    travels(one, other, path)


def travels(one, other, path):
    """The delta is saved, loaded, applied and reverted, twice, and another one after it."""
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
    with pytest.raises(AssertionError):
        CHECKS[promise](one, other, tmp_path / "delta.safetensors")


@pytest.mark.parametrize("setting", ["float32", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", [name for name, promises in PROMISES.items() if not promises])
def test_what_promises_nothing_moves_everything(run, place, name, setting):
    one = run(name, "bert", setting, 0, place)
    assert one.declared.count == 0
    assert not [n for n, p in one.model.named_parameters() if torch.equal(p, one.base[n])]


def test_every_row_of_the_table_is_tested_and_every_promise_explained():
    assert set(PROMISES) == {*SELECTIONS, *PHASES}
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
