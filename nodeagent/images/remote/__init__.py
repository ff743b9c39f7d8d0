"""Registries: name resolution, connections within bounds, authentication, and downloads of blobs."""
