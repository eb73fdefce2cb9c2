"""Layers: changed in one way and restored: selected entries, sampled products, small modules."""
