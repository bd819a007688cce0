# host.sh DIR NAME CGROUP: the private view of one Docker host. Runs in new
# network, mount and UTS namespaces; nothing it mounts is seen outside. It stays
# until its input ends.
set -eu
dir=$1
cgroup=$3
hostname "$2"

# /sys of this network namespace, with the machine's cgroups in it. Without
# kernel/security Docker does not load its AppArmor profile into the machine.
mkdir -p "$dir/cgroup"
mount --rbind /sys/fs/cgroup "$dir/cgroup"
mount -t sysfs sysfs /sys
mount -t bpf bpf /sys/fs/bpf
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
# The machine's own Docker settings and key are not ours (sweep.go: covered).
for own in /etc/docker /opt/containerd; do
	[ ! -d "$own" ] || mount -t tmpfs tmpfs "$own"
done

echo ready
cat >/dev/null

# The lab is closed, or the process that made it was killed: then its dockerd and
# containers are still there. Namespaces and files wait for the next lab's sweep.
tries=0
while [ "$tries" -lt 50 ]; do
	pids=$(find /sys/fs/cgroup/$cgroup /sys/fs/cgroup/*/$cgroup -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u) || true
	[ -n "$pids" ] || break
	kill -9 $pids 2>/dev/null || true
	tries=$((tries + 1))
	sleep 0.1
done
