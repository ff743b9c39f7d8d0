"""Resource usage of pods and containers: of cgroups, network and disk."""
