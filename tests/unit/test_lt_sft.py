"""LT-SFT: dense, rewind, masked; exactly k weights and the head differ, an interrupt is rewound."""

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.lt_sft import lt_sft, most_moved

RATES = {"lr": 0.02, "epochs": (2, 1)}


def phase_by_phase(model, method, data, **options):
    """The model's parameters when each phase begins and after its steps."""
    found = []

    def phases():
        for phase in method:
            found.append({"phase": phase, "begins": sl.snapshot(model)})
            yield phase

    def on_step(record):
        found[-1]["after"] = sl.snapshot(model)

    records = sl.fit(model, phases(), data, on_step=on_step, **options)
    return records, found


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("kind", ["toy", "bert", "llama"])
def test_exactly_k_weights_and_the_head_differ_in_the_end(build, batches, kind, iterations):
    model, data = build(kind), batches(kind, 2)
    before, keys = sl.snapshot(model), list(model.state_dict())
    records, found = phase_by_phase(model, lt_sft(model, 25, iterations=iterations, **RATES), data)

    assert [r["phase"] for r in records] == (["dense"] * 4 + ["masked"] * 2) * iterations
    assert [f["phase"].selection.count for f in found[1::2]] == {1: [25], 3: [8, 16, 25]}[
        iterations
    ]
    last = found[-1]["phase"].selection.masks()
    for name, p in sl.weights(model).items():
        assert torch.equal(p != before[name], last[name]), name
    assert all((p != before[name]).any() for name, p in sl.head_weights(model).items())
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    if kind == "llama":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_ticket_is_what_the_dense_phase_moved_most(build, batches):
    model, data = build("bert"), batches("bert", 2)
    start = sl.snapshot(model)
    _, (dense, masked) = phase_by_phase(model, lt_sft(model, 0.05, **RATES), data)
    moved = {name: (dense["after"][name] - start[name]).abs() for name in sl.weights(model)}
    every = torch.cat([m.flatten() for m in moved.values()])
    selection = masked["phase"].selection
    chosen = torch.cat([moved[name].flatten()[index] for name, index in selection.indices.items()])
    assert len(chosen) == round(0.05 * len(every))
    assert torch.equal(chosen.sort().values, every.sort().values[-len(chosen) :])


def test_every_parameter_is_trained_and_then_rewound_bit_by_bit_and_the_head_too(build, batches):
    model, data = build("bert"), batches("bert", 2)
    with torch.no_grad():
        model.bert.pooler.dense.weight.view(-1)[:3] = torch.tensor([-0.0, 1e-42, 3e38])
        model.classifier.bias[0] = -0.0
    start = sl.snapshot(model)
    _, (dense, masked) = phase_by_phase(model, lt_sft(model, 25, weight_decay=0.1, **RATES), data)
    heads = set(sl.head_weights(model))
    for name, p in start.items():
        assert not torch.equal(dense["after"][name], p), name
        assert torch.equal(masked["begins"][name].view(torch.int32), p.view(torch.int32)), name
    assert {id(p) for p in masked["phase"].groups[1]["params"]} == {
        id(model.get_parameter(name)) for name in heads
    }


def test_a_later_iteration_goes_on_from_the_last_and_keeps_its_ticket(build, batches):
    model, data = build("bert"), batches("bert", 2)
    start = sl.snapshot(model)
    _, (_, one, dense, two) = phase_by_phase(model, lt_sft(model, 40, iterations=2, **RATES), data)
    first, second = one["phase"].selection, two["phase"].selection
    assert (first.count, second.count, first.overlap(second)) == (20, 40, 1.0)
    for name, p in dense["begins"].items():
        assert torch.equal(two["begins"][name], p), name
    moved = sum(int((dense["begins"][name] != start[name]).sum()) for name in sl.weights(model))
    assert moved == 20
    assert not torch.equal(dense["begins"]["classifier.weight"], start["classifier.weight"])


def test_each_phase_has_a_new_optimizer_its_epochs_and_rates(build, batches):
    model, made = build("toy"), []

    def optimizer(groups):
        made.append(torch.optim.SGD(groups, momentum=0.9))
        return made[-1]

    method = lt_sft(model, 9, lr=0.1, lr_head=0.2, epochs=(3, 2), weight_decay=0.3)
    _, found = phase_by_phase(model, method, batches("toy", 1), optimizer=optimizer)
    assert len(made) == 2
    assert [f["phase"].epochs for f in found] == [3, 2]
    for one in found:
        assert [(g["lr"], g["weight_decay"]) for g in one["phase"].groups] == [
            (0.1, 0.3),
            (0.2, 0.3),
        ]
        assert one["phase"].penalty is None


@pytest.mark.parametrize(
    ("options", "dense", "masked"),
    [
        ({}, [0.5, 0.5], [0.5, 0.5]),
        ({"lr_dense": 0.01}, [0.01, 0.01], [0.5, 0.5]),
        ({"lr_dense": 0.0}, [0.0, 0.0], [0.5, 0.5]),
        ({"lr_dense": 0.01, "lr_head": 0.2}, [0.01, 0.2], [0.5, 0.2]),
    ],
)
def test_the_dense_phase_may_have_its_own_rate(build, options, dense, masked):
    model = build("toy")
    method = lt_sft(model, 9, lr=0.5, epochs=(1, 1), **options)
    phases = iter(method)
    assert [group["lr"] for group in next(phases).groups] == dense
    with torch.no_grad():
        model.first.weight += 1.0
    assert [group["lr"] for group in next(phases).groups] == masked
    method.close()


def test_the_head_may_be_named(build, batches):
    model, data = build("toy"), batches("toy", 2)
    start, head = sl.snapshot(model), ("second", "classifier")
    _, (dense, masked) = phase_by_phase(model, lt_sft(model, 25, head=head, **RATES), data)
    for one in (dense, masked):
        named = {id(p) for p in (*model.second.parameters(), *model.classifier.parameters())}
        assert {id(p) for p in one["phase"].groups[1]["params"]} == named
    assert "second.weight" not in masked["phase"].selection.shapes
    assert not (model.second.weight == start["second.weight"]).any()


def test_what_is_excluded_moves_in_neither_phase(build, batches):
    model, data = build("bert"), batches("bert", 2)
    start = sl.snapshot(model)
    norms = [name for name in start if "LayerNorm" in name]
    method = lt_sft(model, 400, exclude=norms, l1=0.1, weight_decay=0.1, **RATES)
    _, (dense, masked) = phase_by_phase(model, method, data)
    for name in start:
        assert torch.equal(dense["after"][name], start[name]) == (name in norms), name
    assert not set(norms) & set(masked["phase"].selection.indices)
    assert set(norms) <= set(masked["phase"].selection.shapes)


def test_a_strong_l1_penalty_keeps_the_weights_near_the_pretrained_ones(build, batches):
    distances = []
    for l1 in (0.0, 3e3):
        model = build("toy")
        model.dropout.p = 0.0
        start = sl.snapshot(model)
        _, found = phase_by_phase(
            model, lt_sft(model, 25, lr=0.01, epochs=(5, 5), l1=l1), batches("toy", 2)
        )
        distances.append(
            [
                sum(float((f["after"][n] - start[n]).abs().sum()) for n in sl.weights(model))
                for f in found[:1]
            ]
            + [
                sum(
                    float((p - start[n]).detach().abs().sum()) for n, p in sl.weights(model).items()
                )
            ]
        )
    assert all(strong < 0.5 * free for free, strong in zip(*distances, strict=True))


def test_what_the_user_froze_moves_in_neither_phase(build, batches):
    model, data = build("bert"), batches("bert", 2)
    model.bert.embeddings.requires_grad_(False)
    start = sl.snapshot(model)
    _, (dense, masked) = phase_by_phase(model, lt_sft(model, 25, **RATES), data)
    for name in start:
        still = name.startswith("bert.embeddings")
        assert torch.equal(dense["after"][name], start[name]) == still, name
    assert not any(n.startswith("bert.embeddings") for n in masked["phase"].selection.shapes)


def test_the_rewind_restores_buffers_too(batches):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5))
    model.add_module("classifier", torch.nn.Linear(5, 2))
    start = sl.snapshot(model)
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)]

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    _, (dense, masked) = phase_by_phase(model, lt_sft(model, 5, **RATES), data, loss=loss)
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert not torch.equal(dense["after"][name], start[name])
        assert torch.equal(masked["begins"][name], start[name])


def test_an_encoder_decoder_trains_from_end_to_end():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=53,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=20,
    )
    model = BartForConditionalGeneration(config)
    before = sl.snapshot(model)
    ids = torch.randint(3, 53, (2, 7))
    _, found = phase_by_phase(
        model, lt_sft(model, 0.05, **RATES), [{"input_ids": ids, "labels": ids}]
    )
    selection = found[-1]["phase"].selection
    # subclasses of nn.Embedding
    assert any("embed_positions" in name for name in selection.indices)
    assert any("shared" in name for name in selection.indices)
    masks = selection.masks()
    for name, p in sl.weights(model).items():
        assert torch.equal(p[~masks[name]], before[name][~masks[name]]), name
        assert bool((p != before[name]).any()) == bool(masks[name].any()), name


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupt_restores_the_model_and_undoes_the_dense_phase(build, batches, step):
    model, data = build("toy"), batches("toy", 2)
    model.first.weight.requires_grad_(False)
    before, keys = sl.snapshot(model), list(model.state_dict())
    seen = []

    def on_step(record):
        seen.append(record)
        if len(seen) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sl.fit(model, lt_sft(model, 9, **RATES), data, on_step=on_step)
    assert caught.traceback
    assert seen[-1]["phase"] == {2: "dense", 5: "masked"}[step]
    moved = sum(int((p != before[name]).sum()) for name, p in sl.weights(model).items())
    assert moved == {2: 0, 5: 9}[step]
    assert list(model.state_dict()) == keys
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["first.weight"]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": True}, TypeError, "budget=True is a bool"),
        ({"budget": 10**6}, ValueError, "budget=1000000 is outside"),
        ({"iterations": 0}, ValueError, r"iterations=0 is outside \[1, 9\]"),
        ({"iterations": 10}, ValueError, r"iterations=10 is outside \[1, 9\]"),
        ({"iterations": 1.5}, TypeError, "iterations=1.5 must be an int"),
        ({"l1": -0.1}, ValueError, "l1=-0.1 must be 0 or more"),
        ({"epochs": 3}, ValueError, "epochs=3 must be two"),
        ({"epochs": (3,)}, ValueError, r"epochs=\(3,\) must be two"),
        ({"epochs": (1, 0)}, ValueError, "epochs=0 of phase 'masked' must be at least 1"),
        ({"epochs": (0, 1)}, ValueError, "epochs=0 of phase 'dense' must be at least 1"),
        ({"lr": -0.1}, ValueError, "lr=-0.1 of phase 'masked' must be finite"),
        ({"lr_dense": -0.1}, ValueError, "lr_dense=-0.1 of phase 'dense' must be finite"),
        ({"weight_decay": "no"}, TypeError, "weight_decay='no' of phase"),
        ({"exclude": ("frist",)}, ValueError, "exclude='frist' names no parameter"),
        (
            {"budget": 100, "exclude": ("embedding",)},
            ValueError,
            "asks for 100 weights, but only 98 are not excluded",
        ),
        ({"head": ("clasifier",)}, ValueError, "head='clasifier' names no parameter"),
    ],
)
def test_bad_input_raises_at_the_call(build, options, error, message):
    model = build("toy")
    options = {"budget": 9, "lr_dense": 0.1, **RATES, **options}
    with pytest.raises(error, match=message):
        lt_sft(model, options.pop("budget"), **options)
    assert all(p.requires_grad for p in model.parameters())


def test_options_at_their_bounds_are_allowed(build):
    lt_sft(build("toy"), 9, iterations=9, **RATES)
    lt_sft(build("toy"), 98, exclude=("embedding",), **RATES)  # all that is left


def test_what_cannot_be_selected_in_part_is_named_at_the_call_and_may_be_excluded(build, batches):
    model, data = build("toy"), batches("toy", 2)
    model.embedding.max_norm = 1.0
    with pytest.raises(ValueError, match=r"'embedding.weight' is an embedding with max_norm"):
        lt_sft(model, 9, **RATES)
    records = sl.fit(model, lt_sft(model, 9, exclude=("embedding",), **RATES), data)
    assert records[-1]["phase"] == "masked"


def test_fewer_moved_weights_than_k_raise_and_the_model_is_rewound(build, batches):
    model, data = build("toy"), batches("toy", 1)
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match="scores are non-zero; lower it"):
        # Words that no sample has do not move without decay.
        sl.fit(model, lt_sft(model, 164, **RATES), data)
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )


def test_the_ticket_is_extended_by_other_weights_only():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([[0.0, 3.0], [2.0, 6.0]])}
    one = most_moved(scores, 2)
    assert {name: index.tolist() for name, index in one.indices.items()} == {"a": [0], "b": [3]}
    two = most_moved(scores, 2, one)
    assert {name: index.tolist() for name, index in two.indices.items()} == {
        "a": [0, 2],
        "b": [1, 3],
    }
    with pytest.raises(ValueError, match="only 2 scores are non-zero"):
        most_moved(scores, 3, two)
