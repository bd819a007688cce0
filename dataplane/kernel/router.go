package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
)

// addresses returns the addresses of all links by index.
func (k *Kernel) addresses() (map[int32][]netip.Prefix, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETADDR, 0)
	req.AddData(nl.NewIfAddrmsg(unix.AF_UNSPEC))
	msgs, err := k.route.dump(req)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	out := map[int32][]netip.Prefix{}
	for _, b := range msgs {
		if len(b) < unix.SizeofIfAddrmsg {
			continue
		}
		var ip netip.Addr
		for t, v := range attrs(b[unix.SizeofIfAddrmsg:]) {
			if t == unix.IFA_LOCAL || t == unix.IFA_ADDRESS && !ip.IsValid() {
				ip, _ = netip.AddrFromSlice(v)
			}
		}
		if p := netip.PrefixFrom(ip, int(b[1])); p.IsValid() {
			link := int32(binary.NativeEndian.Uint32(b[4:]))
			out[link] = append(out[link], p)
		}
	}
	return out, nil
}

// readRouter returns the router's port that a link with the addresses is.
func readRouter(l *link, own []netip.Prefix) dataplane.Router {
	var gateways []netip.Addr
	odd := false
	for _, a := range own {
		if ip := a.Addr(); a.Bits() != ip.BitLen() {
			odd = odd || !(ip.Is6() && ip.IsLinkLocalUnicast())
		} else {
			gateways = append(gateways, ip)
		}
	}
	r := dataplane.NewRouter(l.localnet, gateways...)
	r.On = !odd && l.router4 && (l.forward6 || !r.HasIPv6())
	return r
}

// putRouter makes the link a router's port. The host's IPv6 stack forwards for all
// links or for none, so that is switched on for the host; as Docker does for its own
// IPv6 networks.
func (k *Kernel) putRouter(name string, r dataplane.Router) error {
	l, err := k.link(name)
	if err != nil {
		return err
	}
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil)
	conf.AddRtAttr(ipv4RPFilter, nl.Uint32Attr(1))
	conf.AddRtAttr(ipv4Forwarding, nl.Uint32Attr(1))
	conf.AddRtAttr(ipv4SendRedirects, nl.Uint32Attr(0))
	conf.AddRtAttr(ipv4RouteLocalnet, nl.Uint32Attr(bit(r.Local)))
	if err := k.route.do(change(name, spec)); err != nil {
		return err
	}
	if r.HasIPv6() && !l.forward6 {
		k.forwardIPv6()
	}
	have, err := k.addresses()
	if err != nil {
		return err
	}
	for _, a := range have[l.index] {
		ip := a.Addr()
		if ip.Is6() && ip.IsLinkLocalUnicast() || a.Bits() == ip.BitLen() && slices.Contains(r.Addresses(), ip) {
			continue
		}
		if err := k.route.do(addressRequest(unix.RTM_DELADDR, l.index, a)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a, err)
		}
	}
	for _, ip := range r.Addresses() {
		if err := k.route.do(addressRequest(unix.RTM_NEWADDR, l.index, netip.PrefixFrom(ip, ip.BitLen()))); err != nil {
			return fmt.Errorf("address %s: %w", ip, err)
		}
	}
	return nil
}

func addressRequest(kind int, link int32, p netip.Prefix) *nl.NetlinkRequest {
	flags := 0
	if kind == unix.RTM_NEWADDR {
		flags = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	}
	req := nl.NewNetlinkRequest(kind, flags)
	family := unix.AF_INET
	if p.Addr().Is6() {
		family = unix.AF_INET6
	}
	msg := nl.NewIfAddrmsg(family)
	msg.Prefixlen, msg.Index = uint8(p.Bits()), uint32(link)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, p.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, p.Addr().AsSlice()))
	if kind == unix.RTM_NEWADDR {
		// Every port has the same address: nobody need ask whether it is taken.
		req.AddData(nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE)))
	}
	return req
}

// forwardIPv6 lets the host forward IPv6. A host that takes its own default route from
// router advertisements would stop doing so unless that is allowed for routers too.
func (k *Kernel) forwardIPv6() {
	conf := filepath.Join(k.cfg.SysNet, "ipv6/conf")
	links, _ := os.ReadDir(conf)
	for _, l := range links {
		file := filepath.Join(conf, l.Name(), "accept_ra")
		if text, err := os.ReadFile(file); err == nil && string(text) == "1\n" {
			_ = os.WriteFile(file, []byte("2"), 0o644)
		}
	}
	k.log.Info("this host forwards IPv6 from now on, for a routed network; router advertisements are taken as before")
	err := os.WriteFile(filepath.Join(conf, "all/forwarding"), []byte("1"), 0o644)
	if err != nil && !k.noSysctl.Swap(true) {
		k.log.Warn("cannot let the host forward IPv6; mount the host's /proc/sys/net for Weft to write, or set net.ipv6.conf.all.forwarding=1", "path", k.cfg.SysNet, "err", err)
	}
}
