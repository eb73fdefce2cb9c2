"""Two processes shard a model in masked training: what was trained can be saved, or FSDP is refused before.

Run by `test_wrappers.py` as a program, for processes of its own.
"""

import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import selective_lite as sl


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def shard(model, style):
    if style == "FSDP":
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def attempt(style, order, save):
    """What went wrong after training was let happen; nothing if it is right, or was refused in time."""
    model = net()
    chosen = sl.Selection(
        {"0.weight": torch.tensor([1, 3, 20, 30]), "2.weight": torch.tensor([0, 7])},
        {n: tuple(p.shape) for n, p in model.named_parameters()},
    )
    try:
        if order == "mask first":
            training = sl.masked(model, chosen, head=())
            sharded = shard(model, style)
        else:
            sharded = shard(model, style)
            training = sl.masked(sharded, chosen, head=())
        trained = [p for p in sharded.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        sharded(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
    except Exception as error:
        words = ("FSDP", "shard", "Distributed")
        return "" if any(w in str(error) for w in words) else f"unclear: {error!r}"
    try:
        _ = sharded.state_dict() if save == "state_dict" else training.close()
    except Exception as error:
        return f"trained, then {save}: {error!r}"
    return ""


def work(rank, port, folder):
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = [
        f"{style}, {order}: {wrong}"
        for style in ("FSDP", "fully_shard")
        for order in ("mask first", "shard first")
        for save in ("state_dict", "close")
        if (wrong := attempt(style, order, save))
    ]
    if rank == 0:
        Path(folder, "found").write_text("\n".join(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        mp.spawn(work, args=(port, folder), nprocs=2)
        sys.exit(Path(folder, "found").read_text() or 0)
