"""Masked training in two processes: both end as one process with the whole batch does."""

import torch

from tests import side_by_side

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import selective_lite as sl

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight
    def forward(self, ids):
        return self.output(torch.tanh(self.middle(self.embedding(ids))))
model = Tied().double()
before = sl.snapshot(model)
ids = torch.randint(0, 11, (4, 8))
mine = ids[:, rank * 8 // world : (rank + 1) * 8 // world]
selection = sl.select(sl.random_scores(model, 0), 30)
with sl.masked(model, selection) as training:
    if world > 1:
        meet = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    called = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(training.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(4):
        loss = nn.functional.cross_entropy(called(mine[step]), (mine[step] + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
found = {"before": before, "after": sl.snapshot(model), "masks": selection.masks()}
torch.save(found, f"{folder}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path):
    ranks = ((0, 2), (1, 2), (0, 1))
    side_by_side.run(*(["-c", SCRIPT, rank, world, tmp_path] for rank, world in ranks))
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    for name, before in alone["before"].items():
        mask = alone["masks"][name]
        assert torch.equal(first["after"][name], second["after"][name])
        assert torch.equal(first["after"][name][~mask], before[~mask])
        assert not torch.equal(first["after"][name][mask], before[mask])
        torch.testing.assert_close(
            first["after"][name], alone["after"][name], rtol=1e-9, atol=1e-12
        )
