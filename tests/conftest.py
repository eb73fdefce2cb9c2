"""What every test shares: no network, a fixed seed, and GPU tests only where there is a GPU."""

import os

import pytest
import torch

# Before any test imports transformers: a test that reaches for a model hub fails at once instead of hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` on a machine without one; `pytest -m gpu` runs only those."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup():
    """Start each test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
