"""Layers: the one way to change a layer, for selected entries and for small modules."""
