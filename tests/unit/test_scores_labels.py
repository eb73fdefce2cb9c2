"""Labels drawn from the model: they follow its softmax, also where it is sure of its answer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import selective_lite as sl


class Offsets(nn.Module):
    """A classifier whose logits are its offsets, whatever it is shown."""

    def __init__(self, logits):
        super().__init__()
        self.offsets = nn.Parameter(torch.tensor(logits))

    def forward(self, x, labels=None):
        logits = self.offsets.expand(len(x), -1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("logits", [[3.0, 0.0, -3.0], [6.0, 5.0, 4.0]])
def test_drawn_labels_follow_the_softmax_of_the_logits(logits):
    # The gradient of a sample is p - onehot(label): its squares say how often each was drawn.
    # Of the second logits all sigmoids are almost 1.
    model, count = Offsets(logits), 500
    batches = [{"x": torch.zeros(count // 2, 1)} for _ in range(2)]
    drawn = sl.squared_gradient(model, batches, labels="model", head=())["offsets"] / count
    exact = sl.expected_squared_gradient(model, batches, head=())["offsets"] / count
    p = torch.tensor(logits).softmax(0)
    torch.testing.assert_close(exact, p * (1 - p), rtol=1e-4, atol=1e-6)
    # Four standard errors of a frequency over 500 draws.
    frequency = (drawn - p.square()) / (1 - 2 * p)
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()
