# host.sh DIR NAME: the private view of one Docker host. Runs in new network,
# mount and UTS namespaces; nothing it mounts is seen outside.
set -eu
dir=$1
hostname "$2"

# /sys of this network namespace, with the machine's cgroups in it. Without
# kernel/security Docker does not load its AppArmor profile into the machine.
mkdir -p "$dir/cgroup"
mount --rbind /sys/fs/cgroup "$dir/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$dir/cgroup" /sys/fs/cgroup
umount -l "$dir/cgroup"
rmdir "$dir/cgroup"

# Let go of the names of other network namespaces: they would live as long as
# this host.
for ns in /run/netns/*; do
	umount -l "$ns" 2>/dev/null || true
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/docker /run/lock
mount --bind "$dir/run" /run/docker
# The machine's own Docker settings are not ours, nor is its key.
for own in /etc/docker /opt/containerd; do
	[ ! -d "$own" ] || mount -t tmpfs tmpfs "$own"
done

echo ready
exec cat >/dev/null
