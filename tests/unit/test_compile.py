"""torch.compile takes a masked step as one graph, and it trains as without it."""

import pytest
import torch
from torch._dynamo.utils import counters

import selective_lite as sl


def losses(model, data, parameters, backend):
    """Train some steps with a compiled forward: the losses, and the compiler's counts.

    It counts graphs and breaks.
    """
    torch._dynamo.reset()
    counters.clear()
    found = []
    step = torch.compile(model, backend=backend) if backend else model
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for _ in range(4):
        for batch in data:
            loss = step(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found, (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


# the compiler's own
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("kind", "graphs"), [("bert_tied", (1, 0)), ("llama", (1, 0)), ("gpt2", None)]
)
def test_a_compiled_masked_step_has_no_graph_break_of_its_own_and_trains_alike(
    build, batches, pick, kind, graphs
):
    ordinary, other, model, data = build(kind), build(kind), build(kind), batches(kind, 1)
    selection, before = pick(model), sl.snapshot(model)
    _, counted = losses(ordinary, data, ordinary.parameters(), "aot_eager")
    assert graphs in (None, counted)  # GPT-2's own forward breaks: it writes to a log
    with sl.masked(other, selection, head=()) as training:
        eager, _ = losses(other, data, training.parameters(), None)
    with sl.masked(model, selection, head=()) as training:
        compiled, found = losses(model, data, training.parameters(), "aot_eager")
    assert found == counted
    assert compiled[-1] < compiled[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
    masks = selection.masks()
    for name, weight in model.named_parameters():
        kept = ~masks[name] if name in masks else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(weight[kept], before[name][kept]), name
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", [None, 1])
def test_the_operations_have_true_schemas_and_shapes(padding):
    index = torch.tensor([0, 3, 4, 11])
    left, right, grad = torch.randn(5, 3), torch.randn(5, 4).half(), torch.randn(2, 5, 4)
    product = (left, right, index, 3, 4, None, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.selective_lite.sampled_product, product, test_utils=tests)
    arguments = (grad, torch.randint(0, 3, (2, 5)), index, 4, padding)
    torch.library.opcheck(torch.ops.selective_lite.sampled_rows, arguments, test_utils=tests)
