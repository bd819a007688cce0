#!/usr/bin/env bash
# guest.sh: makes the guest in which the kernel's WireGuard is tested, once, in
# $WEFT_GUEST_DIR or the user's cache: Debian's or Ubuntu's stock kernel, and an initramfs
# with its modules for networks, disks and the host's files, busybox, ip and iptables. Needs
# busybox-static, iproute2, iptables, and zstd for Ubuntu's kernel. (The cloud kernel has no
# 9p, so no host's files.)
set -euo pipefail
dir=${WEFT_GUEST_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/weft/guest}
# The package of the newest kernel, as Debian and as Ubuntu calls it.
newest() {
	for kernel in linux-image-amd64 linux-image-generic; do
		apt-cache depends "$kernel" 2>/dev/null | awk '/Depends: linux-image-/ {print $2; exit}' || true
	done | head -n 1
}
package=$(newest)
if [ -z "$package" ]; then # apt has no list yet
	apt-get update -qq
	package=$(newest)
fi
[ -n "$package" ] || { echo "guest.sh: apt knows neither linux-image-amd64 nor linux-image-generic" >&2; exit 1; }
packages=($package)
for more in linux-modules linux-modules-extra; do # Ubuntu's are in packages of their own
	if apt-cache show "$more-${package#linux-image-}" >/dev/null 2>&1; then
		packages+=("$more-${package#linux-image-}")
	fi
done
stamp="$package $(sha256sum "$0" | cut -c1-12)"
[ "$(cat "$dir/version" 2>/dev/null)" = "$stamp" ] && exit 0

echo "making the guest of $package in $dir"
mkdir -p "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
chown _apt "$work" 2>/dev/null || true # else apt warns
(cd "$work" && apt-get download -qq "${packages[@]}")
for deb in "$work"/*.deb; do
	dpkg-deb -x "$deb" "$work/image"
done
root=$work/root
mkdir -p "$root"/{bin,sbin,usr,proc,sys,dev,run,tmp,etc,lib/modules}
cp /bin/busybox "$root/bin/busybox"
release=$(basename "$work"/image/boot/vmlinuz-*)
release=${release#vmlinuz-}
modules=$work/image/lib/modules/$release
[ -d "$modules" ] || modules=$work/image/usr/lib/modules/$release
to=$root/lib/modules/$release
for part in net crypto lib arch/x86/crypto arch/x86/lib drivers/net/wireguard drivers/net/vxlan drivers/net/{veth,tun,dummy,virtio_net,net_failover}.ko \
	drivers/virtio drivers/block/virtio_blk.ko fs/{ext4,jbd2,mbcache.ko,9p,netfs,fscache,overlayfs}; do
	for from in "$modules/kernel/$part" "$modules/kernel/$part".{xz,zst}; do
		[ -e "$from" ] || continue
		mkdir -p "$to/kernel/$(dirname "$part")"
		cp -r "$from" "$to/kernel/$(dirname "$part")"
	done
done
cp "$modules"/modules.{order,builtin} "$to/"
# busybox reads none that is compressed, as those of newer releases are.
find "$to" -name '*.ko.xz' -exec busybox unxz {} +
find "$to" -name '*.ko.zst' -exec zstd -q -d --rm {} +
sed -i 's/\.ko\..*/.ko/' "$to/modules.order"
busybox depmod -b "$root" "$release"
# A program, with the libraries that it needs, at the same paths.
bring() {
	cp --parents -L "$1" "$root"
	ldd "$1" | grep -o '/[^ ]*' | sort -u | while read -r lib; do cp --parents -L "$lib" "$root"; done
}
ip=$(command -v ip)
multi=$(readlink -f "$(command -v xtables-nft-multi)")
bring "$ip"
bring "$multi"
ln -sf "$ip" "$root/sbin/ip"
cp -r --parents /usr/lib/*/xtables "$root"
for family in iptables ip6tables; do
	for verb in "" -save -restore; do
		ln -sf "$multi" "$root/sbin/$family$verb"
		ln -sf "$multi" "$root/sbin/$family-nft$verb"
	done
done
cat >"$root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/usr/sbin:/bin
ln -sf /bin/busybox /sbin/modprobe
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
for m in virtio_pci virtio_blk virtio_net wireguard veth bridge br_netfilter vxlan tun nf_tables nft_compat nft_chain_nat ip_set ip_set_hash_ip xt_set xt_CT xt_addrtype xt_conntrack xt_comment xt_MASQUERADE xt_nat xt_TCPMSS xt_tcpudp ipt_rpfilter ip6t_rpfilter sch_ingress cls_bpf act_gact ext4 9pnet_virtio 9p overlay; do
	modprobe $m || echo "GUEST no module $m"
done
ip link set lo up
echo "GUEST kernel $(uname -r)"
sh /run.sh
echo "GUEST ends with $?"
poweroff -f
INIT
chmod 755 "$root/init"
cp "$work/image/boot/vmlinuz-$release" "$dir/vmlinuz"
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) >"$dir/initramfs.gz"
echo "$stamp" >"$dir/version"
