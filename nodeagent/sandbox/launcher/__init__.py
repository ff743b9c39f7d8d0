"""The launcher: one small process that forks supervisors; the rules of `nodeagent.sandbox.supervisor` hold here, too.

It serves all pods, and must therefore never wait for one: not for a supervisor, and not for the last copy of a pipe.
"""
