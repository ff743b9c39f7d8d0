#!/bin/busybox sh
# The first process of a guest: puts its root together and starts agent.py there, or systemd that does.
# The kernel's command line gives guest.kind, disk, control, directory, modules, python and init.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for word in $(cat /proc/cmdline); do
	case $word in guest.*=*) eval "guest_${word#guest.}" ;; esac
done

die() {
	echo "guest init: $*" >/dev/console
	poweroff -f
}

# host PATH TARGET: mounts a directory of the host
host() {
	if [ "$guest_kind" = uml ]; then
		mount -t hostfs none "$2" -o "$1" || die "hostfs $1"
	else
		mount --bind "/host$1" "$2" || die "bind $1"
	fi
}

for module in $(cat /modules.list); do
	insmod "/modules/$module.ko" || die "insmod $module"
done
[ "$guest_kind" = uml ] || mount -t virtiofs host /host || die virtiofs
host "$guest_control" /control
host / /lower
mount -t tmpfs -o size=80% tmpfs /overlay
mkdir /overlay/upper /overlay/work
mount -t overlay root /new -o lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work || die overlay

cd /new || die root
mkdir -p dev proc sys run tmp var/tmp
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mkdir -p run/guest/control run/guest/disk run/lock
mount -t ext4 "/dev/$guest_disk" run/guest/disk || die disk
mkdir -m 1777 run/guest/disk/tmp run/guest/disk/vartmp
mount --bind run/guest/disk/tmp tmp
mount --bind run/guest/disk/vartmp var/tmp
mount --bind /control run/guest/control
mkdir -p "./$guest_directory" "usr/lib/modules/$(uname -r)"
host "$guest_directory" "./$guest_directory"
host "$guest_modules" "usr/lib/modules/$(uname -r)"

# A machine of its own name, without the host's file systems and resolver
echo guest >/proc/sys/kernel/hostname
echo guest >etc/hostname
echo '127.0.0.1 localhost guest' >etc/hosts
: >etc/fstab
rm -f .dockerenv etc/mtab
ln -s ../proc/self/mounts etc/mtab

if [ "$guest_init" = systemd ]; then
	rm -f etc/machine-id
	echo 0123456789abcdef0123456789abcdef >etc/machine-id
	mkdir -p run/systemd/system
	cp /control/guest.* run/systemd/system/
	rm -rf etc/systemd/system/*.wants # the services of the host
	umount /proc /sys 2>/dev/null
	mount --move /dev dev
	exec switch_root /new /lib/systemd/systemd --unit=guest.target
fi

mount --move /proc proc
mount --move /sys sys
mount --move /dev dev
mkdir -p dev/pts dev/shm dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t mqueue mqueue dev/mqueue 2>/dev/null
ln -sf /proc/self/fd dev/fd
ln -sf fd/0 dev/stdin
ln -sf fd/1 dev/stdout
ln -sf fd/2 dev/stderr
mount -t cgroup2 -o nsdelegate cgroup2 sys/fs/cgroup || die cgroup2
for controller in $(cat sys/fs/cgroup/cgroup.controllers); do
	echo "+$controller" >sys/fs/cgroup/cgroup.subtree_control
done
mount -t securityfs securityfs sys/kernel/security
mount -t bpf bpf sys/fs/bpf 2>/dev/null
ip link set lo up
exec switch_root /new "$guest_python" /run/guest/control/agent.py
