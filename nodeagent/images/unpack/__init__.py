"""Unpacking of layers: untrusted archives into directories, within a budget and never outside of them."""
