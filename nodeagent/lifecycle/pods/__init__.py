"""The operations on pods, their warm slots and their cgroups."""
