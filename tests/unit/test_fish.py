"""FISH: which samples and labels the score sees, the mask, and bad input that changes nothing."""

import pytest
import torch

import selective_lite as sl
from selective_lite.methods.fish import fish, fisher_information


def test_the_score_uses_the_first_samples_and_no_others(build, batches):
    model, data = build("toy"), batches("toy", 4)  # of 3 samples each
    four = [data[0], {key: value[:1] for key, value in data[1].items()}]
    for fisher, score in (
        ("empirical", sl.squared_gradient),
        ("expected", sl.expected_squared_gradient),
    ):
        found, expected = (
            fisher_information(model, data, samples=4, fisher=fisher),
            score(model, four),
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # 12 are fewer than 1,024
    every, all_of_them = fisher_information(model, data), sl.squared_gradient(model, data)
    assert all(torch.equal(every[name], all_of_them[name]) for name in every)

    def endless():
        yield from data
        raise AssertionError("a batch after the last sample was asked for")

    fisher_information(model, endless(), samples=12)


def test_the_three_fishers_are_the_three_scores(build, batches):
    model, data = build("bert"), batches("bert", 2)
    others = [{**batch, "labels": (batch["labels"] + 1) % 3} for batch in data]
    expected = {
        "empirical": sl.squared_gradient(model, data),
        "sampled": sl.squared_gradient(model, data, labels="model", seed=3),
        "expected": sl.expected_squared_gradient(model, data),
    }
    name = "bert.pooler.dense.weight"
    for fisher, score in expected.items():
        assert torch.equal(
            fisher_information(model, data, fisher=fisher, seed=3)[name], score[name]
        )
        ignores = torch.equal(
            fisher_information(model, others, fisher=fisher, seed=3)[name], score[name]
        )
        assert ignores == (fisher != "empirical")  # the model's own labels need no given ones
    assert not torch.allclose(
        expected["sampled"][name], expected["expected"][name], rtol=0.01, atol=0
    )


def test_the_loss_is_the_one_given(build, batches):
    model, data = build("toy"), batches("toy", 2)

    def doubled(model, batch):
        return 2 * model(**batch).loss

    one, four = fisher_information(model, data), fisher_information(model, data, loss=doubled)
    torch.testing.assert_close(four["first.weight"], 4 * one["first.weight"])


def test_batches_may_be_tuples_under_a_loss_of_one_s_own(build, batches):
    model, data = build("toy"), batches("toy", 3)
    tuples = [(batch["input_ids"], batch["labels"]) for batch in data]
    found = fish(
        model,
        tuples,
        20,
        samples=5,
        loss=lambda model, batch: model(batch[0], labels=batch[1]).loss,
    )
    assert found.overlap(fish(model, data, 20, samples=5)) == 1.0


def test_the_mask_is_the_global_top_k(build, batches):
    model, data = build("toy"), batches("toy", 3)
    scores = fisher_information(model, data, samples=5)
    selection = fish(model, data, 20, samples=5)
    every = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.cat([scores[name].flatten()[index] for name, index in selection.indices.items()])
    assert torch.equal(chosen.sort().values, every.sort().values[-20:])
    assert selection.method == "FISH"


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "expected"])
@pytest.mark.parametrize("kind", ["toy", "bert"])
def test_exactly_the_mask_and_the_head_are_trained(build, batches, kind, fisher):
    model, data = build(kind), batches(kind, 3)
    before, keys = sl.snapshot(model), list(model.state_dict())
    expected = sl.select(fisher_information(model, data, samples=5, fisher=fisher, seed=1), 25)
    selection = fish(model, data, 25, samples=5, fisher=fisher, seed=1)
    method = sl.fixed_mask(model, selection, lr=0.02, epochs=2, lr_head=0.01, weight_decay=0.1)
    records = sl.fit(model, method, data)

    assert [r["phase"] for r in records] == ["FISH"] * 6
    for name, mask in expected.masks().items():
        assert torch.equal(model.get_parameter(name) != before[name], mask), name
    assert all((p != before[name]).all() for name, p in sl.head_weights(model).items())
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_a_causal_language_model_is_scored_with_its_given_labels(build, batches):
    model, data = build("llama"), batches("llama", 2)
    total = sum(p.numel() for p in model.parameters())
    selection = fish(model, data, 0.01)
    assert (selection.count, selection.total) == (round(0.01 * total), total)
    before = sl.snapshot(model)
    sl.fit(model, sl.fixed_mask(model, selection, lr=0.02, epochs=2), data)
    moved = sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    assert moved == selection.count
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_excluded_is_never_selected_and_still_counts_in_the_total(build, batches):
    model, data = build("vit"), batches("vit", 2)
    total = sum(p.numel() for p in sl.weights(model).values())
    usual = fish(model, data, 0.2)
    assert any(name.startswith("vit.embeddings") for name in usual.indices)
    selection = fish(model, data, 0.2, exclude=("vit.embeddings",))
    assert (selection.count, selection.total) == (round(0.2 * total), total)
    assert not any(name.startswith("vit.embeddings") for name in selection.indices)


def test_what_the_user_froze_is_not_selected(build, batches):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    selection = fish(model, batches("bert", 2), 0.2)
    assert not any(name.startswith("bert.embeddings") for name in selection.shapes)
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())


def test_the_head_may_be_named(build, batches):
    model, data = build("toy"), batches("toy", 2)
    for fisher in ("empirical", "sampled", "expected"):
        selection = fish(model, data, 9, fisher=fisher, head=("second", "classifier"))
        assert selection.count == 9
        assert "second.weight" not in selection.shapes


class Unscored(list):
    """Batches that must not be asked for."""

    def __iter__(self):
        raise AssertionError("scored before the options were checked")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fisher": "true"}, ValueError, "fisher='true' is unknown; choose one of"),
        ({"samples": 0}, ValueError, "samples=0 must be at least 1"),
        ({"budget": True}, TypeError, "budget=True is a bool"),
        ({"budget": 10**6}, ValueError, "budget=1000000 is outside"),
        ({"exclude": ("frist",)}, ValueError, "exclude='frist' names no parameter"),
        ({"head": ("clasifier",)}, ValueError, "head='clasifier' names no parameter"),
    ],
)
def test_a_bad_option_raises_before_anything_is_scored(build, options, error, message):
    model = build("toy").train()
    with pytest.raises(error, match=message):
        fish(model, Unscored(), **{"budget": 9, **options})
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("fisher", ["empirical", "expected"])
def test_no_batch_raises_and_the_model_is_as_it_was(build, fisher):
    model = build("toy").train()
    before = sl.snapshot(model)
    with pytest.raises(ValueError, match="batches is empty"):
        fish(model, [], 9, fisher=fisher)
    assert all(
        torch.equal(before[name], p) and p.requires_grad for name, p in model.named_parameters()
    )
    assert all(module.training for module in model.modules())


def test_a_tensor_that_cannot_be_selected_in_part_is_named_before_anything_is_scored(build):
    model = build("toy")
    model.embedding.max_norm = 1.0
    with pytest.raises(ValueError, match=r"'embedding.weight' is an embedding with max_norm"):
        fish(model, Unscored(), 9)


def test_a_head_of_zeros_raises_instead_of_selecting_by_chance(build, batches):
    model, data = build("toy"), batches("toy", 1)
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="scores are zero for every weight"):
        fish(model, data, 9)
