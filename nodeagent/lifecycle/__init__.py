"""The meaning of the CRI's calls, without the wire.

::

    composition, recovery      the node put together, and found again after a crash or an upgrade
    node, health               its parts as the API sees them, and whether it is fit to serve
    pods/                      RunPodSandbox to RemovePodSandbox; warm slots; the pod's cgroup
    containers/                CreateContainer to RemoveContainer, ExecSync; OOM kills and scores
    sessions                   Exec, Attach and PortForward, for the streaming server
    usage/                     statistics and disk usage
    supervisors/               the launcher and the supervisors: started, watched, succeeded
    plan/                      a request and an image into the plan that a container's first process executes
    inventory, events          pods and containers as they are known, and the events of their changes

A package imports those below it, never one above.
"""
