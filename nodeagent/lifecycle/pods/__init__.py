"""The verbs of a pod, its warm slot and its cgroup."""
