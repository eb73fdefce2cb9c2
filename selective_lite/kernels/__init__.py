"""Kernels: what is built on torch alone, below all that knows a selection or a method."""
