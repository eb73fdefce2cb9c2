"""LT-SFT (Ansell et al. 2022) against cases worked out by hand."""

import pytest
import torch
from torch import nn

import selective_lite as sl
from selective_lite.methods.lt_sft import lt_sft, most_moved


class Line(nn.Module):
    """score = classifier * (w . x): four weights and a head of one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)
        self.classifier = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, 2.0, -1.0, 0.5]]))
            self.classifier.weight.fill_(0.5)

    def forward(self, x):
        return self.classifier(self.linear(x))


def constant_rates(method):
    for phase in method:
        phase.clip = None
        for group in phase.groups:
            group["schedule"] = sl.constant
        yield phase


def train(model, x, **options):
    """Gradient descent on the mean score, at rate 1/4, head 1/2; the state after every step."""
    states = []

    def on_step(record):
        model(x)  # a forward writes what is trained into the weights
        states.append([*model.linear.weight[0].tolist(), model.classifier.weight.item()])

    method = lt_sft(model, lr=0.25, lr_head=0.5, **options)
    optimizer = torch.optim.SGD
    sl.fit(
        model,
        constant_rates(method),
        [x],
        loss=lambda m, x: m(x).mean(),
        optimizer=optimizer,
        on_step=on_step,
    )
    return states


X = torch.tensor([[1.0, -2.0, 4.0, 0.0]])


def test_two_weights_of_four_by_hand():
    # score = c w.x, so dw = c x and dc = w.x. From w = (1, 2, -1, 1/2), c = 1/2: w.x = 1 - 4 - 4 =
    # -7. Dense: w -= 1/4 * 1/2 * (1, -2, 4, 0), c -= 1/2 * -7. It moved by (1/8, 1/4, 1/2, 0):
    # weights 1 and 2 are kept. Rewound, and the same step for these two alone; then w.x = 1 - 4.5 -
    # 6 = -9.5 with c = 4, and a second step.
    model = Line()
    states = train(model, X, budget=2, epochs=(1, 2))
    assert states == [
        [0.875, 2.25, -1.5, 0.5, 4.0],
        [1.0, 2.25, -1.5, 0.5, 4.0],
        [1.0, 4.25, -5.5, 0.5, 8.75],
    ]


def test_two_iterations_take_a_weight_each_and_go_on_from_the_first_by_hand():
    # Iteration 1 keeps weight 2 alone: masked, w = (1, 2, -1.5, 1/2), c = 4 as w.x was -7.
    # Iteration 2, dense: w.x = 1 - 4 - 6 = -9, dw = 4 x: moved by (1, 2, 4, 0), of which weight 2
    # is taken already, so weight 1 is added. Rewound to (1, 2, -1.5, 1/2), c = 4, not to the
    # pretrained weights; then both are trained.
    model = Line()
    states = train(model, X, budget=2, epochs=(1, 1), iterations=2)
    assert states == [
        [0.875, 2.25, -1.5, 0.5, 4.0],
        [1.0, 2.0, -1.5, 0.5, 4.0],
        [0.0, 4.0, -5.5, 0.5, 8.5],
        [1.0, 4.0, -5.5, 0.5, 8.5],
    ]


def test_the_l1_penalty_by_hand():
    # lambda / N = 2 / 4. Dense, step 1 starts at theta0, where the penalty's slope is 0: as without
    # it. In step 2 dw = c x + sign(theta - theta0) / 2, with c = 4, moved by (-, +, -, 0): dw =
    # (3.5, -7.5, 15.5, 0). Masked, weights 1 and 2: step 1 as before; in step 2 dw = (-8 + 1/2, 16
    # - 1/2) again, of these two alone.
    model = Line()
    states = train(model, X, budget=2, epochs=(2, 2), l1=2.0)
    assert states[0] == [0.875, 2.25, -1.5, 0.5, 4.0]
    assert states[1][:4] == [0.875 - 3.5 / 4, 2.25 + 7.5 / 4, -1.5 - 15.5 / 4, 0.5]
    assert states[2] == [1.0, 2.25, -1.5, 0.5, 4.0]
    assert states[3][:4] == [1.0, 2.25 + 7.5 / 4, -1.5 - 15.5 / 4, 0.5]


def test_the_l1_penalty_is_the_mean_distance_from_the_pretrained_weights():
    model, seen = Line(), []
    theta0 = sl.snapshot(model)

    def on_step(record):
        seen.append(record["penalty"])
        model(X)
        expected.append(
            2.0 / 4 * float((model.linear.weight - theta0["linear.weight"]).detach().abs().sum())
        )

    expected = []
    method = lt_sft(model, 2, lr=0.25, epochs=(2, 2), iterations=2, l1=2.0)
    sl.fit(model, method, [X], loss=lambda m, x: m(x).mean(), on_step=on_step)
    assert seen[0] == 0.0
    assert seen[1] == pytest.approx(expected[0])
    assert seen[3] == pytest.approx(expected[2])
    # the second dense phase begins where the first masked one ended
    assert seen[4] == pytest.approx(expected[3])
    assert seen[5] == pytest.approx(expected[4])
    assert min(seen[i] for i in (1, 3, 4, 5)) > 0


def test_ties_give_exactly_k_where_the_authors_take_every_weight_at_the_threshold():
    # 10 weights moved by 3, 39 by 2, the rest by 1: the 20th largest movement is 2, which 49
    # weights reach; the authors' code takes all of them.
    moved = torch.tensor([3.0] * 10 + [2.0] * 39 + [1.0] * 31)[torch.randperm(80)]
    scores = {"a": moved[:30].clone(), "b": moved[30:].clone()}
    selection = most_moved(scores, 20)
    assert selection.count == 20
    chosen = torch.cat([scores[name][index] for name, index in selection.indices.items()])
    assert sorted(chosen.tolist()) == [2.0] * 10 + [3.0] * 10
    assert most_moved(scores, 15, selection).count == 35
