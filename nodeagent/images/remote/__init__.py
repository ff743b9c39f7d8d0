"""Registries: names to addresses, connections within bounds, authentication, and blobs as they come."""
