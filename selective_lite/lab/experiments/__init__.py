"""Experiments: how rows are made, kept and repeated, and what code is behind them."""

from .run import climb, first_losses, repeat

__all__ = ["climb", "first_losses", "repeat"]
