"""Run what is missing of all studies: ``python -m selective_lite.lab.experiments``.

The larger studies run where there is a GPU.
"""

import torch

from .run import make
from .studies import LARGER, STUDIES

if __name__ == "__main__":  # processes that make rows import this module
    for study in STUDIES.values():
        if study not in LARGER or torch.cuda.is_available():
            make(study)
