"""Seccomp profiles: the default, those of files and registries, and the programs that libseccomp makes of them."""
