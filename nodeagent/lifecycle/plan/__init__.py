"""Planning of containers, from a request and its image: pure where it can be, and without effects on the node."""
