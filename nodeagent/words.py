"""Words that a request, its record and the plan of a supervisor share.

Standard library only: supervisors import this.
"""

from typing import Literal

# Whose namespace a process is in (NamespaceMode of the CRI); "target" is that of another container of the pod.
NamespaceMode = Literal["container", "pod", "node", "target"]

# How mounts of a volume reach the node, and the node's the volume (mount_namespaces(7)).
Propagation = Literal["private", "slave", "shared"]

# When a hook is run (OCI runtime specification, config.md, "POSIX-platform Hooks").
HookStage = Literal[
    "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"
]
