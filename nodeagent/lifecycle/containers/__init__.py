"""The verbs of a container."""
