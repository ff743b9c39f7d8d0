"""The supervisor of a pod: one thread, one loop. Its code obeys rules that other code does not need.

**It never waits.** A supervisor that waits for anything but its loop blocks a whole pod: no sleep, no subprocess, no
wait for a child, no blocking read or write of what somebody else may hold. It forks; children may wait.

**It touches little.** A supervisor is a copy-on-write child of the launcher, and costs the node what pages it writes
to. CPython writes to what it merely uses, so:

* Modules are imported before the launcher's first fork, and no function imports anything.
* The launcher makes all objects immortal (`nodeagent.linux.immortal`) and runs through a pod's life once
  (`nodeagent.sandbox.launcher.rehearsal`), so that what the interpreter learns is learned in shared memory.
* The garbage collector is off: no reference cycles, or they stay for good.
* A list, not ``tuple()`` of a generator, where a collection is made again and again: ``tuple()`` puts tuples on a free
  list of CPython and takes none from it, up to 2,000 times.
* ``try … except … pass``, not ``contextlib.suppress``, where it is done again and again: each use makes objects.

**It leaves nothing to the end of the interpreter.** Supervisors and what they fork end by _exit(2) or execve(2): no
finaliser runs, every descriptor has an owner that closes it, and what must be durable is written before the answer.

**It trusts no input.** What a container can write is not parsed here, except for the messages of `init` before it
becomes visible to others (docs/design.md, section 5).
"""
