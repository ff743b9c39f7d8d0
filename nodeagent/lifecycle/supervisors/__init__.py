"""The processes below the agent: the launcher, a supervisor for each pod, and the files that they get."""
