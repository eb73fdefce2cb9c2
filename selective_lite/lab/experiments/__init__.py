"""How rows are made, kept and repeated: recipes, studies, results and the code behind them."""

from .run import OPTIMIZER, climb, first_losses, repeat

__all__ = ["OPTIMIZER", "climb", "first_losses", "repeat"]
