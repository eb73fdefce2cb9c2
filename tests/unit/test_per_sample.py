"""Scores of samples, many in a pass, are those of samples one by one."""

import copy
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.kernels import per_sample, together, uses
from selective_lite.scores import accumulate
from tests.architectures import ZOO, batch_of
from tests.architectures import build as built

FAMILIES = ("toy", "bert", "bert_tied", "llama", "gpt2", "vit")
# One by one, since a pass is refused: by layers without a rule under vmap (LSTM, Mamba, experts),
# by what is written to a batch's place, or by hooks around a layer.
ALONE = {
    *("longformer", "bloom", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "jamba"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "switch"),
    *("bart_classifier", "wav2vec2", "wav2vec2_ctc", "wavlm", "hubert"),
    *("torch_lstm", "torch_lstm_projected", "torch_gru"),
    *("torch_spectral_norm_by_hook", "torch_max_norm"),
}


@pytest.fixture
def seen(monkeypatch):
    """Sizes of the passes that were done, and how often a sample was alone."""
    found = SimpleNamespace(passes=[], alone=0)
    add_gradients, add = together.Pass.add_gradients, per_sample.Samples.__init__

    def passed(self, losses):
        add_gradients(self, losses)
        found.passes.append(self.size)

    def counted(self, model, loss, sums, add_to, alone):
        def once(batch):
            found.alone += 1
            alone(batch)

        add(self, model, loss, sums, add_to, once)

    monkeypatch.setattr(together.Pass, "add_gradients", passed)
    monkeypatch.setattr(per_sample.Samples, "__init__", counted)
    return found


def one_by_one(function, *args, **options):
    """What `function` gives where no pass is done."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(per_sample.Samples, "_agrees", lambda *_: False)
        return function(*args, **options)


def apart(found, expected):
    """The largest difference, over the largest score."""
    largest = max(float(score.abs().max()) for score in expected.values())
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / largest


def padded(batch, by):
    """A batch of texts whose i-th has ``by[i]`` tokens of padding."""
    mask = torch.ones_like(batch["input_ids"])
    for row, count in zip(mask, by, strict=True):
        row[len(row) - count :] = 0
    labels = batch["labels"]
    if labels.shape == mask.shape:
        labels = labels.masked_fill(mask == 0, -100)
    return {**batch, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_pass_gives_what_samples_give_alone(build, batches, seen, kind):
    model, data = build(kind).double(), batches(kind, 2, size=5)
    data = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in data]
    found = sl.squared_gradient(model, data)
    assert (seen.passes, seen.alone) == ([2, 4, 5], 1)  # the first sample alone, then twice
    assert apart(found, one_by_one(sl.squared_gradient, model, data)) < 1e-13


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_float32_to_rounding(build, batches, seen, kind):
    model, data = build(kind), batches(kind, 2, size=5)
    found = sl.squared_gradient(model, data)
    assert seen.passes == [2, 4, 5]
    exact = one_by_one(
        sl.squared_gradient, copy.deepcopy(model).double(), [to_double(b) for b in data]
    )
    assert apart(found, exact) < 1e-6


def to_double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("by", [(1, 2, 3, 1, 2), (0, 2, 3, 0, 0)], ids=["all", "some"])
def test_with_padding(build, batches, seen, kind, by):
    """A model that looks whether there is any goes another way for samples without."""
    model, batch = build(kind).double(), padded(batches(kind, 1, size=5)[0], by)
    found = sl.squared_gradient(model, [batch])
    assert sum(seen.passes) == 6
    assert seen.alone == 1
    assert apart(found, one_by_one(sl.squared_gradient, model, [batch])) < 1e-13


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(seen, name):
    model, batch = built(name), batch_of(name)
    options = {"loss": ZOO[name].loss, "head": ZOO[name].head}
    found = sl.squared_gradient(model, [batch], **options)
    together = 3 in seen.passes
    assert together == (name not in ALONE)
    assert seen.alone == (1 if together else 4)
    expected = one_by_one(sl.squared_gradient, model, [batch], **options)
    assert apart(found, expected) < (1e-12 if ZOO[name].dtype == torch.float64 else 1e-5)


def test_labels_of_the_model_and_expected_ones(build, batches, seen):
    model, data = build("bert").double(), batches("bert", 2, size=4)
    for score in (lambda *a: sl.squared_gradient(*a, labels="model"), sl.expected_squared_gradient):
        seen.passes.clear()
        found = score(model, data)
        assert sum(seen.passes) > 8
        assert apart(found, one_by_one(score, model, data)) < 1e-13


@pytest.mark.parametrize("order", [1, 2])
def test_taylor(build, batches, order):
    model, data = build("bert").double(), batches("bert", 2, size=4)
    found = sl.taylor(model, data, order=order)
    assert apart(found, one_by_one(sl.taylor, model, data, order=order)) < 1e-13


def test_any_sum_entry_by_entry(build, batches):
    def magnitude(total, gradient):
        total.add_(gradient.abs())

    model, data = build("bert_tied").double(), batches("bert_tied", 1, size=4)
    args = (model, data, sl.model_loss, None, magnitude)
    found = accumulate(*args, per_sample=True)
    assert apart(found, one_by_one(accumulate, *args, per_sample=True)) < 1e-13


def test_masks_are_the_same(build, batches):
    model, data = build("bert"), batches("bert", 4, size=8)
    found = sl.select(sl.squared_gradient(model, data), 0.02)
    expected = sl.select(one_by_one(sl.squared_gradient, model, data), 0.02)
    assert found.indices.keys() == expected.indices.keys()
    assert all(torch.equal(found.indices[n], expected.indices[n]) for n in found.indices)


@torch.jit.script
def doubled(weight):
    """A function that torch's modes do not see."""
    return 2 * weight


class Odd(nn.Module):
    """A linear layer, and something odd between its output and the loss."""

    def __init__(self, way):
        super().__init__()
        self.way, self.kept = way, None
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.way(self, x)


def hidden(model, x):
    return x @ doubled(model.layer.weight) + model.other(x)


def inner(model, x):
    out = model.layer(x).square().sum()
    (g,) = torch.autograd.grad(out, model.layer.weight, create_graph=True)
    return model.other(x) * g.sum()


def inside(model, x):
    h = model.layer(x)
    (g,) = torch.autograd.grad(model.other(h).square().sum(), h, create_graph=True)
    return h * g


def drawn(model, x):
    return nn.functional.dropout(model.layer(x), 0.5, training=True) * 0 + model.layer(x)


def no_pass_here(model, x):
    return model.layer(torch.from_numpy(x.detach().numpy()))


def cached(model, x):
    model.kept = model.layer(x)
    return model.kept


@pytest.mark.parametrize("way", [hidden, inner, inside, drawn, no_pass_here])
def test_what_a_pass_cannot_do_is_done_one_by_one(seen, way):
    torch.manual_seed(0)
    model, x = Odd(way).double(), torch.randn(5, 4).double()
    loss = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    found = sl.squared_gradient(model, [{"x": x}], loss=loss, head=())
    assert (seen.passes, seen.alone) == ([], 5)
    expected = Counter()
    for i in range(5):
        gradients = torch.autograd.grad(
            loss(model, {"x": x[i : i + 1]}), list(model.parameters()), allow_unused=True
        )
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
            expected[name] += 0 if g is None else g.square()
    for name, score in found.items():
        torch.testing.assert_close(score, torch.zeros_like(score) + expected[name])


def test_a_pass_that_fails_later(seen):
    """What went well for the first batch need not do so for the next."""
    model = Odd(
        lambda model, x: model.layer(x if x.dim() == 2 else no_pass_here(model, x))
    ).double()
    data = [{"x": torch.randn(size, dtype=torch.float64)} for size in ((3, 4), (3, 2, 4), (3, 4))]
    options = {"loss": lambda model, batch: model(batch["x"]).square().mean(), "head": ()}
    found = sl.squared_gradient(model, data, **options)
    assert (seen.passes, seen.alone) == ([2, 2], 1 + 3 + 3)
    assert apart(found, one_by_one(sl.squared_gradient, model, data, **options)) < 1e-13


def test_a_pass_refuses_a_weight_that_it_does_not_see():
    """Before it has changed a sum; the trial, which would notice it, sees one sample only."""
    model, x = Odd(hidden).double(), torch.randn(5, 4).double()
    sums = {p: torch.zeros_like(p) for p in model.parameters()}
    with pytest.raises(together.Unsuited, match="no function of torch"):
        together.Pass(sums, torch.Tensor.add_, 5).losses(lambda x: model(x).square().mean(), [x])
    assert not any(total.any() for total in sums.values())


def written_on(model, x):
    return model.layer(x).relu_() + model.layer.weight.sum() + model.layer(model.other(x))


def once_forgotten(model, x):
    model.layer(x)  # a use without a gradient
    with torch.no_grad():
        model.layer(x)
    return model.layer(x) * model.other.bias


@pytest.mark.parametrize("way", [written_on, once_forgotten, cached])
def test_weights_used_in_several_ways(seen, way):
    torch.manual_seed(0)
    model, x = Odd(way).double(), torch.randn(5, 4).double()
    loss = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    found = sl.squared_gradient(model, [{"x": x}], loss=loss, head=())
    assert seen.passes == [2, 4]
    assert (
        apart(found, one_by_one(sl.squared_gradient, model, [{"x": x}], loss=loss, head=())) < 1e-13
    )


def test_what_a_pass_cached_is_forgotten(seen):
    model, x = Odd(cached).double(), torch.randn(5, 4).double()
    sl.squared_gradient(model, [{"x": x}], loss=lambda m, b: m(b["x"]).square().mean(), head=())
    assert seen.passes == [2, 4]
    assert model.kept.shape == (1, 4)  # of the sample that was alone: an ordinary tensor
    assert model.kept.isfinite().all()


def test_a_table_without_its_padding(seen):
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, padding_idx=-2).double()
    data = [{"ids": torch.tensor([[1, 5, 5, 2], [1, 1, 5, 0], [3, 5, 1, 3], [6, 6, 6, 6]])}]
    loss = lambda model, batch: (model(batch["ids"]) - 1).pow(3).mean()  # noqa: E731
    found = sl.squared_gradient(table, data, loss=loss, head=())
    assert seen.passes == [2, 3]
    assert apart(found, one_by_one(sl.squared_gradient, table, data, loss=loss, head=())) < 1e-13
    assert not found["weight"][5].any()


def test_a_loss_that_chooses_by_label(build, batches, seen):
    def chosen(model, batch):
        return -model(batch["input_ids"]).logits.log_softmax(-1)[0, int(batch["labels"])]

    model, data = build("bert").double(), batches("bert", 1, size=9)
    found = sl.squared_gradient(model, data, loss=chosen)
    assert seen.alone < 9
    assert apart(found, sl.squared_gradient(model, data)) < 1e-13


@pytest.mark.parametrize("what", ["nan", "error", "vector"])
def test_an_error_is_that_of_the_sample(build, batches, what):
    model, (batch,) = build("bert"), batches("bert", 1, size=5)
    before = sl.snapshot(model)

    def loss(model, batch):
        found = model(**batch).loss
        if what == "vector":
            return found.expand(2)
        if what == "nan":
            return found * torch.where(batch["input_ids"].sum() == last, torch.nan, 1.0)
        if batch["input_ids"].sum() == last:
            raise RuntimeError("of the last sample")
        return found

    last = batch["input_ids"][-1].sum()
    errors = {
        "nan": "loss is nan in scoring",
        "error": "of the last sample",
        "vector": re.escape("loss is of shape (2,) in scoring"),
    }
    with pytest.raises((ValueError, TypeError, RuntimeError), match=errors[what]):
        sl.squared_gradient(model, [batch], loss=loss)
    assert all(torch.equal(before[name], now) for name, now in sl.snapshot(model).items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rule", ["Product", "Dense", "Rows", "mixed"])
def test_a_pass_that_is_wrong_is_noticed(build, batches, seen, monkeypatch, rule):
    """The first sample, which is scored in both ways, says so."""
    model, data = build("bert"), batches("bert", 1, size=5)
    expected = one_by_one(sl.squared_gradient, model, data)
    if rule == "Rows":
        rows = uses._accumulate_rows
        wrong = lambda total, parts, add: rows(total, parts[:0] or parts, lambda t, g: None)  # noqa: E731
        monkeypatch.setattr(uses, "_accumulate_rows", wrong)
    elif rule == "mixed":  # samples are added up before they are squared
        product = uses.Product.added
        wrong = lambda self, to, i: sum(product(self, to, s) for s in range(len(self)))  # noqa: E731
        monkeypatch.setattr(uses.Product, "added", wrong)
    else:
        kind = getattr(uses, rule)
        right = kind.added
        monkeypatch.setattr(kind, "added", lambda self, to, i: 1.1 * right(self, to, i))
    seen.passes.clear()
    found = sl.squared_gradient(model, data)
    assert (seen.passes, seen.alone) == ([], 10)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_a_pass_takes_as_many_samples_as_its_memory_holds(build, batches, seen, monkeypatch):
    model, (batch,) = build("llama"), batches("llama", 1, size=40)
    sl.squared_gradient(model, [batch])
    assert seen.passes == [2, 32, 7]
    seen.passes.clear()
    monkeypatch.setattr(per_sample, "SAVED", 1 << 18)
    sl.squared_gradient(model, [batch])
    (few,) = set(seen.passes[1:-1])
    assert 1 < few < 32
    longer = {key: torch.cat([value, value], 1) for key, value in batch.items()}
    seen.passes.clear()
    sl.squared_gradient(model, [batch, longer])
    assert few // 4 in seen.passes


def test_copies_for_samples_are_limited(build, batches, seen, monkeypatch):
    monkeypatch.setattr(together, "COPIES", 1000)
    sl.squared_gradient(build("vit"), batches("vit", 1, size=5))
    assert (seen.passes, seen.alone) == ([], 5)


@pytest.mark.parametrize("around", ["hook", "compile", "list"])
def test_what_is_not_tried(build, batches, seen, around):
    model, (batch,) = build("bert"), batches("bert", 1, size=4)
    shapes = []
    if around == "hook":
        model.bert.register_forward_hook(lambda module, args, out: shapes.append(out[0].shape))
    if around == "compile":
        model = torch.compile(model, backend="eager")
    if around == "list":
        batch = {**batch, "texts": ["a", "b", "c", "d"]}

    def loss(model, batch):
        assert len(batch.get("texts", ["one"])) == 1
        return model(batch["input_ids"], labels=batch["labels"]).loss

    sl.squared_gradient(model, [batch], loss=loss)
    assert (seen.passes, seen.alone) == ([], 0 if around == "list" else 4)  # 0: not asked at all
