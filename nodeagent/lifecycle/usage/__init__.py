"""What pods and containers use: from cgroups, from the network, from the disk."""
