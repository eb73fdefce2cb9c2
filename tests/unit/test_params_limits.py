"""Limits of what counts: a fraction of one, and the narrowest dtype that can be trained."""

import pytest
import torch
from torch import nn

import selective_lite as sl


def test_a_fraction_of_one_is_all_candidates_and_a_count_of_all_is_too():
    model = nn.Linear(4, 3)
    for budget in (1.0, 15):
        assert sl.random(model, budget, seed=0, head=()).count == 15
    with pytest.raises(ValueError, match=r"budget=1\.0000001 is outside \(0, 1\]"):
        sl.random(model, 1.0000001, seed=0, head=())


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.float16, True), (torch.bfloat16, True), (torch.float8_e4m3fn, False)],
)
def test_a_weight_of_sixteen_bits_is_a_candidate_and_one_of_eight_is_not(dtype, trained):
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(model.weight.detach().to(dtype), requires_grad=False)
    assert list(sl.weights(model, (), with_frozen=True)) == ["weight", "bias"][not trained :]
