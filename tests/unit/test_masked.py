"""Masked training: only what is selected moves, as a dense masked optimizer would move it."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import selective_lite as sl
from selective_lite.kernels import native
from selective_lite.kernels.sampled import by_feature, columns_as_rows, footprint, sampled_product
from selective_lite.layers.entries import why_refused
from selective_lite.layers.masked import training_of

TRANSFORMERS = ("bert_tied", "llama", "gpt2")


def unselected(tensors, selection):
    """The bits of everything that is not selected."""
    masks = selection.masks()
    return {
        n: t.detach()[~masks[n]] if n in masks else t.detach().clone() for n, t in tensors.items()
    }


def changed(before, after, selection):
    """The share of selected weights whose value is another one now."""
    moved = sum(
        (before[n].reshape(-1)[i] != after[n].reshape(-1)[i]).sum()
        for n, i in selection.indices.items()
    )
    return float(moved) / selection.count


def assert_untouched(before, model, selection):
    named = sl.snapshot(model)
    assert list(named) == list(before)
    frozen = unselected(named, selection)
    for name, expected in unselected(before, selection).items():
        assert torch.equal(expected, frozen[name]), name


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


TRAININGS = {
    "sgd, momentum, decay, clipping, accumulation": {
        "optimizer": lambda p: torch.optim.SGD(
            p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
        "clip": 0.5,
        "accumulate": 2,
    },
    "adamw, decay, autocast bf16": {"optimizer": adamw, "autocast": True},
    "adamw, decay, checkpointing": {"optimizer": adamw, "checkpoint": False},
    "adamw, decay, reentrant checkpointing": {"optimizer": adamw, "checkpoint": True},
}


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable`:FutureWarning"
)  # its new name is too new
@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("bert_tied", "sgd, momentum, decay, clipping, accumulation"),
        ("bert_tied", "adamw, decay, autocast bf16"),
        ("bert_tied", "adamw, decay, checkpointing"),
        ("llama", "sgd, momentum, decay, clipping, accumulation"),
        ("llama", "adamw, decay, autocast bf16"),
        ("llama", "adamw, decay, reentrant checkpointing"),
        ("gpt2", "adamw, decay, autocast bf16"),
        ("gpt2", "adamw, decay, checkpointing"),
    ],
)
def test_unselected_weights_keep_every_bit_through_50_steps(build, batches, pick, kind, training):
    setup = TRAININGS[training]
    model, data = build(kind), batches(kind, 5)
    selection, before = pick(model), sl.snapshot(model)
    if "checkpoint" in setup:
        model.gradient_checkpointing_enable({"use_reentrant": setup["checkpoint"]})
    model.train()
    with sl.masked(model, selection, head=()):
        optimizer = setup["optimizer"]([p for p in model.parameters() if p.requires_grad])
        for step in range(50):
            for part in range(setup.get("accumulate", 1)):
                with torch.autocast("cpu", torch.bfloat16, enabled=setup.get("autocast", False)):
                    loss = model(**data[(step + part) % len(data)]).loss
                loss.backward()
            if "clip" in setup:
                nn.utils.clip_grad_norm_(model.parameters(), setup["clip"])
            optimizer.step()
            model.zero_grad()
    assert_untouched(before, model, selection)
    assert changed(before, sl.snapshot(model), selection) > 0.9


def test_momentum_that_predates_the_mask_does_not_leak(build, batches, pick):
    model, data = build("toy"), batches("toy", 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(**data[0]).loss.backward()
    optimizer.step()
    selection, before = pick(model), sl.snapshot(model)
    with sl.masked(model, selection, head=()) as training:
        optimizer.add_param_group({"params": training.parameters()})
        for _ in range(3):
            model(**data[1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_untouched(before, model, selection)


def test_a_bfloat16_model_trains_in_float32_and_keeps_its_unselected_bits(build, batches, pick):
    model, data = build("llama").bfloat16(), batches("llama", 1)
    selection, before = pick(model), sl.snapshot(model)
    with sl.masked(model, selection, head=()) as training:
        assert {p.dtype for p in training.parameters()} == {torch.float32}
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-4, weight_decay=0)
        for _ in range(40):
            optimizer.zero_grad()
            model(**data[0]).loss.backward()
            optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_untouched(before, model, selection)
    # A step of 1e-4 alone is lost in a bfloat16 weight of size one; forty of them are not.
    assert changed(before, sl.snapshot(model), selection) > 0.5


def test_a_model_that_becomes_bfloat16_inside_keeps_training_in_float32(build, batches, pick):
    model, (batch,) = build("llama"), batches("llama", 1)
    with sl.masked(model, pick(model)) as training:
        model.bfloat16()
        assert {p.dtype for p in training.parameters()} == {torch.float32}
        optimizer = torch.optim.SGD(training.parameters(), lr=1e-3)
        model(**batch).loss.backward()
        optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class DenseMasked:
    """The naive form, made exact: masked gradients, and unselected weights put back each step."""

    def __init__(self, model, selection, make):
        self.model = model
        self.named = {n: p for n, p in model.named_parameters() if n in selection.indices}
        self.masks = {
            n: m.to(self.named[n].device) for n, m in selection.masks().items() if n in self.named
        }
        self.start = {n: p.detach().clone() for n, p in self.named.items()}
        self.optimizer = make(list(self.named.values()))

    def step(self, clip=None):
        for name, p in self.named.items():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * self.masks[name]
        if clip is not None:
            nn.utils.clip_grad_norm_(self.named.values(), clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(torch.where(self.masks[name], p, self.start[name]))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["toy", "llama", "gpt2"])
@pytest.mark.usefixtures("kernels")
def test_compact_training_is_dense_masked_training_step_for_step(
    build, batches, pick, device, kind, optimizer
):
    reference, model = (build(kind).to(device, torch.float64) for _ in range(2))
    data = batches(kind, 4, device=device)
    selection = pick(model, per_tensor=5)
    dense = DenseMasked(reference, selection, OPTIMIZERS[optimizer])
    with sl.masked(model, selection, head=()) as training:
        compact = OPTIMIZERS[optimizer](training.parameters())
        for step in range(12):
            batch = data[step % len(data)]
            reference.zero_grad()
            reference(**batch).loss.backward()
            dense.step(clip=0.5)
            model.zero_grad()
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            compact.step()
            for name, vector in zip(selection.indices, training.parameters(), strict=True):
                expected = dense.named[name].reshape(-1)[selection.indices[name]]
                torch.testing.assert_close(vector, expected, rtol=0, atol=1e-10)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_identical_float32_gradients_give_identical_weights(device, optimizer):
    # 1,000 and 37 entries: the vectorised part of an optimizer's kernel and the part behind it.
    model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 20)).to(device)
    selection = sl.select(sl.random_scores(model, 0), 1037)
    dense = DenseMasked(copy.deepcopy(model), selection, OPTIMIZERS[optimizer])
    with sl.masked(model, selection, head=()) as training:
        compact = OPTIMIZERS[optimizer](training.parameters())
        for _ in range(30):
            for name, vector in zip(selection.indices, training.parameters(), strict=True):
                gradient = torch.randn_like(dense.named[name])
                dense.named[name].grad = gradient
                vector.grad = gradient.reshape(-1)[selection.indices[name]]
            dense.step()
            compact.step()
    for (name, a), b in zip(model.named_parameters(), dense.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["toy", "bert", "bert_tied", "llama", "gpt2"])
@pytest.mark.usefixtures("kernels")
def test_the_forward_and_every_gradient_are_the_dense_ones(build, batches, pick, device, kind):
    model = build(kind).to(device, torch.float64)
    (batch,) = batches(kind, 1, device=device)
    selection = pick(model, per_tensor=9)
    head = tuple(sl.head_weights(model))
    expected = model(**batch)
    expected.loss.backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }
    with sl.masked(model, selection, dense=head) as training:
        found = model(**batch)
        assert torch.equal(found.logits, expected.logits)
        found.loss.backward()
        for (name, index), vector in zip(
            selection.indices.items(), training.parameters(), strict=True
        ):
            wanted = gradients[name].reshape(-1)[index]
            if len(index) == gradients[name].numel():
                wanted = gradients[name]  # a tensor that is selected whole trains as it is
            got = torch.zeros_like(vector) if vector.grad is None else vector.grad
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, msg=name)
        for name in head:
            torch.testing.assert_close(
                model.get_parameter(name).grad, gradients[name], rtol=1e-9, atol=1e-12
            )


class Created(TorchDispatchMode):
    """Counts the entries of every tensor that an operation creates; views of parameters are not."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                if tensor.layout != torch.strided:
                    tensor = tensor.values()
                if tensor.untyped_storage().data_ptr() not in self.known:
                    self.sizes.add(tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [
        ("toy", {"embedding.weight": 66, "first.weight": 42, "second.weight": 35}),
        (
            "gpt2",
            {
                "transformer.wte.weight": 636,
                "transformer.wpe.weight": 192,
                "transformer.h.0.attn.c_attn.weight": 432,
                "transformer.h.0.attn.c_proj.weight": 144,
                "transformer.h.1.mlp.c_fc.weight": 576,
                "transformer.h.1.mlp.c_proj.weight": 576,
            },
        ),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_no_dense_gradient_of_a_selected_matrix_exists_at_any_moment(
    build, batches, pick, kind, matrices
):
    model = build(kind).train()
    (batch,) = batches(
        kind, 1, size=8
    )  # of 8 * 4 tokens: no activation has as many entries as one of these matrices
    batch = {key: value[:, :4] if value.dim() > 1 else value for key, value in batch.items()}
    sizes = {name: model.get_parameter(name).numel() for name in matrices}
    assert sizes == matrices
    loss = model(**batch).loss
    with Created(model) as naive:
        loss.backward()
    assert set(matrices.values()) <= naive.sizes  # what the naive form creates is seen
    with sl.masked(model, pick(model), dense=tuple(sl.head_weights(model))) as training:
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
        for _ in range(2):
            loss = model(**batch).loss
            with Created(model) as seen:
                loss.backward()
                optimizer.step()
            assert seen.sizes & set(matrices.values()) == set()
            assert len(seen.sizes) > 3


@pytest.mark.parametrize("kind", ["toy", *TRANSFORMERS])
def test_leaving_gives_back_an_ordinary_model_with_the_trained_values(build, batches, pick, kind):
    model = build(kind)
    model.get_parameter(next(iter(sl.weights(model)))).requires_grad_(False)
    classes = [type(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys, objects = list(model.state_dict()), list(model.parameters())
    selection = pick(model)
    with sl.masked(model, selection, head=()) as training:
        optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
        model(**batches(kind, 1)[0]).loss.backward()
        optimizer.step()  # and no forward after it: leaving must write the last values
        trained = {
            name: p.detach().clone()
            for name, p in zip(selection.indices, training.parameters(), strict=True)
        }
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    for name, index in selection.indices.items():
        assert torch.equal(model.get_parameter(name).reshape(-1)[index], trained[name].reshape(-1))


def test_what_requires_a_gradient_inside_is_what_is_trained(build, pick):
    model = build("toy")
    model.first.weight.grad = torch.ones_like(model.first.weight)
    selection = pick(model)
    with sl.masked(model, selection, dense=("classifier",)) as training:
        inside = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in inside} == {
            id(p) for p in (*training.parameters(), *training.dense_parameters())
        }
        assert sum(p.numel() for p in training.parameters()) == selection.count
        assert {id(p) for p in training.dense_parameters()} == {
            id(p) for p in model.classifier.parameters()
        }
        assert all(p.grad is None for p in model.parameters())
        assert not any("_index" in key for key in model.state_dict())


def test_an_error_inside_still_gives_the_model_back(build, pick):
    model = build("toy")
    keys = list(model.state_dict())

    def fails():
        with sl.masked(model, pick(model), head=()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_a_training_lives_as_long_as_its_model_and_a_copy_has_none(build, pick):
    model = build("toy")
    sl.masked(model, pick(model))  # nobody holds it
    training, gone = training_of(model), weakref.ref(model)
    assert not training.closed
    assert (
        training_of(copy.deepcopy(model)) is training_of(pickle.loads(pickle.dumps(model))) is None
    )
    del model, training
    gc.collect()
    assert gone() is None


def test_close_twice_does_nothing(build, pick):
    model = build("toy")
    training = sl.masked(model, pick(model), head=())
    training.close()
    with torch.no_grad():
        model.first.weight.fill_(5.0)
    training.close()
    assert torch.equal(model.first.weight, torch.full((7, 6), 5.0))


def test_a_deep_copy_made_inside_trains_by_itself(build, batches, pick):
    model, (batch,) = build("llama"), batches("llama", 1)
    with sl.masked(model, pick(model), head=()) as training:
        twin = copy.deepcopy(model)
        compact = [p for p in twin.parameters() if p.requires_grad]
        assert len(compact) == len(training.parameters())
        optimizer = torch.optim.SGD(compact, lr=0.5)
        first = twin(**batch).loss
        assert torch.equal(first, model(**batch).loss)
        first.backward()
        optimizer.step()
        assert all(p.grad is None for p in training.parameters())
        assert twin(**batch).loss < first
        assert torch.equal(first, model(**batch).loss)
        assert twin.lm_head.weight_entries is twin.model.embed_tokens.weight_entries


def test_a_state_assigned_inside_keeps_the_trained_values(build, batches, pick):
    model, (batch,) = build("bert"), batches("bert", 1)
    selection = pick(model)
    with sl.masked(model, selection, head=()) as training:
        optimizer = torch.optim.SGD(training.parameters(), lr=0.5)
        model(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            expected = model(**batch).logits
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for p in training.parameters():
                p.zero_()
            assert not torch.equal(model(**batch).logits, expected)
            model.load_state_dict(state, assign=True)
            assert torch.equal(model(**batch).logits, expected)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == selection.count
    assert torch.equal(model(**batch).logits, expected)


def test_the_padding_row_gets_no_gradient():
    table = nn.Embedding(4, 3, padding_idx=1)
    ids = torch.tensor([[1, 2, 2], [1, 1, 0]])
    selection = sl.Selection({"weight": torch.tensor([0, 3, 4, 7, 8, 10])}, {"weight": (4, 3)})
    with sl.masked(table, selection, head=()) as training:
        (table(ids) * torch.arange(1.0, 4.0)).sum().backward()
    # Row 0 is used once, row 1 is padding, row 2 is used twice, row 3 never; column j weighs j + 1.
    assert training.parameters()[0].grad.tolist() == [1, 0, 0, 4, 6, 0]


@pytest.mark.parametrize(
    ("module", "input"),
    [
        (nn.Linear(3, 3), torch.ones(1, 3)),
        (nn.Embedding(3, 3), torch.tensor([1])),
        (nn.LayerNorm(3), torch.randn(1, 3)),
    ],
    ids=["linear", "embedding", "vector"],
)
def test_a_step_between_forward_and_backward_is_noticed(module, input):
    with sl.masked(module, selection_of(module, weight=[0, 2]), head=()) as training:
        out = module(input).sum()
        with torch.no_grad():
            training.parameters()[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_a_module_may_be_called_twice_before_the_backward(build, batches, pick):
    model, (one, other) = build("bert_tied"), batches("bert_tied", 2)
    (model(**one).loss + model(**other).loss).backward()
    selection = pick(model)
    expected = {
        name: model.get_parameter(name).grad.reshape(-1)[i] for name, i in selection.indices.items()
    }
    with sl.masked(model, selection, head=()) as training:
        (model(**one).loss + model(**other).loss).backward()
        for (name, gradient), vector in zip(expected.items(), training.parameters(), strict=True):
            torch.testing.assert_close(
                vector.grad.reshape(-1), gradient, rtol=1e-4, atol=1e-7, msg=name
            )


def entries(left, right, index, rows, columns):
    """A sampled product with a footprint, or with none."""
    sides = columns_as_rows(left, rows), columns_as_rows(right, columns)
    return sampled_product(*sides, index, left.shape[1], right.shape[1], rows, columns)


@given(st.integers(2, 6), st.integers(2, 6), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_block_is_found_where_and_only_where_all_of_some_rows_or_columns_are_selected(
    height, width, by_rows, data
):
    some = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, (height if by_rows else width) - 1), min_size=1)))
    )
    rows, columns = (some, torch.arange(width)) if by_rows else (torch.arange(height), some)
    index = (rows[:, None] * width + columns).flatten()
    found = footprint(index, height, width)
    assert [part.tolist() for part in found] == [rows.tolist(), columns.tolist()]
    left, right = torch.randn(5, height), torch.randn(5, width)
    expected = (left.t() @ right).flatten()[index]
    torch.testing.assert_close(entries(left, right, index, *found), expected)
    gone = data.draw(st.integers(0, len(index) - 1))
    rest = torch.cat([index[:gone], index[gone + 1 :]])
    if len(rest):
        found = entries(left, right, rest, *footprint(rest, height, width))
        torch.testing.assert_close(found, (left.t() @ right).flatten()[rest])


def test_few_rows_and_columns_are_gathered_and_many_are_not():
    rows, columns = footprint(torch.tensor([0, 5, 205, 299]), 10, 100)
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [0, 5, 99])
    rows, columns = footprint(torch.tensor([0, 105, 205, 305]), 10, 100)
    assert (rows, columns.tolist()) == (None, [0, 5])


@pytest.mark.parametrize("kind", ["toy", "gpt2"])
def test_neurons_train_through_dense_slices_as_single_weights_do(build, batches, kind, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)  # sparse products would be torch's
    name = {"toy": "first.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}[kind]
    model, (batch,) = build(kind), batches(kind, 1)
    height, width = model.get_parameter(name).shape
    neurons = torch.tensor([0, 2, 3])  # of a Conv1D they are columns
    grid = torch.arange(height * width).view(height, width)
    index = (grid[neurons] if kind == "toy" else grid[:, neurons]).flatten()
    model(**batch).loss.backward()
    expected = model.get_parameter(name).grad.flatten()[index]
    with sl.masked(
        model,
        selection_of(model, **{name.replace(".", "_"): index.tolist()}),
        head=(),
    ) as training:
        sparse = Counted("sparse_sampled_addmm")
        with sparse:
            model(**batch).loss.backward()
        torch.testing.assert_close(training.parameters()[0].grad, expected, rtol=1e-4, atol=1e-7)
        assert sparse.calls == 0
        moved = copy.deepcopy(model).double()  # rows and columns move and copy with the module
        moved.zero_grad()
        moved(**batch).loss.backward()
        (values,) = (p for p in moved.parameters() if p.requires_grad)
        assert values.grad is not None


class Counted(TorchDispatchMode):
    """Counts the calls of one operation."""

    def __init__(self, name):
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += self.name in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 300])
def test_columns_become_contiguous_rows(tokens):
    operand = torch.randn(tokens, 5)
    few = torch.tensor([0, 2])
    for found, expected in (
        (by_feature(operand), operand.t()),
        (columns_as_rows(operand, few), operand[:, few].t()),
    ):
        assert found.is_contiguous()
        assert torch.equal(found, expected)
    assert columns_as_rows(operand, None) is operand


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 6),
    st.sampled_from(["float64", "bfloat16", "float32"]),
    st.sampled_from([torch.int32, torch.int64]),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_a_sampled_product_has_the_entries_of_the_product(rows, columns, inner, dtype, kind, data):
    generator = torch.Generator().manual_seed(rows * 100 + columns * 10 + inner)
    left, right = (
        torch.randn(inner, size, generator=generator, dtype=torch.float64).to(getattr(torch, dtype))
        for size in (rows, columns)
    )
    index = sorted(data.draw(st.sets(st.integers(0, rows * columns - 1), min_size=1)))
    index = torch.tensor(index, dtype=kind)
    expected = (left.double().t() @ right.double()).reshape(-1)[index]
    for parts in ((None, None), footprint(index, rows, columns)):
        found = entries(left, right, index, *parts)
        assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def selection_of(model, **indices):
    names = {n.replace(".", "_"): n for n, _ in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return sl.Selection({names[n]: torch.tensor(i) for n, i in indices.items()}, shapes)


def _unknown():
    model = nn.Linear(3, 3)
    return model, sl.Selection({"wieght": torch.tensor([0])}, {"wieght": (3, 3)})


def _second_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    return model, sl.Selection({"b.weight": torch.tensor([0])}, {"b.weight": (3, 3)})


def _shape():
    return nn.Linear(3, 3), sl.Selection({"weight": torch.tensor([0])}, {"weight": (9,)})


def _embedding(**options):
    def make():
        model = nn.Embedding(5, 3, **options)
        return model, selection_of(model, weight=[0, 4])

    return make


class Stack(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3))
        self.extra = nn.Parameter(torch.ones(2))


def _two_containers():
    model = nn.Sequential(Stack(), Stack())
    return model, selection_of(model, **{"0_extra": [1], "1_extra": [0]})


def _without_values():
    model = nn.Linear(3, 4, device="meta")
    return model, selection_of(model, weight=[0, 4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_unknown, "selection holds 'wieght', which is not a parameter"),
        (_second_name, "selection holds 'b.weight', which is not a parameter"),
        (_shape, r"'weight'.* is for shape \(9,\), the model has \(3, 3\)"),
        (_embedding(max_norm=1.0), "max_norm"),
        (_two_containers, "2 tensor.*'0.extra' belongs to a Stack.*'1.extra'.*exclude="),
        (_without_values, "'weight'.* is on the meta device, which holds no values"),
    ],
)
def test_what_cannot_be_masked_raises_and_the_model_is_as_it_was(make, message):
    model, selection = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sl.masked(model, selection, head=())
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (("clasifier",), "dense='clasifier' names no parameter"),
        (("first",), "dense and selection both name 'first.weight'"),
    ],
)
def test_a_bad_dense_name_raises(build, pick, dense, message):
    model = build("toy")
    with pytest.raises(ValueError, match=message):
        sl.masked(model, pick(model), dense=dense)
    assert all(p.requires_grad for p in model.parameters())


def test_masking_twice_raises_and_the_first_goes_on(build, pick):
    model = build("toy")
    one = selection_of(model, first_weight=[0])
    other = selection_of(model, second_weight=[0])
    with sl.masked(model, one, head=()) as training:
        for again in (one, other):
            with pytest.raises(ValueError, match="already in masked training"):
                sl.masked(model, again, head=())
        (trained,) = (p for p in model.parameters() if p.requires_grad)
        assert trained is training.parameters()[0]


def test_a_class_that_is_called_masked_is_an_ordinary_one():
    class MaskedNorm(nn.LayerNorm):
        pass

    model = nn.Sequential(MaskedNorm(4), nn.Linear(4, 2))
    with sl.masked(
        model,
        selection_of(model, **{"0_bias": [1], "1_weight": [0], "1_bias": [1]}),
        head=(),
    ) as training:
        model(torch.randn(3, 4)).sum().backward()
        assert all(p.grad.all() for p in training.parameters())
    assert [type(module) for module in model] == [MaskedNorm, nn.Linear]


def test_a_matrix_of_any_module_may_be_selected_whole():
    model = nn.Conv2d(1, 2, 3)
    with sl.masked(model, selection_of(model, weight=list(range(18))), head=()) as training:
        assert training.parameters()[0] is model.weight
        assert not model.bias.requires_grad


@pytest.mark.usefixtures("meta_default")
def test_masked_training_makes_its_tensors_beside_the_weights():
    model = nn.Sequential(
        nn.Embedding(5, 4, device="cpu"),
        nn.Linear(4, 3, device="cpu"),
        nn.LayerNorm(3, device="cpu"),
    )
    selection = sl.select(sl.random_scores(model, 0), 12)
    ids = torch.tensor([[0, 3], [1, 3]], device="cpu")
    with sl.masked(model, selection, head=()) as training:
        model(ids).square().sum().backward()
        assert {p.grad.device.type for p in training.parameters()} == {"cpu"}
        assert math.isfinite(sum(float(p.grad.sum()) for p in training.parameters()))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Own(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T.tanh() + self.bias


class Reader(nn.Module):
    """A weight that another module reads: its own forward is never called."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids):
        return nn.functional.linear(self.table(ids).tanh(), self.out.weight, self.out.bias)


class Tied(Reader):
    """One weight, used by its layer and by a function."""

    def __init__(self):
        super().__init__()
        self.out.weight = self.table.weight


def _transposed():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).t())
    return layer


def _replaced_forward():
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward
    return layer


TOKENS, IMAGE, IDS = torch.randn(2, 5, 4), torch.randn(2, 3, 6, 6), torch.tensor([[0, 3], [3, 1]])
ANY = {
    "linear": (lambda: nn.Linear(4, 4), TOKENS),
    "linear that calls its base": (lambda: Scaled(4, 4), TOKENS),
    "linear with a forward of its own": (lambda: Own(4, 4), TOKENS),
    "not contiguous": (_transposed, TOKENS),
    "replaced forward": (_replaced_forward, TOKENS),
    "in place behind a layer": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        TOKENS,
    ),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), IMAGE),
    "channels last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        IMAGE,
    ),
    "norm of two dimensions": (lambda: nn.LayerNorm((5, 4)), TOKENS),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), TOKENS),
    "lstm": (lambda: Output(nn.LSTM(4, 3, 2, bidirectional=True)), TOKENS),
    "gru": (lambda: Output(nn.GRU(4, 3, batch_first=True)), TOKENS),
    "bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), TOKENS),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=3), IDS),
    "sparse embedding": (lambda: nn.Embedding(7, 4, sparse=True), IDS),
    "embedding that counts": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), IDS),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), IDS),
    "read by its parent": (Reader, IDS),
    "tied, and read by its parent": (Tied, IDS),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        TOKENS,
    ),
    "parameters in a list": (lambda: Lists(), TOKENS),
}


class Output(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Twice(Output):
    def forward(self, x):
        return self.inner(x, x)


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.dict = nn.ParameterDict({"a": torch.randn(4, 4)})

    def forward(self, x):
        return x @ self.list[0] * self.list[1] @ self.dict["a"]


def copied_by(module, model):
    return pickle.loads(pickle.dumps(model)) if module is pickle else copy.deepcopy(model)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("kind", ANY)
def test_any_floating_tensor_is_selected_in_part(kind, sampled):
    make, x = ANY[kind]
    torch.manual_seed(0)
    model, x = make().double(), x.double() if x.is_floating_point() else x
    reference = copy.deepcopy(model)
    named = dict(reference.named_parameters())
    reference(x).square().sum().backward()
    selection = sl.Selection(
        {n: torch.arange(p.numel())[::3] for n, p in named.items() if p.numel() > 1},
        {n: tuple(p.shape) for n, p in named.items()},
    )
    keys = list(model.state_dict())
    with sl.masked(model, selection, head=(), sampled=sampled) as training:
        optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
        model(x).square().sum().backward()
        for (name, index), vector in zip(
            selection.indices.items(), training.parameters(), strict=True
        ):
            dense = named[name].grad
            dense = dense.to_dense() if dense.is_sparse else dense
            torch.testing.assert_close(vector.grad, dense.reshape(-1)[index], msg=name)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            inside, copied = model(x), copy.deepcopy(model)(x)
        assert list(model.state_dict()) == keys
        # torch refuses to pickle what it has parametrized
        pickled = copied_by(pickle if kind != "parametrized" else copy, model)
    with torch.no_grad():
        torch.testing.assert_close(inside, model(x))
        torch.testing.assert_close(copied, inside)
        torch.testing.assert_close(pickled(x), inside)
    masks = selection.masks()
    for name, p in model.named_parameters():
        changed = p.detach() != named[name]
        assert not changed[~masks[name]].any()
        assert changed.any() or not named[name].grad.any()


def test_what_cannot_be_selected_in_part_says_why():
    assert why_refused(nn.Linear(3, 4), "weight") is None
    assert why_refused(Stack(), "extra").startswith("belongs to a Stack itself")
    assert "max_norm" in why_refused(nn.Embedding(3, 4, max_norm=1.0), "weight")
    taken = nn.Linear(3, 4)
    taken.weight_entries = nn.Identity()
    assert "'weight_entries' of its own" in why_refused(taken, "weight")


def test_second_derivatives_are_refused_or_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    reference, x = copy.deepcopy(model), torch.randn(8, 4).double()

    def penalty(m):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(m(z).sum(), z, create_graph=True)
        return (g.norm(dim=1) - 1).square().mean()

    penalty(reference).backward()
    selection = selection_of(model, **{"0_weight": [0, 5, 9], "2_weight": [1, 4]})
    with (
        sl.masked(model, selection, head=()),
        pytest.raises(RuntimeError, match="second derivatives.*sampled=False"),
    ):
        penalty(model)
    with sl.masked(model, selection, head=(), sampled=False) as training:
        penalty(model).backward()
        for (name, index), vector in zip(
            selection.indices.items(), training.parameters(), strict=True
        ):
            dense = reference.get_parameter(name).grad.reshape(-1)
            torch.testing.assert_close(vector.grad, dense[index])


def half(count):
    return torch.arange(count) % 2 == 0


@pytest.mark.parametrize("kind", ["toy", "bert", "llama", "gpt2"])
def test_shrinking_leaves_dropped_weights_where_they_are_and_survivors_their_moments(
    build, batches, pick, kind
):
    model, data = build(kind), batches(kind, 4)
    selection = pick(model, per_tensor=6)
    training = sl.masked(model, selection, shrinks=True, head=())
    optimizer = torch.optim.AdamW(training.parameters(), lr=0.01, weight_decay=0.1)

    def step(batch):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    step(data[0])
    step(data[1])
    keep = {name: half(len(index)) for name, index in selection.indices.items()}
    vectors = dict(zip(selection.indices, training.parameters(), strict=True))
    at_drop = {name: p.detach().clone() for name, p in vectors.items()}
    moments = {
        name: optimizer.state[p]["exp_avg"].clone()
        for name, p in vectors.items()
        if p in optimizer.state
    }
    training.shrink(keep, optimizer)
    assert all(
        torch.equal(optimizer.state[vectors[name]]["exp_avg"], m[keep[name]])
        for name, m in moments.items()
    )
    assert all(torch.equal(vectors[name], at_drop[name][kept]) for name, kept in keep.items())
    step(data[2])
    step(data[3])
    training.close()
    moved = 0
    for name, index in selection.indices.items():
        values = model.get_parameter(name).detach().view(-1)[index]
        assert torch.equal(values[~keep[name]], at_drop[name][~keep[name]]), name
        moved += int((values[keep[name]] != at_drop[name][keep[name]]).sum())
    assert moved > 0


def test_shrinking_equals_a_dense_loop_whose_mask_shrinks(build, batches, pick):
    model, reference, data = build("toy").double(), build("toy").double(), batches("toy", 4)
    selection = pick(model, per_tensor=6)
    masks = selection.masks()
    training = sl.masked(model, selection, shrinks=True, head=())
    optimizer = torch.optim.Adam(training.parameters(), lr=0.01)
    dense = torch.optim.Adam(
        [p for name, p in reference.named_parameters() if name in masks], lr=0.01
    )
    for number, batch in enumerate(data):
        if number == 2:
            training.shrink(
                {name: half(len(index)) for name, index in selection.indices.items()}, optimizer
            )
            for name, index in selection.indices.items():
                masks[name].view(-1)[index[~half(len(index))]] = False
                state = dense.state[reference.get_parameter(name)]
                state["exp_avg"] *= masks[
                    name
                ]  # or the momentum of dropped weights would move them on
        for net, opt in ((model, optimizer), (reference, dense)):
            opt.zero_grad()
            net(**batch).loss.backward()
            if net is reference:
                for name, p in reference.named_parameters():
                    if name in masks:
                        p.grad *= masks[name]
            opt.step()
    training.close()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, reference.get_parameter(name), rtol=1e-10, atol=1e-12)


def test_shrinking_after_a_step_of_fit(build, batches, pick):
    # `fit` still holds the loss of the step: autograd has not yet forgotten how long the vectors
    # were.
    model, data = build("toy"), batches("toy", 4)
    selection = pick(model, per_tensor=6)
    keep = {name: half(len(index)) for name, index in selection.indices.items()}
    at_drop, steps = [], []
    with sl.masked(model, selection, shrinks=True, head=()) as training:

        def after_step(step):
            steps.append(step.progress)
            if len(steps) == 2:
                at_drop.extend(p.detach().clone() for p in training.parameters())
                training.shrink(keep, step.optimizer)

        groups = [{"params": training.parameters(), "lr": 0.01, "schedule": sl.constant}]
        sl.fit(model, [sl.Phase("shrinks", groups, 1, after_step=after_step)], data)
    assert len(steps) == 4
    for (name, index), values in zip(selection.indices.items(), at_drop, strict=True):
        moved = model.get_parameter(name).detach().view(-1)[index] != values
        assert not moved[~keep[name]].any(), name
        assert moved[keep[name]].any() or name == "embedding.weight", name  # not every word occurs


@pytest.mark.parametrize(
    ("keep", "shrinks", "message"),
    [
        (
            {"norm.bias": torch.ones(7, dtype=torch.bool)},
            False,
            "no compact parameter; give masked",
        ),
        ({"nothing": torch.ones(7, dtype=torch.bool)}, True, "keep names 'nothing'"),
        (
            {"norm.bias": torch.ones(6, dtype=torch.bool)},
            True,
            r"of shape \(6,\), not bool of \(7,\)",
        ),
        ({"norm.bias": torch.ones(7)}, True, "is torch.float32"),
    ],
)
def test_a_bad_shrink_raises_and_changes_nothing(build, keep, shrinks, message):
    model = build("toy")
    whole = sl.select_tensors(model, lambda name, p: name.startswith("norm"))
    training = sl.masked(model, whole, shrinks=shrinks, head=())
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        training.shrink({"norm.weight": half(7), **keep}, optimizer)
    assert [len(p) for p in training.parameters()] == [7, 7]
    training.close()
