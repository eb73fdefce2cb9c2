"""Device choice and seeding."""

import random

import numpy as np
import pytest
import torch

from selective_lite.lab.device import device, seed_everything


def test_device_prefers_an_accelerator_and_obeys_the_variable(monkeypatch):
    monkeypatch.delenv("SELECTIVE_LITE_DEVICE", raising=False)
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (device().type != "cpu") == accelerated
    monkeypatch.setenv("SELECTIVE_LITE_DEVICE", "cpu")
    assert device() == torch.device("cpu")


@pytest.mark.parametrize("value", ["gpu", "cuda:77", "meta", "cpu:1"])
def test_device_refuses_what_is_not_there(monkeypatch, value):
    monkeypatch.setenv("SELECTIVE_LITE_DEVICE", value)
    with pytest.raises(ValueError, match=f"SELECTIVE_LITE_DEVICE='{value}'"):
        device()


def test_seeding_repeats_every_source_of_chance():
    def draw(seed):
        generator = seed_everything(seed)
        assert generator.device.type == "cpu"
        own = torch.rand(2, generator=generator, device="cpu").tolist()
        return random.random(), np.random.rand(), torch.rand(2, device="cpu").tolist(), own  # noqa: NPY002

    first, again, other = draw(3), draw(3), draw(4)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.0])
def test_seeding_refuses(seed):
    with pytest.raises(ValueError, match="seed="):
        seed_everything(seed)
