"""Layers: archives of unknown origin into directories, within a budget and never outside of them."""
