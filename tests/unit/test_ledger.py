"""The ledger: bytes by kind, against sums by hand; predictions against what is then measured."""

from functools import partial

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.lab import memory
from selective_lite.methods.diff_pruning import Relaxed


def test_masked_adamw_holds_twelve_bytes_and_little_more_for_a_selected_weight(
    build, batches, pick
):
    model = build("bert")
    weights = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    selection = sl.select(sl.random_scores(model, 0), 0.5)
    partly = sum(
        len(i) for n, i in selection.indices.items() if len(i) < model.get_parameter(n).numel()
    )
    vectors = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() == 1 and 0 < len(selection.indices.get(n, ())) < p.numel()
    )
    with sl.masked(model, selection, head=()) as training:
        optimizer = torch.optim.AdamW(training.parameters())
        model(**batches("bert", 1)[0]).loss.backward()
        optimizer.step()
        found = sl.ledger(model, optimizer)
        tensors = len(training.parameters())
    assert found == {
        "weights": 4 * weights + buffers + 4 * partly,
        "gradients": 4 * selection.count,
        "optimizer": 8 * selection.count + 4 * tensors,
        "index": 4 * partly,
        "passing": 4 * vectors,  # the dense gradients that entries are gathered from
    }
    assert (found["gradients"] + found["optimizer"]) / selection.count <= 13


def test_dense_adamw_holds_twelve_bytes_for_every_weight():
    model = nn.Linear(50, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    assert sl.ledger(model, optimizer) == {
        "weights": 8160,
        "gradients": 8160,
        "optimizer": 16328,
        "index": 0,
        "passing": 0,
    }


def test_tied_weights_count_once_and_nothing_is_counted_before_a_step(build):
    model = build("llama")
    total = sum(p.numel() for p in model.parameters())
    buffers = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    found = sl.ledger(model, torch.optim.AdamW(model.parameters()))
    assert found == {
        "weights": 4 * total + sum(buffers.values()),
        "gradients": 0,
        "optimizer": 0,
        "index": 0,
        "passing": 0,
    }
    assert sl.ledger(model)["optimizer"] == 0


WAYS = ("full", "masked", "LoRA", "Adapter", "gated", "gated by layer")
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
}


def selected(model):
    """A third of the linear weights and of all vectors.

    But of one matrix all, and of another two rows.
    """
    linear = sl.linear_weights(model)
    scores = {
        name: s for name, s in sl.random_scores(model, 0).items() if name in linear or s.dim() == 1
    }
    selection = sl.select(scores, 0.3)
    whole, rows = (model.get_parameter(name) for name in linear[:2])
    blocks = {linear[0]: torch.arange(whole.numel()), linear[1]: torch.arange(rows[:2].numel())}
    return sl.Selection({**selection.indices, **blocks}, selection.shapes)


def set_up(model, way, optimizer):
    """What is predicted for a way of training, and what is then trained.

    The latter is a module to call, set up in the model.
    """
    head = tuple(sl.head_weights(model))
    if way == "full":
        return sl.predicted_ledger(model, optimizer=optimizer), model
    if way == "masked":
        selection = selected(model)
        predicted = sl.predicted_ledger(model, selection, head, optimizer=optimizer)
        sl.masked(model, selection, head, head=())
        return predicted, model
    if way in ("LoRA", "Adapter"):
        names, kind = sl.linear_weights(model), way.lower()
        beside = memory.small_modules(model, names, kind=kind, rank=2)
        predicted = sl.predicted_ledger(model, dense=head, beside=beside, optimizer=optimizer)
        model.requires_grad_(False)
        sl.add_adapters(model, names, kind=kind, rank=2)
        for name in head:
            model.get_parameter(name).requires_grad_(True)
        return predicted, model
    groups = "layer" if way == "gated by layer" else None
    beside = memory.gates(model, groups)
    predicted = sl.predicted_ledger(model, dense=head, beside=beside, optimizer=optimizer)
    relaxed = Relaxed(model, groups=groups)
    for p in sl.weights(model).values():
        p.requires_grad_(False)
    return predicted, relaxed


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_prediction_is_right_to_the_byte(build, batches, kind, way, name):
    predicted, trained = set_up(build(kind), way, OPTIMIZERS[name])
    optimizer = OPTIMIZERS[name]([p for p in trained.parameters() if p.requires_grad])
    trained(**batches(kind, 1)[0]).loss.backward()
    optimizer.step()
    assert predicted == sl.ledger(trained, optimizer)


def test_compact_vectors_of_half_precision_weights_are_predicted_in_float32(build, batches):
    model = build("bert").bfloat16()
    predicted, _ = set_up(model, "masked", torch.optim.AdamW)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batches("bert", 1)[0]).loss.backward()
    optimizer.step()
    assert predicted == sl.ledger(model, optimizer)


def test_a_model_without_memory_has_the_same_prediction(build):
    with torch.device("meta"):
        model = build("llama")
    assert sl.predicted_ledger(model) == sl.predicted_ledger(build("llama"))


@pytest.mark.parametrize(
    ("selection", "dense", "message"),
    [
        (sl.Selection({"absent": torch.tensor([0])}, {"absent": (3,)}), (), "absent"),
        (
            sl.Selection({"second.weight": torch.tensor([0])}, {"second.weight": (5, 6)}),
            (),
            r"\(5, 6\), the model has \(5, 7\)",
        ),
        (
            sl.Selection({"second.weight": torch.tensor([0])}, {"second.weight": (5, 7)}),
            ("second",),
            "dense and selection both name",
        ),
        (None, ("absent",), "dense='absent'"),
    ],
)
def test_what_masked_would_refuse_is_not_predicted(build, selection, dense, message):
    with pytest.raises(ValueError, match=message):
        sl.predicted_ledger(build("toy"), selection, dense)


def test_a_model_in_masked_training_is_not_predicted_for(build, pick):
    model = build("toy")
    with (
        sl.masked(model, pick(model), head=()),
        pytest.raises(ValueError, match="in masked training"),
    ):
        sl.predicted_ledger(model)


def test_activations_are_each_storage_that_backward_needs_once():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = (torch.ones(5, 4), "not a tensor")
    # tanh's output, which the second layer needs too (5 x 6), and what is squared (5 x 3); not
    # weights, not the batch
    assert sl.activation_bytes(
        model, batch, lambda model, batch: model(batch[0]).square().sum()
    ) == 4 * (30 + 15)


def test_activations_are_those_of_training_and_the_model_is_as_before(build, batches):
    model, (batch,) = build("toy"), batches("toy", 1)
    with torch.no_grad():
        found = sl.activation_bytes(model, batch)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    model.dropout.p = 0.0  # torch then makes no mask
    assert found > sl.activation_bytes(model, batch)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit"])
def test_selecting_in_matrices_keeps_what_training_these_whole_keeps_and_no_more_than_full_training(
    build, batches, kind
):
    model, (batch,) = build(kind), batches(kind, 1)
    full, names, head = (
        sl.activation_bytes(model, batch),
        sl.linear_weights(model),
        sl.head_weights(model),
    )
    scores = {name: score for name, score in sl.random_scores(model, 0).items() if name in names}
    with sl.masked(model, sl.select(scores, 0.3), tuple(head), head=()):
        found = sl.activation_bytes(model, batch)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names or name in head)
    assert found == sl.activation_bytes(model, batch) < full


def test_lora_keeps_its_rank_of_values_a_token_and_layer_beside_what_masked_training_keeps(
    build, batches
):
    model, (batch,) = build("llama"), batches("llama", 1)
    names = sl.linear_weights(model)
    most = {name: torch.arange(model.get_parameter(name).numel() - 1) for name in names}
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    with sl.masked(model, sl.Selection(most, shapes), head=()):
        masked = sl.activation_bytes(model, batch)
    model.requires_grad_(False)
    sl.add_adapters(model, names, rank=2)
    tokens = batch["input_ids"].numel()
    assert sl.activation_bytes(model, batch) - masked == 4 * 2 * tokens * len(names)


@pytest.mark.parametrize(
    ("positions", "features"), [([3, 13], 1), ([3, 17, 99], 3), (range(10), 10), ([0, 55, 99], 3)]
)
def test_of_a_layers_input_only_the_features_that_few_selected_weights_read_are_kept(
    positions, features
):
    model = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10, bias=False))
    selection = sl.Selection({"1.weight": torch.tensor([*positions])}, {"1.weight": (10, 10)})
    with sl.masked(model, selection, head=()):
        found = sl.activation_bytes(
            model, (torch.ones(5, 4),), lambda model, batch: model(batch[0]).square().sum()
        )
    assert found == 4 * (5 * features + 5 * 10)  # and what is squared
