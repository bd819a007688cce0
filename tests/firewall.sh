#!/usr/bin/env bash
# firewall.sh: unpacks ufw and firewalld, with what they need and this machine does not
# have, into $WEFT_FIREWALL_DIR or the user's cache, once. They are not installed: their
# packages would enable them on this machine. A test lays the folder over its hosts' own.
set -euo pipefail
dir=${WEFT_FIREWALL_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/weft/firewall}
# Both even if the machine has them: then with its settings, which the test must not see.
missing() { apt-get install --simulate --reinstall --no-install-recommends ufw firewalld dbus-daemon 2>/dev/null | sed -n 's/^Inst \([^ ]*\) .*(\([^ ]*\) .*/\1=\2/p' | sort; }
packages=$(missing)
if [ -z "$packages" ]; then # apt has no list yet
	apt-get update -qq
	packages=$(missing)
fi
[ -n "$packages" ] || { echo "firewall.sh: apt knows no ufw, firewalld or dbus-daemon" >&2; exit 1; }
stamp="$packages $(sha256sum "$0" | cut -c1-12)"
[ "$(cat "$dir/version" 2>/dev/null)" = "$stamp" ] && exit 0

echo "unpacking" $packages "into $dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
chown _apt "$work" 2>/dev/null || true # else apt warns
(cd "$work" && apt-get download -qq $packages)
rm -rf "$dir"
root=$dir/root
mkdir -p "$root"/usr/{bin,sbin,lib} "$root/etc/ufw"
for name in bin sbin lib; do # packages may still have them at the top
	ln -s "usr/$name" "$root/$name"
done
for package in "$work"/*.deb; do
	dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
done
# What ufw's package does when it is installed.
cp "$root"/usr/share/ufw/iptables/*.rules "$root"/usr/share/ufw/{before.init,after.init,ufw.conf} "$root/etc/ufw/"
chmod 640 "$root"/etc/ufw/*.{rules,init}
echo "$stamp" >"$dir/version"
