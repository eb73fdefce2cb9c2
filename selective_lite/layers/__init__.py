"""Layers: the one way to change a layer, attached and detached: selected entries, sampled products, small modules."""
