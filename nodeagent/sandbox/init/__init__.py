"""What becomes a container's process: everything between clone3(2) in the supervisor and execve(2) of the program.

* Nothing is imported once the node's file system is left, and no name service is asked: the container's files would
  answer. All imports are at the head of a module, and the ways to import are taken away (`main`).
* No path of the container is opened but through `nodeagent.linux.confined`, and none is opened twice.
* Descriptors are close-on-exec, and many are left open: all of them go at once before execve(2).
* It may block, because it is a process of its own; whoever wants it gone kills it.
"""
