"""What every test shares: no network, a fixed seed, and GPU tests only where there is a GPU."""

import os

import pytest
import torch

# Before any test imports transformers: a test that reaches for a model hub fails at once instead of
# hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    """In a run of its own: the pretended accelerator is one for the whole process."""
    parser.addoption(
        "--pretend",
        action="store_true",
        help="run what is marked gpu, alone, on a pretended accelerator",
    )


def pytest_collection_modifyitems(config, items):
    """Skip what is marked `gpu` where there is none; `pytest -m gpu` runs only those."""
    pretend = config.getoption("pretend")
    for item in items:
        gpu = item.get_closest_marker("gpu") is not None
        if pretend and not gpu:
            item.add_marker(pytest.mark.skip(reason="--pretend runs what is marked gpu"))
        if gpu and not pretend and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and a GPU."""
    return request.getfixturevalue("accelerator") if request.param == "gpu" else "cpu"


@pytest.fixture
def accelerator(request):
    """The device of what is marked `gpu`."""
    if not request.config.getoption("pretend"):
        yield "cuda"
        return
    from tests.pretended import accelerator

    with accelerator() as name:
        yield name


def pytest_runtest_setup():
    """Start each test from the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
