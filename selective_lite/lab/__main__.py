"""Fetch every asset that is missing, and say where they are: ``python -m selective_lite.lab``."""

from .data.assets import ASSETS, asset

for name in ASSETS:
    print(f"{name}: {asset(name)}")
