"""Neighbours: methods beside selection that no kept library has, small, for chapters 12 and 13."""
