"""Experiments: how rows are made, kept and repeated, and what code is behind them."""

from .run import OPTIMIZER, climb, first_losses, repeat

__all__ = ["OPTIMIZER", "climb", "first_losses", "repeat"]
