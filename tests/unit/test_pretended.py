"""The pretended accelerator does as a GPU does.

Where there is a GPU, this is a test of what it pretends.
"""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.gpu


@pytest.fixture
def there(accelerator):
    return torch.ones(3, device=accelerator)


@pytest.mark.parametrize(
    "meet",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.cat([there, torch.ones(3)]),
        lambda there: there.index_copy_(0, torch.tensor([0]), there[:1]),
        lambda there: nn.functional.linear(there, torch.ones(2, 3)),
        lambda there: there.masked_fill_(torch.tensor([True, False, True]), 0.0),
    ],
)
def test_tensors_of_two_devices_do_not_meet(there, meet):
    with pytest.raises(RuntimeError, match="device"):
        meet(there)


def test_what_may_come_from_the_cpu_does(there):
    assert (there + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
    assert there[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
    assert there.copy_(torch.arange(3.0)).tolist() == [0.0, 1.0, 2.0]


def test_results_stay_there_and_are_fetched(there, accelerator):
    assert (there * 2).sum().device.type == there.view(3, 1).device.type == accelerator
    assert (
        torch.tensor([1.0], device=accelerator).device.type
        == torch.zeros_like(there).device.type
        == accelerator
    )
    assert torch.equal(there.cpu(), torch.ones(3))


def test_a_module_moves_there_trains_and_comes_back(there, accelerator):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    layer.to(accelerator)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(there).sum().backward()
    assert layer.weight.grad.device.type == accelerator
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach().cpu(), before - 1)
