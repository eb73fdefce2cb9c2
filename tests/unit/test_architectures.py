"""Masked training and its file are right on every architecture of the zoo, or refused by name."""

import contextlib
import copy
import re
from collections import Counter

import pytest
import torch
from torch import nn

import selective_lite as sl
from tests.architectures import ZOO, batch_of, build, outputs

RIGHT, REFUSED = (
    [name for name, architecture in ZOO.items() if bool(architecture.refused) == refused]
    for refused in (False, True)
)
LR, DECAY = 1e-3, 0.1
each = pytest.mark.parametrize("name", RIGHT)


class Summary:
    """Counts what became of each architecture, and says it at the end of the run."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if "test_architectures.py" not in report.nodeid or "[" not in report.nodeid:
            return
        name, outcome = report.nodeid.rpartition("[")[2].rstrip("]"), "right"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            outcome = "wrong" if crash and "AssertionError" in crash.message else "crashed"
        elif report.skipped:
            outcome = "not installed"
        elif name in REFUSED:
            outcome = "refused"
        if report.when == "call" or report.outcome != "passed":
            worst = self.found.get(name, "")
            self.found[name] = worst if worst in ("wrong", "crashed") else outcome

    def pytest_terminal_summary(self, terminalreporter):
        if not self.found:
            return
        terminalreporter.section("architectures")
        counts = Counter({"wrong": 0, "crashed": 0})
        counts.update(self.found.values())
        for outcome, count in sorted(counts.items()):
            names = [n for n, o in self.found.items() if o == outcome and outcome != "right"]
            names = [f"{n} ({ZOO[n].refused})" if outcome == "refused" else n for n in names]
            terminalreporter.write_line(f"{count:4d} {outcome} {', '.join(names)}".rstrip())


@pytest.fixture(autouse=True, scope="module")
def _summary(request):
    """Register the summary for the rest of the run."""
    request.config.pluginmanager.register(Summary())


def loss_of(name, model, batch):
    return ZOO[name].loss(model, batch)


def candidates(model, name):
    return sl.weights(model, ZOO[name].head)


def some(model, name, names=None, per_tensor=5):
    """A selection of a few random entries, never all, of every candidate (or of these)."""
    generator = torch.Generator().manual_seed(0)
    chosen = {n: p for n, p in candidates(model, name).items() if names is None or n in names}
    indices = {}
    for n, p in chosen.items():
        count = min(per_tensor, max(1, p.numel() // 2))
        indices[n] = torch.randperm(p.numel(), generator=generator)[:count].sort().values
    return sl.Selection(indices, {n: tuple(p.shape) for n, p in chosen.items()})


def dense_gradients(name):
    """Of every parameter, in training mode, by a plain backward of a model of its own."""
    model = build(name).train()
    loss_of(name, model, batch_of(name)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def read(model, name):
    """A selection of the candidates that the loss reads, so that each of them has a gradient."""
    gradients = dense_gradients(name)
    return some(model, name, [n for n in candidates(model, name) if gradients[n] is not None])


def masked(model, selection, name, **options):
    return sl.masked(model, selection, head=ZOO[name].head, **options)


def adamw(parameters, name):
    # A gradient that is zero but for rounding must not move a weight by a whole step.
    eps = 1e-6 if ZOO[name].dtype == torch.float64 else 1e-3
    return torch.optim.AdamW(list(parameters), lr=LR, weight_decay=DECAY, eps=eps)


def train(model, name, steps=3):
    """Train what requires gradients, in training mode; the model is left in evaluation mode."""
    model.train()
    optimizer = adamw((p for p in model.parameters() if p.requires_grad), name)
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(name, model, batch_of(name, seed)).backward()
        optimizer.step()
    model.eval()


def assert_same(found, expected, tolerance=0.0):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        apart = (f - e).abs().max().item()
        assert apart <= tolerance * max(1.0, e.abs().max().item())


@each
def test_compact_gradients_are_the_dense_ones(name):
    model, dense = build(name).train(), dense_gradients(name)
    selection = some(model, name)
    with masked(model, selection, name, allow_unused=True) as training:
        loss_of(name, model, batch_of(name)).backward()
        compact = dict(zip(selection.indices, training.parameters(), strict=True))
        gradients = {n: p.grad for n, p in compact.items()}
    largest = max(g.abs().max() for g in dense.values() if g is not None)
    tolerance = 1e-8 if ZOO[name].dtype == torch.float64 else 1e-5
    for n, index in selection.indices.items():
        if dense[n] is None:
            assert gradients[n] is None or not gradients[n].any(), n
            continue
        expected = dense[n].reshape(-1)[index]
        assert gradients[n] is not None or not expected.any(), n
        if gradients[n] is not None:
            apart = (gradients[n].reshape(-1)[: len(index)] - expected).abs().max()
            own = dense[n].abs().max().clamp(min=1e-4 * largest)  # a small tensor's counts as well
            assert apart <= tolerance * own, n


@each
def test_three_steps_are_those_of_dense_masked_adamw(name):
    model, dense = build(name), build(name).train()
    selection = read(model, name)
    with masked(model, selection, name):
        train(model, name)

    start = sl.snapshot(dense)
    named = dict(dense.named_parameters())
    head = sl.head_weights(dense, ZOO[name].head)
    keep = {n: torch.zeros_like(named[n], dtype=torch.bool) for n in selection.indices}
    for n, index in selection.indices.items():
        keep[n].view(-1)[index] = True
    optimizer = adamw([named[n] for n in (*selection.indices, *head)], name)
    for seed in range(3):
        for p in named.values():
            p.grad = None
        loss_of(name, dense, batch_of(name, seed)).backward()
        for n, kept in keep.items():
            named[n].grad.mul_(kept)
        optimizer.step()
        with torch.no_grad():
            for n, kept in keep.items():
                named[n].copy_(torch.where(kept, named[n], start[n]))
    tolerance = 1e-8 if ZOO[name].dtype == torch.float64 else 1e-5
    for n, p in model.named_parameters():
        assert (p - named[n]).abs().max() <= tolerance, n
        if n in keep:
            assert torch.equal(p[~keep[n]], start[n][~keep[n]]), f"{n}: an unselected weight moved"
            assert not torch.equal(p[keep[n]], start[n][keep[n]]), f"{n}: no selected weight moved"


@each
def test_evaluation_is_the_same_inside_after_leaving_and_in_a_copy(name):
    model, batch = build(name), batch_of(name)
    before = outputs(model, batch)
    with masked(model, read(model, name), name):
        train(model, name)
        inside, copied = outputs(model, batch), outputs(copy.deepcopy(model), batch)
    after = outputs(model, batch)
    tolerance = 1e-10 if ZOO[name].dtype == torch.float64 else 1e-5
    assert_same(copied, inside, tolerance)
    assert_same(after, inside, tolerance)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@each
def test_copy_made_inside_trains_for_itself(name):
    model, batch = build(name), batch_of(name)
    with masked(model, read(model, name), name):
        train(model, name, steps=1)
        before = outputs(model, batch)
        twin = copy.deepcopy(model)
        train(twin, name, steps=2)
        assert_same(outputs(model, batch), before)
        train(model, name, steps=2)
        tolerance = 1e-8 if ZOO[name].dtype == torch.float64 else 1e-4
        assert_same(outputs(twin, batch), outputs(model, batch), tolerance)
    assert any(not torch.equal(a, b) for a, b in zip(outputs(twin, batch), before, strict=True))


@each
def test_state_saved_inside_loads_into_an_ordinary_model(name):
    model, ordinary, batch = build(name), build(name), batch_of(name)
    with masked(model, read(model, name), name):
        train(model, name)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        inside = outputs(model, batch)
    ordinary.load_state_dict(state, strict=True)
    tolerance = 1e-10 if ZOO[name].dtype == torch.float64 else 1e-5
    assert_same(outputs(ordinary, batch), inside, tolerance)


@each
def test_file_gives_a_fresh_base_the_same_answers_and_takes_them_back(name, tmp_path):
    model, fresh, batch = build(name), build(name), batch_of(name)
    with masked(model, read(model, name), name) as tuning:
        train(model, name)
    tuning.delta().save(tmp_path / "tuned.safetensors")
    base = outputs(fresh, batch)
    applied = sl.load(tmp_path / "tuned.safetensors").apply(fresh)
    assert_same(outputs(fresh, batch), outputs(model, batch))
    applied.revert()
    assert_same(outputs(fresh, batch), base)


@each
def test_what_is_selected_by_default_trains(name):
    model, batch, head = build(name), batch_of(name), ZOO[name].head
    scores = sl.squared_gradient(model, [batch], loss=ZOO[name].loss, head=head)
    total = sum(s.numel() for s in scores.values())
    selection = sl.select(scores, max(20, round(0.005 * total)))
    start = sl.snapshot(model)
    sl.fit(
        model,
        sl.fixed_mask(model, selection, lr=LR, epochs=1, head=head),
        [batch],
        loss=ZOO[name].loss,
    )
    named, dense = dict(model.named_parameters()), dense_gradients(name)
    for n, index in selection.indices.items():
        moved = (named[n] != start[n]).reshape(-1)
        # Scores are of evaluation; a bias before a batch norm has no gradient in training.
        without = dense[n].reshape(-1)[index].abs() < 1e-12
        assert (moved[index] | without).all(), n
        assert moved.sum() <= len(index), n


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_before_anything_is_scored(name):
    model = build(name)
    state = copy.deepcopy(model.state_dict())

    def loss(model, batch):
        raise AssertionError("scored")

    for call in (
        lambda: sl.fish(model, [batch_of(name)], 20, loss=loss),
        lambda: sl.masked(model, some(model, name)),
    ):
        with pytest.raises(ValueError, match=re.escape(ZOO[name].refused)):
            call()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert type(model.body) is type(build(name).body)


def test_zoo_is_large_and_draws_nothing_at_random():
    assert len(ZOO) >= 60
    for name in RIGHT:
        with contextlib.suppress(pytest.skip.Exception):
            model = build(name)
            rates = [m.p for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
            assert not any(rates), name
