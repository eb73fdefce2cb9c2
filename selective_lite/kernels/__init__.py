"""Kernels: arithmetic of tensors alone, which knows no model and no layer."""
