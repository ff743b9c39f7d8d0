"""The processes below the agent: the launcher, a supervisor for each pod, and what is handed to them."""
