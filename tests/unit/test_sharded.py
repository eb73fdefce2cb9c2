"""Models that FSDP2 (`fully_shard`) has sharded: two processes train as one, or say what to do."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import selective_lite as sl
from tests import sharded

KINDS = ("bert", "llama", "experts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes came to, by rank and by what they did."""
    command = [sys.executable, "-m", "tests.sharded"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(two, folder, kind):
    one = sharded.alone(kind, folder)
    first, second = two[0][kind], two[1][kind]
    torch.testing.assert_close(first["norms"], one["norms"], rtol=1e-7, atol=0)
    for name, before in one["before"].items():
        assert torch.equal(first["after"][name], second["after"][name])
        torch.testing.assert_close(first["after"][name], one["after"][name], rtol=0, atol=1e-7)
        if name not in one["heads"]:
            mask = one["masks"][name]
            assert torch.equal(first["after"][name][~mask], before[~mask])
            unused = name.startswith("experts.2")
            assert torch.equal(first["after"][name][mask], before[mask]) == unused


@pytest.mark.parametrize("kind", KINDS)
def test_only_trained_values_are_summed_and_once_a_backward(two, kind):
    for found in (two[0][kind], two[1][kind]):
        each = found["trained"] + found["tensors"]
        assert found["summed"] == [each] * sharded.STEPS * sharded.ACCUMULATED


@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_is_that_of_one_process(two, folder, kind):
    one = sharded.alone(kind, folder)
    files = [folder / f"{kind}-{who}.safetensors" for who in ("0", "1", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ours, theirs = sl.load(files[0]), sl.load(files[2])
    assert ours.metadata == theirs.metadata
    model = sharded.build(kind)
    ours.apply(model)
    for name, after in one["after"].items():
        torch.testing.assert_close(sl.snapshot(model)[name], after, rtol=0, atol=1e-7)
        assert torch.equal(sl.snapshot(model)[name], two[0][kind]["after"][name])


@pytest.mark.parametrize("how", ["delta", "state"])
def test_training_goes_on_where_it_stopped(two, how):
    for found in two:
        for name, straight in found["bert"]["after"].items():
            assert torch.equal(found[how]["after"][name], straight)
