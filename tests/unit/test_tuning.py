"""Tuning: the delta of masked training is, to the byte, the diff to a snapshot; and it resumes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.ship.file import bits

KINDS = ("toy", "bert", "llama", "gpt2", "vit")
DTYPES = (torch.float32, torch.bfloat16)


class Normed(nn.Module):
    """A batch norm between two layers: its statistics move in training."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.classifier = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.classifier(torch.relu(self.norm(self.first(x))))


def normed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Normed()


def mixed(model, pick):
    """Some weights of most tensors, two tensors whole, and of every fourth tensor none."""
    chosen, candidates = pick(model), sl.weights(model)
    indices = {n: i for number, (n, i) in enumerate(chosen.indices.items()) if number % 4}
    for name in list(indices)[1:3]:
        indices[name] = torch.arange(candidates[name].numel())
    return sl.Selection(indices, chosen.shapes, "by hand")


def optimizer_of(tuning):
    trained = (*tuning.parameters(), *tuning.dense_parameters())
    return torch.optim.AdamW(trained, lr=0.01)


def steps(model, data, tuning, optimizer=None):
    """A plain loop; gives its optimizer."""
    optimizer = optimizer or optimizer_of(tuning)
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def content(delta, path, encoding="flat"):
    delta.save(path, encoding)
    return path.read_bytes()


@pytest.fixture
def data(batches):
    """data(kind, dtype) -> three batches, images in the model's dtype."""

    def make(kind, dtype=torch.float32):
        return [
            {key: t.to(dtype) if t.is_floating_point() else t for key, t in batch.items()}
            for batch in batches(kind, 3)
        ]

    return make


@pytest.mark.parametrize("encoding", ["flat", "gap-lzma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_is_the_diff_to_a_snapshot_to_the_byte(
    build, pick, data, tmp_path, kind, dtype, encoding
):
    model = build(kind).to(dtype)
    selection, before = mixed(model, pick), sl.snapshot(model)
    with sl.masked(model, selection) as tuning:
        steps(model, data(kind, dtype), tuning)
        inside = content(tuning.delta("it"), tmp_path / "inside", encoding)
        assert content(sl.diff(before, model, method="it"), tmp_path / "diff", encoding) == inside
    after = content(tuning.delta("it"), tmp_path / "after", encoding)
    expected = content(sl.diff(before, model, method="it"), tmp_path / "expected", encoding)
    assert inside == after == expected
    delta = sl.load(tmp_path / "after")
    assert delta.positions
    assert delta.dense or dtype == torch.bfloat16  # there, rounding keeps some of every tensor
    assert set(delta.head) == set(sl.head_weights(model))
    base = build(kind).to(dtype)
    delta.apply(base)
    now = sl.snapshot(model)
    assert all(torch.equal(t, now[name]) for name, t in sl.snapshot(base).items())


def test_buffers_and_a_head_that_is_given_are_in_it(tmp_path):
    model = normed()
    before = sl.snapshot(model)
    chosen = sl.Selection({"first.weight": torch.tensor([1, 7])}, {"first.weight": (6, 4)})
    with sl.masked(model, chosen, head=("classifier.bias",), dense="norm") as tuning:
        optimizer = optimizer_of(tuning)
        for seed in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()
        inside = content(tuning.delta(), tmp_path / "inside")
        diff = sl.diff(before, model, head=("classifier.bias",))
        assert content(diff, tmp_path / "diff") == inside
    assert content(tuning.delta(), tmp_path / "after") == inside
    diff = sl.diff(before, model, head=("classifier.bias",))
    assert content(diff, tmp_path / "diff") == inside
    assert set(diff.buffers) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert set(diff.head) == {"classifier.bias"}


def test_small_modules_are_in_it(build, data, pick):
    base, model = build("bert"), build("bert")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    sl.add_adapters(model, name, rank=2)
    chosen = pick(model)
    partly = {n: i for n, i in chosen.indices.items() if "adapter" not in n and n != name}
    chosen = sl.Selection(partly, chosen.shapes)
    with sl.masked(model, chosen, dense=tuple(n for n in sl.weights(model) if "adapter" in n)) as t:
        steps(model, data("bert"), t)
    delta = t.delta()
    assert set(delta.modules) == {name}
    assert not any("adapter" in n for n in delta.replaced())
    assert delta.metadata["total"] == sum(p.numel() for p in sl.weights(base).values())
    delta.apply(base)
    (batch, *_) = data("bert")
    assert torch.equal(base(**batch).logits, model(**batch).logits)


def test_the_method_is_the_selection_s_unless_it_is_given(build, pick, data):
    model = build("toy")
    with sl.masked(model, mixed(model, pick)) as tuning:
        steps(model, data("toy"), tuning)
    assert tuning.delta().metadata["method"] == "by hand"
    assert tuning.delta("another").metadata["method"] == "another"


def test_the_delta_is_of_when_training_was_left(build, pick, data, tmp_path):
    model = build("toy")
    with sl.masked(model, mixed(model, pick)) as tuning:
        steps(model, data("toy"), tuning)
    first = content(tuning.delta(), tmp_path / "first")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert content(tuning.delta(), tmp_path / "second") == first


def test_nothing_changed_and_no_head_raises(build, pick):
    model = build("llama")
    with (
        sl.masked(model, mixed(model, pick)) as tuning,
        pytest.raises(ValueError, match="there is nothing to store"),
    ):
        tuning.delta()


# Float32 values for a half-precision base


def test_precise_values_round_to_the_base_s_dtype_and_revert_is_exact(build, pick, data, tmp_path):
    model = build("bert").to(torch.bfloat16)
    with sl.masked(model, mixed(model, pick)) as tuning:
        steps(model, data("bert"), tuning)
    tuning.delta(precise=True).save(tmp_path / "delta")
    delta = sl.load(tmp_path / "delta")
    stored = {tensor.dtype for _, tensor in delta.replaced().values()}
    assert stored == {torch.float32}
    rounded = [n for n, (_, t) in delta.replaced().items() if not torch.equal(t, t.bfloat16())]
    assert len(rounded) > 10
    assert "torch.bfloat16 (stored as torch.float32)" in sl.describe(delta)
    base = build("bert").to(torch.bfloat16)
    before, now = sl.snapshot(base), sl.snapshot(model)
    with delta.apply(base):
        assert all(torch.equal(p, now[name]) for name, p in base.named_parameters())
    assert all(torch.equal(bits(p), bits(before[name])) for name, p in base.named_parameters())
    with pytest.raises(sl.DeltaError, match="is torch.float32, the delta's base is torch.bfloat16"):
        delta.apply(build("bert"))
    summed = sl.combine(base, [delta, delta], [0.5, 0.5])
    assert "rounds_to" not in summed.metadata
    assert {tensor.dtype for _, tensor in summed.replaced().values()} == {torch.bfloat16}


def test_precise_is_complete(build, pick, data):
    model = build("toy")
    selection = mixed(model, pick)
    with sl.masked(model, selection) as tuning:
        delta = tuning.delta(precise=True)
    assert delta.count == selection.count
    found = delta.selection(model)
    assert found.indices.keys() == selection.indices.keys()
    assert all(torch.equal(found.indices[n], i) for n, i in selection.indices.items())


# Resuming


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_resumed_training_ends_with_the_same_bits(build, pick, data, tmp_path, kind, dtype):
    first, *rest = data(kind)
    straight = build(kind).to(dtype)
    with sl.masked(straight, mixed(straight, pick)) as tuning:
        optimizer = steps(straight, [first], tuning)
        tuning.delta(precise=True).save(tmp_path / "stopped")
        moments = {k: v.clone() for k, v in _moments(optimizer)}
        steps(straight, rest, tuning, optimizer)
    resumed = build(kind).to(dtype)
    delta = sl.load(tmp_path / "stopped")
    with sl.masked(resumed, delta.selection(resumed)) as tuning:
        tuning.resume(delta)
        optimizer = optimizer_of(tuning)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        group = optimizer.param_groups[0]
        group["lr"] = 0.0  # a step that moves nothing makes the state, which is then replaced
        optimizer.step()
        group["lr"] = 0.01
        with torch.no_grad():
            for key, moment in _moments(optimizer):
                moment.copy_(moments[key])
        steps(resumed, rest, tuning, optimizer)
    now = sl.snapshot(straight)
    assert all(torch.equal(bits(p), bits(now[n])) for n, p in sl.snapshot(resumed).items())


def _moments(optimizer):
    for number, p in enumerate(optimizer.param_groups[0]["params"]):
        for key, moment in optimizer.state[p].items():
            yield (number, key), moment


def test_what_the_delta_does_not_have_starts_again(build, pick, data):
    """A plain delta holds what moved; unmoved weights and buffers get their first values."""
    model = normed()
    chosen = sl.Selection({"first.weight": torch.tensor([1, 7])}, {"first.weight": (6, 4)})
    with sl.masked(model, chosen) as tuning:
        with torch.no_grad():
            tuning.parameters()[0][0] += 1
        delta = tuning.delta()
        wanted = sl.snapshot(model)
        with torch.no_grad():
            tuning.parameters()[0].add_(5)
            model.classifier.weight.add_(1)
        model(torch.randn(3, 4))
        tuning.resume(delta)
        assert delta.positions["first.weight"].tolist() == [1]
    assert all(torch.equal(t, wanted[name]) for name, t in sl.snapshot(model).items())


def other_selection(model, pick):
    return sl.Selection(pick(model, seed=1).indices, pick(model).shapes)


def without(selection, name):
    indices = {n: i for n, i in selection.indices.items() if n != name}
    return sl.Selection(indices, selection.shapes)


def larger(selection, name):
    """One more weight of a tensor."""
    free = ~selection.masks()[name].view(-1)
    more = torch.cat([selection.indices[name], free.nonzero().squeeze(1)[:1]]).sort().values
    return sl.Selection({**selection.indices, name: more}, selection.shapes)


NAME = "first.weight"
OTHERS = {
    "other positions": (lambda m, pick: other_selection(m, pick), "weights of 'embedding.weight'"),
    "a tensor less": (lambda m, pick: without(pick(m), NAME), f"'{NAME}' is not trained"),
    "a weight more": (lambda m, pick: larger(pick(m), NAME), f"has 3 weights of '{NAME}'.* has 4"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_selection_is_refused_and_named(build, pick, data, other):
    make, message = OTHERS[other]
    model = build("toy")
    with sl.masked(model, pick(model)) as tuning:
        steps(model, data("toy"), tuning)
    delta, fresh = tuning.delta(precise=True), build("toy")
    with sl.masked(fresh, make(fresh, pick)) as tuning:
        before = tuning.values()
        with pytest.raises(ValueError, match=f"delta is of another selection.*{message}"):
            tuning.resume(delta)
        assert all(torch.equal(t, before[name]) for name, t in tuning.values().items())


def test_another_head_model_base_or_a_closed_training_is_refused(build, pick, data):
    model = build("toy")
    with sl.masked(model, pick(model)) as tuning:
        steps(model, data("toy"), tuning)
    delta = tuning.delta(precise=True)
    with pytest.raises(ValueError, match="masked training was left"):
        tuning.resume(delta)
    fresh = build("toy")
    with (
        sl.masked(fresh, pick(fresh), head=()) as tuning,
        pytest.raises(
            ValueError, match="do not have the same head: only one has 'classifier.bias'"
        ),
    ):
        tuning.resume(delta)
    foreign = build("toy", seed=1)
    with (
        sl.masked(foreign, pick(foreign)) as tuning,
        pytest.raises(sl.DeltaError, match="not the base that this delta was made from"),
    ):
        tuning.resume(delta)
    bert = build("bert")
    with (
        sl.masked(bert, pick(bert)) as tuning,
        pytest.raises(
            ValueError, match="delta has 'embedding.weight', the model in training has no"
        ),
    ):
        tuning.resume(delta)
    fresh.second = nn.Linear(7, 4, bias=False)
    with (
        sl.masked(fresh, pick(fresh)) as tuning,
        pytest.raises(ValueError, match=r"'second.weight' has shape \[5, 7\], .* has \[4, 7\]"),
    ):
        tuning.resume(delta)


# The front door speaks once


def test_masked_says_once_in_a_process_what_it_trains():
    code = """
import torch
from torch import nn
import selective_lite as sl
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.classifier = nn.Linear(2, 3), nn.Linear(3, 2)
model = Net()
shapes = {"first.weight": (3, 2), "first.bias": (3,)}
chosen = sl.Selection({"first.weight": torch.tensor([0, 4])}, shapes)
for _ in range(2):
    with sl.masked(model, chosen):
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "selective_lite trains 2 of 9 weights of this Net, and its head whole "
        "(classifier.weight, classifier.bias: 8 weights)\n"
    )
