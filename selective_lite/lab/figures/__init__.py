"""What the book draws: plots, explorers, comparisons of rows, and ledgers of memory."""
