"""What launcher, supervisor and init have in common; the rules of `nodeagent.sandbox.supervisor` hold here, too."""
