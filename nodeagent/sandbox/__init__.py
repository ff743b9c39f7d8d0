"""Pods as the node's side runs them, in packages by the process that runs the code.

::

    agent/        in the agent, with asyncio: how it talks to the launcher and to supervisors
    seccomp/      in the agent: profiles into programs of BPF, with libseccomp
    launcher/     the launcher: forks supervisors, keeps what a successor needs
    supervisor/   the supervisor of a pod
    init/         between clone3(2) and execve(2): what becomes a container's process
    runtime/      what launcher, supervisor and init share: a loop, children, peers, what a process does to itself

The agent's packages and the others never import each other. A launcher imports supervisors, because it forks them; they
import init, for the same reason; nobody imports the other way. What crosses the border is in the modules beside this
one: the plans (`spec`), the messages (`protocol`), files on disk (`exits`,
`facts`, `planfile`, `bundle`, in the form of `statefile`), where things are
(`paths`), and what both sides compute alike (`idmaps`, `rootfs_defaults`, `host_path`).

`runtime`, `launcher`, `supervisor`, `init` and the modules beside this one use the standard library only, and only the
parts of it that cost little memory: every supervisor has a copy of what it touches. `make lint` holds all of this.
"""
