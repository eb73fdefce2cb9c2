"""The ledger: bytes by kind, against sums by hand."""

import torch
from torch import nn

import selective_lite as sl


def test_masked_adamw_holds_twelve_bytes_and_little_more_for_a_selected_weight(build, batches, pick):
    model = build("bert")
    weights = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    selection = sl.select(sl.uniform(model, 0), 0.5)  # many a tensor: a step count of 4 bytes a tensor weighs little
    partly = sum(len(i) for n, i in selection.indices.items() if len(i) < model.get_parameter(n).numel())
    with sl.masked(model, selection) as training:
        optimizer = torch.optim.AdamW(training.parameters())
        model(**batches("bert", 1)[0]).loss.backward()
        optimizer.step()
        found = sl.ledger(model, optimizer)
        tensors = len(training.parameters())
    assert found == {
        "weights": 4 * weights + buffers + 4 * partly,
        "gradients": 4 * selection.count,
        "optimizer": 8 * selection.count + 4 * tensors,
        "index": 8 * partly,
    }
    assert (found["gradients"] + found["optimizer"]) / selection.count <= 13


def test_dense_adamw_holds_twelve_bytes_for_every_weight():
    model = nn.Linear(50, 40)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    assert sl.ledger(model, optimizer) == {"weights": 8160, "gradients": 8160, "optimizer": 16328, "index": 0}


def test_tied_weights_count_once_and_nothing_is_counted_before_a_step(build):
    model = build("llama")
    total = sum(p.numel() for p in model.parameters())
    buffers = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    found = sl.ledger(model, torch.optim.AdamW(model.parameters()))
    assert found == {"weights": 4 * total + sum(buffers.values()), "gradients": 0, "optimizer": 0, "index": 0}
    assert sl.ledger(model)["optimizer"] == 0
