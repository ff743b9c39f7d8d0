#!/bin/sh
# In a guest that was started with --security selinux: selinux.sh POLICY COMMAND...
# Has the kernel enforce a policy, names it as a node does, and runs the command.
set -e
mount -t selinuxfs selinuxfs /sys/fs/selinux
cat "$1" >/sys/fs/selinux/load
mkdir -p /etc/selinux/tests/contexts
echo SELINUXTYPE=tests >/etc/selinux/config
cat >/etc/selinux/tests/contexts/lxc_contexts <<END
process = "system_u:system_r:container_t:s0"
file = "system_u:object_r:container_file_t:s0"
END
echo 1 >/sys/fs/selinux/enforce
shift
exec "$@"
