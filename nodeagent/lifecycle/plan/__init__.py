"""A request and its image into a plan: pure where it can be, and nothing is made."""
