#!/bin/sh
# rootfs.sh DEST WEFT
#
# Makes DEST, a new folder, the plugin's root file system: the static program
# WEFT as /bin/weft, iptables in both variants, and what iptables loads. The
# files come from the machine this runs on, so run it where Debian's or Ubuntu's
# iptables package is installed. `make plugin` and the Dockerfile both call it:
# the list of files exists only here.
set -eu

dest=$1
weft=$2
[ ! -e "$dest" ] || { echo "rootfs.sh: $dest exists; remove it first" >&2; exit 1; }
for multi in /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi; do
	[ -e "$multi" ] || { echo "rootfs.sh: no $multi; install the package iptables" >&2; exit 1; }
done

# take PATH: copy the file behind PATH to the same place in DEST, where / and
# /usr are one tree.
take() {
	case $1 in /usr/*) to=$1 ;; *) to=/usr$1 ;; esac
	install -D -m "$(stat -L -c %a "$1")" "$1" "$dest$to"
}

# Places that Docker mounts over, or that programs expect.
mkdir -p "$dest"
for d in usr/bin usr/sbin usr/lib usr/lib64; do
	install -d -m 0755 "$dest/$d"
	ln -s "$d" "$dest/${d#usr/}"
done
for d in dev etc proc run run/docker run/docker/plugins run/weft run/weft/sysnet sys \
	var var/lib var/lib/weft; do
	install -d -m 0755 "$dest/$d"
done
install -d -m 1777 "$dest/tmp"
ln -s /run "$dest/var/run"
: >"$dest/run/xtables.lock"
: >"$dest/run/docker.sock"

install -m 0755 "$weft" "$dest/usr/bin/weft"

# Only the names that say which variant they are: nothing may depend on which
# one this machine calls plain iptables.
for variant in nft legacy; do
	multi=xtables-$variant-multi
	take "/usr/sbin/$multi"
	for family in iptables ip6tables; do
		for verb in "" -save -restore; do
			ln -s "$multi" "$dest/usr/sbin/$family-$variant$verb"
		done
	done
done

# Matches and targets of IPv4, IPv6 and both. The folder's name is compiled into
# libxtables, so it stays the same.
for so in /usr/lib/*/xtables/libxt_*.so /usr/lib/*/xtables/libipt_*.so /usr/lib/*/xtables/libip6t_*.so; do
	[ -e "$so" ] || { echo "rootfs.sh: no iptables extensions at $so; install the package iptables" >&2; exit 1; }
	take "$so"
	if [ -L "$so" ]; then # an alias of another extension: keep it one
		target=$(readlink "$so")
		case $target in */*) ;; *) ln -sf "$target" "$dest$so" ;; esac
	fi
done

# What the above is linked against, and the loader.
find "$dest/usr/sbin" "$dest/usr/lib" -type f -exec ldd {} + |
	awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\/.*[^:]$/) print $i }' |
	sort -u | grep -v "^$dest" >"$dest.libs"
while read -r lib; do
	take "$lib"
done <"$dest.libs"
rm "$dest.libs"

# The same input gives the same bytes in the layer that Docker makes of this.
find "$dest" -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
