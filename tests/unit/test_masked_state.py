"""The state of a model in masked training is the ordinary model's.

Its values are those that were trained last.
"""

import pytest
import torch

import selective_lite as sl


def step(model, batch, lr=0.5):
    """One step, and no forward after it: the dense tensors do not hold the new values yet."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**batch).loss.backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("kind", ["toy", "bert_tied", "llama", "gpt2"])
def test_the_state_inside_is_the_state_after_leaving(build, batches, pick, kind):
    model = build(kind)
    with sl.masked(model, pick(model), head=()):
        step(model, batches(kind, 1)[0])
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.state_dict()
    assert list(inside) == list(after)
    assert {name for name in after if not torch.equal(inside[name], after[name])} == set()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["toy", "llama"])
def test_an_ordinary_state_that_is_loaded_inside_is_what_is_trained_on(
    build, batches, pick, kind, assign
):
    model, other, (batch,) = build(kind), build(kind, seed=7), batches(kind, 1)
    expected = other(**batch).logits
    with sl.masked(model, pick(model), head=()):
        step(model, batch)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model(**batch).logits, expected)
    assert all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_a_state_without_a_tied_second_name_loads(build, batches, pick):
    model, other, (batch,) = build("llama"), build("llama", seed=7), batches("llama", 1)
    state = {
        name: tensor for name, tensor in other.state_dict().items() if name != "lm_head.weight"
    }
    with sl.masked(model, pick(model), head=()):
        step(model, batch)
        report = model.load_state_dict(state, strict=False)
        assert report.missing_keys == ["lm_head.weight"]
        assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_a_bfloat16_state_has_the_models_own_keys_and_masters_that_agree_with_it_stay(
    build, batches, pick
):
    model, (batch,) = build("toy").bfloat16(), batches("toy", 1)
    keys = list(model.state_dict())
    with sl.masked(model, pick(model)) as training:  # the head has a master too
        step(model, batch, lr=1e-5)
        masters = [p.detach().clone() for p in training.parameters()]
        assert any(not torch.equal(p, p.bfloat16().float()) for p in masters)
        state = model.state_dict()
        assert list(state) == keys
        assert {t.dtype for t in state.values()} == {torch.bfloat16}
        model.load_state_dict(state)
        assert all(map(torch.equal, masters, training.parameters()))
        model.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
        assert not any(p.any() for p in training.parameters())


def test_a_state_of_another_shape_is_refused_by_name(build, pick):
    model = build("toy")
    state = {
        name: tensor.reshape(-1)[:2] if name == "first.weight" else tensor
        for name, tensor in model.state_dict().items()
    }
    with (
        sl.masked(model, pick(model), head=()),
        pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"),
    ):
        model.load_state_dict(state)
