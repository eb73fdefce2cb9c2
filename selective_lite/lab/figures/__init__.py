"""Figures: plots, explorers, comparisons of rows, and memory."""
