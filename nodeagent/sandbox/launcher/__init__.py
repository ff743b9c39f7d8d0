"""The launcher: one small process that forks supervisors; the rules of `nodeagent.sandbox.supervisor` hold here, too.

It serves all pods, so that it must never wait for one: not for a supervisor, and not for the last copy of a pipe.
"""
