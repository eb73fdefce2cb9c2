"""Experiments: how rows are made, kept and repeated, and what code is behind them."""

from .run import OPTIMIZER, climb, first_losses, repeat
from .studies import STUDIES

__all__ = ["OPTIMIZER", "STUDIES", "climb", "first_losses", "repeat"]
