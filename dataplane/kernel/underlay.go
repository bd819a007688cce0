package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// offload is the feature that is switched off where checksums come out wrong.
const offload = "tx-checksum-ip-generic"

// badDrivers compute wrong inner checksums for VXLAN on a port that they do not
// know (vmxnet3: https://github.com/projectcalico/calico/issues/3145 and VMware's
// KB 87190).
var badDrivers = map[string]bool{"vmxnet3": true}

// Underlay implements dataplane.Kernel. Without an address its Reason says why.
func (k *Kernel) Underlay(ctx context.Context, want netip.Addr) (dataplane.Underlay, error) {
	if err := ctx.Err(); err != nil {
		return dataplane.Underlay{}, err
	}
	links, err := k.links()
	if err != nil {
		return dataplane.Underlay{}, err
	}
	addr, index, reason, err := k.findAddress(want)
	if err != nil {
		return dataplane.Underlay{}, err
	}
	k.underlay.Store(index)
	at := slices.IndexFunc(links, func(l *link) bool { return l.index == index })
	switch {
	case reason != "":
	case at < 0:
		reason = fmt.Sprintf("the link of address %s is gone", addr)
	case !links[at].up:
		reason = fmt.Sprintf("link %s of address %s is down", links[at].name, addr)
	}
	if reason != "" {
		return dataplane.Underlay{Reason: reason, Program: k.program.err == nil, Flows: k.cfg.Flows}, nil
	}
	l := links[at]
	u := dataplane.Underlay{Address: addr, Link: l.name, MTU: l.mtu, Program: k.program.err == nil, Ethernet: l.ether, Flows: k.cfg.Flows}
	all, err := k.addresses()
	if err != nil {
		return dataplane.Underlay{}, err
	}
	for _, p := range all[index] {
		if p.Addr() == addr {
			u.Prefix = p.Masked()
		}
	}
	u.NoChecksum, u.Reason = k.checksum(links, l)
	return u, nil
}

// findAddress returns the address to use and the index of its link, or the reason
// why there is none.
func (k *Kernel) findAddress(want netip.Addr) (addr netip.Addr, index int32, reason string, err error) {
	if !want.IsValid() {
		return k.defaultAddress()
	}
	list, err := retry(func() ([]netlink.Addr, error) { return k.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return want, 0, "", fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == want {
			return want, int32(a.LinkIndex), "", nil
		}
	}
	return want, 0, fmt.Sprintf("this host has no address %s", want), nil
}

// defaultAddress returns the address from which the best default route sends, IPv4
// first: its preferred source, or else the link's address in the gateway's subnet,
// or else the link's first (source).
func (k *Kernel) defaultAddress() (addr netip.Addr, index int32, reason string, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := retry(func() ([]netlink.Route, error) {
			return k.handle.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return addr, 0, "", fmt.Errorf("look for the default route: %w", err)
		}
		routes = slices.DeleteFunc(routes, func(r netlink.Route) bool {
			return r.Type != unix.RTN_UNICAST || r.Dst != nil && !isDefault(r.Dst)
		})
		slices.SortStableFunc(routes, func(a, b netlink.Route) int { return cmp.Compare(a.Priority, b.Priority) })
		for _, r := range routes {
			if len(r.MultiPath) > 0 {
				r.LinkIndex, r.Gw = r.MultiPath[0].LinkIndex, r.MultiPath[0].Gw
			}
			addr, err := k.source(r, family)
			if err != nil {
				return addr, 0, "", err
			}
			if addr.IsValid() {
				return addr, int32(r.LinkIndex), "", nil
			}
		}
	}
	return addr, 0, "this host has no default route; set the address to reach other hosts by", nil
}

func isDefault(n *net.IPNet) bool {
	bits, _ := n.Mask.Size()
	return bits == 0
}

// source returns the address from which a route sends. Of several it is the oldest, so
// that one more does not move the host: the kernel lists those of IPv6 from the newest on
// (ipv6_link_dev_addr in net/ipv6/addrconf.c). One without a subnet, as of a service or
// from DHCPv6, is for want of another.
func (k *Kernel) source(r netlink.Route, family int) (netip.Addr, error) {
	if a, ok := netip.AddrFromSlice(r.Src); ok {
		return a.Unmap(), nil
	}
	list, err := retry(func() ([]netlink.Addr, error) { return k.handle.AddrList(nil, family) })
	if err != nil {
		return netip.Addr{}, fmt.Errorf("list addresses: %w", err)
	}
	const unfit = unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY | unix.IFA_F_TENTATIVE | unix.IFA_F_SECONDARY
	if family == netlink.FAMILY_V6 {
		slices.Reverse(list)
	}
	var first, single netip.Addr
	for _, l := range list {
		a, ok := netip.AddrFromSlice(l.IP)
		if !ok || l.LinkIndex != r.LinkIndex || l.Flags&unfit != 0 || l.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		a = a.Unmap()
		bits, most := l.Mask.Size()
		switch {
		case r.Gw != nil && l.IPNet.Contains(r.Gw):
			return a, nil
		case family == netlink.FAMILY_V6 && bits == most:
			single = cmp.Or(single, a)
		default:
			first = cmp.Or(first, a)
		}
	}
	return cmp.Or(first, single), nil
}

// retry repeats a dump of the netlink library that was interrupted.
func retry[T any](list func() ([]T, error)) (out []T, err error) {
	for range dumpTries {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return nil, err
}

// checksum decides whether transmit checksum offload must be off, and why.
func (k *Kernel) checksum(links []*link, under *link) (off bool, reason string) {
	switch k.cfg.Checksum {
	case "off":
		return true, "switched off by setting"
	case "on":
		return false, ""
	}
	if v := kernelVersion(); oldKernel(v) {
		return true, "kernel " + v + " computes wrong checksums for VXLAN behind masquerading (fixed in 5.7)"
	}
	for _, l := range carriers(links, under) {
		if driver, err := k.tool.DriverName(l.name); err == nil && badDrivers[driver] {
			return true, "driver " + driver + " of " + l.name + " computes wrong checksums for VXLAN"
		}
	}
	return false, ""
}

// carriers returns the link and those that it stands on: the ports of a bond or
// bridge, what is below a VLAN.
func carriers(links []*link, under *link) []*link {
	out := []*link{under}
	for i := 0; i < len(out); i++ {
		for _, l := range links {
			below := l.master == out[i].index || l.index == out[i].lower && !out[i].away
			if below && !slices.Contains(out, l) {
				out = append(out, l)
			}
		}
	}
	return out
}

func kernelVersion() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return text(u.Release[:])
}

// oldKernel reports whether a release such as "5.4.0-90-generic" is before 5.7.
func oldKernel(release string) bool {
	major, rest, _ := strings.Cut(release, ".")
	minor := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	return err1 == nil && err2 == nil && (a < 5 || a == 5 && b < 7)
}

// offloads reports whether the link leaves checksums to its transmit offload. One
// that cannot be asked is taken to do so.
func (k *Kernel) offloads(name string) bool {
	f, err := k.tool.Features(name)
	on, known := f[offload]
	return err != nil || !known || on
}

func (k *Kernel) setOffload(name string, on bool) error {
	if k.offloads(name) == on {
		return nil
	}
	if err := k.tool.Change(name, map[string]bool{offload: on}); err != nil {
		return fmt.Errorf("set %s of %s: %w", offload, name, err)
	}
	return nil
}

// Route is a destination that the host reaches otherwise than by its default
// route.
type Route struct {
	Prefix netip.Prefix
	Link   string // of the first next hop; "" when it has none (blackhole)
}

// Routes returns the host's routes of the main table, sorted, without default,
// loopback, multicast and link-local ones.
func (k *Kernel) Routes(ctx context.Context) ([]Route, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	names := map[int]string{}
	for _, l := range links {
		names[int(l.index)] = l.name
	}
	list, err := retry(func() ([]netlink.Route, error) {
		return k.handle.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var out []Route
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		a = a.Unmap()
		if !ok || bits == 0 || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
			continue
		}
		index := r.LinkIndex
		if index == 0 && len(r.MultiPath) > 0 {
			index = r.MultiPath[0].LinkIndex
		}
		out = append(out, Route{netip.PrefixFrom(a, bits), names[index]})
	}
	slices.SortFunc(out, func(a, b Route) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Link, b.Link))
	})
	return slices.Compact(out), nil
}

// ForeignVXLAN is a VXLAN device that is not ours. Its VNI cannot be used again on
// its port.
type ForeignVXLAN struct {
	Name string
	VNI  store.VNI
	Port uint16 // UDP
}

// VXLANs returns the VXLAN devices of others in this namespace, sorted by name.
func (k *Kernel) VXLANs(ctx context.Context) ([]ForeignVXLAN, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	var out []ForeignVXLAN
	for _, l := range links {
		if _, ours := l.vni(); l.kind == "vxlan" && !ours {
			out = append(out, ForeignVXLAN{l.name, l.tunnel.vni, l.tunnel.port})
		}
	}
	slices.SortFunc(out, func(a, b ForeignVXLAN) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}
