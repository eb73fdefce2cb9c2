"""What all cases share: one thread, silence from transformers, and a folder for files."""

import pytest
import torch
import transformers

torch.set_num_threads(1)  # the tensors are tiny: a second thread would cost more than it gives
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture
def path(tmp_path):
    """Where a user saves a delta."""
    return tmp_path / "delta.safetensors"
