package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// own returns the link of that name, or nil if there is none. A link that is not
// ours is an error: nothing touches it.
func (k *Kernel) own(name string) (*link, error) {
	l, err := k.link(name)
	if errors.Is(err, errNoLink) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !l.ours() {
		return nil, fmt.Errorf("link %s exists but is not Weft's (its alias is %q); rename or remove it", name, l.alias)
	}
	return l, nil
}

// Each link is made down by one message, gets its alias and flags by the next in
// the same send, and is set up last. Alias, addr_gen_mode and the port's flags
// cannot be given at creation (rtnl_newlink_create in net/core/rtnetlink.c), and no
// frame should pass a port that learns. The kernel takes one send without a pause,
// so that a crash of ours leaves no link without an alias.

// create returns the message that makes a link of a kind.
func create(name, kind string, data *nl.RtAttr, more ...*nl.RtAttr) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	for _, a := range more {
		req.AddData(a)
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(unix.IFLA_INFO_KIND, []byte(kind))
	if data != nil {
		info.AddChild(data)
	}
	req.AddData(info)
	return req
}

// change returns a message that changes a link.
func change(name string, more ...*nl.RtAttr) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	for _, a := range more {
		if a != nil {
			req.AddData(a)
		}
	}
	return req
}

func aliasAttr(s string) *nl.RtAttr    { return nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(s)) }
func queueAttr(n int) *nl.RtAttr       { return nl.NewRtAttr(unix.IFLA_TXQLEN, nl.Uint32Attr(uint32(n))) }
func mtuAttr(n int) *nl.RtAttr         { return nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(n))) }
func masterAttr(i int32) *nl.RtAttr    { return nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(i))) }
func macAttr(m store.MAC) *nl.RtAttr   { return nl.NewRtAttr(unix.IFLA_ADDRESS, m[:]) }
func flag(t int, on bool) *nl.RtAttr   { return nl.NewRtAttr(t, []byte{byte(bit(on))}) }
func flag32(t int, on bool) *nl.RtAttr { return nl.NewRtAttr(t, nl.Uint32Attr(bit(on))) }

func bit(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// raise gives the link no IPv6 address of its own, and the host's IPv4 stack the
// settings that close the link if it is a bridge; then it sets the link up, or down.
func (k *Kernel) raise(name string, closed, up bool) error {
	var reqs []*nl.NetlinkRequest
	if closed {
		spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil)
		conf.AddRtAttr(ipv4RPFilter, nl.Uint32Attr(1))
		conf.AddRtAttr(ipv4ARPIgnore, nl.Uint32Attr(1))
		reqs = append(reqs, change(name, spec))
	}
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{genModeNone})
	quiet := change(name, spec)
	flags := nl.NewNetlinkRequest(unix.RTM_NEWLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Change = unix.IFF_UP
	if up {
		msg.Flags = unix.IFF_UP
	}
	flags.AddData(msg)
	flags.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	reqs = append(reqs, quiet, flags)
	for i, err := range k.route.run(reqs...) {
		// A link has no IPv6 where the host has none or the MTU is too small
		// for it (1280).
		if err != nil && !(reqs[i] == quiet && errors.Is(err, unix.EAFNOSUPPORT)) {
			return err
		}
	}
	return nil
}

// portAttr sets the flags of a bridge's port. Those that a kernel does not know it
// passes over.
func portAttr(suppress, hairpin bool) *nl.RtAttr {
	attrs := []*nl.RtAttr{flag(nl.IFLA_BRPORT_LEARNING, false), flag(nl.IFLA_BRPORT_NEIGH_SUPPRESS, suppress), flag(nl.IFLA_BRPORT_MODE, hairpin)}
	for _, off := range portOff {
		attrs = append(attrs, flag(off, false))
	}
	for _, on := range portOn {
		attrs = append(attrs, flag(on, true))
	}
	return slaveAttr(attrs...)
}

func slaveAttr(attrs ...*nl.RtAttr) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(unix.IFLA_INFO_SLAVE_KIND, []byte("bridge"))
	data := info.AddRtAttr(unix.IFLA_INFO_SLAVE_DATA, nil)
	for _, a := range attrs {
		data.AddChild(a)
	}
	return info
}

// forward lets a port forward that somebody has stopped. Without a carrier it cannot,
// and will by itself when that is back.
func (k *Kernel) forward(l *link) error {
	if l == nil || !l.port.stopped || !l.oper {
		return nil
	}
	err := k.route.do(change(l.name, slaveAttr(nl.NewRtAttr(nl.IFLA_BRPORT_STATE, []byte{forwarding}))))
	if errors.Is(err, unix.ENETDOWN) {
		return nil
	}
	return err
}

// build makes a link: first is the creation. If a later message fails the link is
// removed again, since half of it could not be told from a stranger's.
func (k *Kernel) build(name string, reqs ...*nl.NetlinkRequest) error {
	errs := k.route.run(reqs...)
	if errs[0] != nil {
		return errs[0]
	}
	for _, err := range errs[1:] {
		if err != nil {
			_ = k.remove(name)
			return err
		}
	}
	return nil
}

// ownKind is own, but a link of ours that is of another kind is removed.
func (k *Kernel) ownKind(name, kind string) (*link, error) {
	l, err := k.own(name)
	if l != nil && l.kind != kind {
		return nil, k.remove(name)
	}
	return l, err
}

func (k *Kernel) putBridge(o dataplane.Bridge) error {
	l, err := k.ownKind(o.Name, "bridge")
	if err != nil {
		return err
	}
	data := nl.NewRtAttr(unix.IFLA_INFO_DATA, nil)
	data.AddChild(flag32(nl.IFLA_BR_STP_STATE, false))
	data.AddChild(flag(nl.IFLA_BR_MCAST_SNOOPING, false))
	if l != nil && l.bridge.vlan { // kernels without it refuse to hear of it
		data.AddChild(flag(nl.IFLA_BR_VLAN_FILTERING, false))
	}
	// The MTU is changed after creation: only a change keeps the bridge from
	// following its ports (br_change_mtu).
	more := []*nl.RtAttr{aliasAttr(o.Alias), mtuAttr(o.MTU)}
	if l == nil {
		err = k.build(o.Name, create(o.Name, "bridge", data, macAttr(o.MAC)), change(o.Name, more...))
	} else {
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(unix.IFLA_INFO_KIND, []byte("bridge"))
		info.AddChild(data)
		more = append(more, info)
		if l.mac != o.MAC {
			more = append(more, macAttr(o.MAC))
		}
		err = k.route.do(change(o.Name, more...))
	}
	if err != nil {
		return err
	}
	switch {
	case o.Closed || o.Router.On && !o.Router.HasIPv6():
		k.setIPv6(o.Name, false)
	case o.Router.On:
		k.setIPv6(o.Name, true)
	}
	if o.Router.On {
		if err := k.putRouter(o.Name, o.Router); err != nil {
			return err
		}
	}
	return k.raise(o.Name, o.Closed || o.Router.On, o.Up)
}

// setIPv6 cannot be done by netlink. Where /proc/sys cannot be written the link keeps
// IPv6 without an address, and Read tells.
func (k *Kernel) setIPv6(name string, on bool) {
	if k.rules.ipv6Off() {
		return
	}
	err := os.WriteFile(filepath.Join(k.cfg.SysNet, "ipv6/conf", name, "disable_ipv6"), []byte{'0' + byte(bit(!on))}, 0o644)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !k.noSysctl.Swap(true) {
		k.log.Warn("cannot switch IPv6 on bridges off or on; mount the host's /proc/sys/net for Weft to write", "path", k.cfg.SysNet, "err", err)
	}
}

// bridgeIndex returns the index of a bridge of ours, to attach a port, or 0 for none.
func (k *Kernel) bridgeIndex(name string) (int32, error) {
	if name == "" {
		return 0, nil
	}
	l, err := k.own(name)
	if err != nil {
		return 0, err
	}
	if l == nil {
		return 0, fmt.Errorf("bridge %s: %w", name, errNoLink)
	}
	return l.index, nil
}

func (k *Kernel) putVXLAN(o dataplane.VXLAN) error {
	under, err := k.link(o.Underlay)
	if err != nil {
		return fmt.Errorf("underlay: %w", err)
	}
	if room := under.mtu - dataplane.Overhead(o.Local); o.MTU > room {
		return fmt.Errorf("mtu %d does not fit: underlay link %s leaves %d bytes; set the network's mtu to at most that", o.MTU, o.Underlay, room)
	}
	bridge, err := k.bridgeIndex(o.Bridge)
	if err != nil {
		return err
	}
	var flags *nl.RtAttr
	if o.Bridge != "" {
		flags = portAttr(o.Suppress, false)
	}
	l, err := k.ownKind(o.Name, "vxlan")
	if err != nil {
		return err
	}
	want := tunnel{vni: o.VNI, local: o.Local, under: under.index, port: o.Port}
	if l != nil && l.tunnel != want {
		return k.replaceVXLAN(o)
	}
	more := []*nl.RtAttr{aliasAttr(o.Alias), flags}
	if l == nil {
		err = k.build(o.Name, create(o.Name, "vxlan", tunnelData(o, under.index), macAttr(o.MAC), mtuAttr(o.MTU), masterAttr(bridge)),
			change(o.Name, more...))
		if errors.Is(err, unix.EEXIST) {
			return k.explainExists(o, err)
		}
	} else {
		more = append(more, mtuAttr(o.MTU))
		if l.mac != o.MAC {
			more = append(more, macAttr(o.MAC))
		}
		err = k.route.do(change(o.Name, masterAttr(bridge)), change(o.Name, more...))
	}
	if err != nil {
		return err
	}
	if err := k.setOffload(o.Name, !o.NoChecksum); err != nil {
		return err
	}
	if err := k.raise(o.Name, false, o.Up); err != nil || o.Bridge == "" {
		return err
	}
	return k.forward(l)
}

func tunnelData(o dataplane.VXLAN, under int32) *nl.RtAttr {
	data := nl.NewRtAttr(unix.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(uint32(o.VNI)))
	t := nl.IFLA_VXLAN_LOCAL
	if o.Local.Is6() {
		// The outer UDP checksum stays on, both ways (RFC 7348 wants it
		// over IPv6 unless the path is known; the kernel's default).
		t = nl.IFLA_VXLAN_LOCAL6
	}
	data.AddRtAttr(t, o.Local.AsSlice())
	data.AddRtAttr(nl.IFLA_VXLAN_LINK, nl.Uint32Attr(uint32(under)))
	data.AddRtAttr(nl.IFLA_VXLAN_PORT, nl.BEUint16Attr(o.Port))
	data.AddChild(flag(nl.IFLA_VXLAN_LEARNING, false))
	return data
}

// replaceVXLAN makes the device anew, for what cannot be changed, and gives it
// the entries back that it had.
func (k *Kernel) replaceVXLAN(o dataplane.VXLAN) error {
	links, err := k.links()
	if err != nil {
		return err
	}
	p := dataplane.Plan{}
	if err := k.readEntries(p, links, o.VNI); err != nil {
		return err
	}
	if err := k.remove(o.Name); err != nil {
		return err
	}
	if err := k.putVXLAN(o); err != nil {
		return err
	}
	var ops []dataplane.Op
	for _, e := range p.Sorted() {
		f, ok := e.(dataplane.FDB)
		if ok && f.Link == o.Name && (f.Master && !f.Dst.IsValid() || !f.Master && f.Dst.Is4() == o.Local.Is4()) {
			ops = append(ops, dataplane.Op{Verb: dataplane.Put, Object: f})
		}
	}
	return errors.Join(k.applyEntries(ops, nil)...)
}

// explainExists names the device that has the VNI already.
func (k *Kernel) explainExists(o dataplane.VXLAN, err error) error {
	links, lerr := k.links()
	if lerr != nil {
		return err
	}
	for _, l := range links {
		if l.kind == "vxlan" && l.name != o.Name && (l.tunnel.vni == o.VNI || l.tunnel.odd) && l.tunnel.port == o.Port {
			return fmt.Errorf("vni %d on port %d is used by link %s; choose another vni or remove that link: %w", o.VNI, o.Port, l.name, err)
		}
	}
	return err
}

func (k *Kernel) putVeth(o dataplane.Veth) error {
	bridge, err := k.bridgeIndex(o.Bridge)
	if err != nil {
		return err
	}
	l, err := k.ownKind(o.Name, "veth")
	if err != nil {
		return err
	}
	more := []*nl.RtAttr{aliasAttr(o.Alias)}
	if o.Bridge != "" {
		more = append(more, portAttr(false, o.Hairpin))
	}
	if o.Router.On && (l == nil || l.mac != dataplane.RouterMAC) { // the same one again takes the neighbours away
		more = append(more, macAttr(dataplane.RouterMAC))
	}
	if l == nil {
		if o.Joined {
			return fmt.Errorf("link %s: %w, and cannot be made again since its other side was given to a container; restart the container", o.Name, errNoLink)
		}
		err := k.build(o.Name, create(o.Name, "veth", peerData(o), mtuAttr(o.MTU), masterAttr(bridge)), change(o.Name, more...))
		if errors.Is(err, unix.EXFULL) {
			return fmt.Errorf("bridge %s has no port left (the kernel allows 1023); use another network for more containers on this host: %w", o.Bridge, err)
		}
		if err != nil {
			return err
		}
		return k.raiseVeth(o)
	}
	waiting, err := k.setPeer(o, l)
	if err != nil {
		return err
	}
	if waiting {
		more = append(more, mtuAttr(o.MTU))
	}
	if err := k.route.do(change(o.Name, masterAttr(bridge)), change(o.Name, more...)); err != nil {
		return err
	}
	if err := k.raiseVeth(o); err != nil || o.Bridge == "" {
		return err
	}
	return k.forward(l)
}

// raiseVeth sets the link up; before that the port program stands on it, and a router's
// port gets what makes it one.
func (k *Kernel) raiseVeth(o dataplane.Veth) error {
	l, err := k.link(o.Name)
	if err != nil {
		return err
	}
	if err := k.putPort(l.index, o.Program); err != nil {
		return err
	}
	if o.Router.On {
		if err := k.putRouter(o.Name, o.Router); err != nil {
			return err
		}
	}
	return k.raise(o.Name, false, o.Up)
}

func peerData(o dataplane.Veth) *nl.RtAttr {
	data := nl.NewRtAttr(unix.IFLA_INFO_DATA, nil)
	peer := data.AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(dataplane.PeerName(o.Name)))
	peer.AddChild(mtuAttr(o.MTU))
	peer.AddChild(macAttr(o.MAC))
	return data
}

// setPeer gives the container's side its MAC and MTU, as long as it waits for Docker,
// and reports whether it does. Later it is the container's.
func (k *Kernel) setPeer(o dataplane.Veth, l *link) (waiting bool, err error) {
	peer, err := k.link(dataplane.PeerName(o.Name))
	if err != nil && !errors.Is(err, errNoLink) {
		return false, err
	}
	if err == nil && peer.index == l.lower && waits(l, peer) {
		return true, k.route.do(change(peer.name, mtuAttr(o.MTU), macAttr(o.MAC)))
	}
	if e, ok := dataplane.ParseEndpointAlias(l.alias); ok && e.MAC != o.MAC {
		return false, fmt.Errorf("link %s: the container has MAC %s, which cannot be changed to %s; restart the container", o.Name, e.MAC, o.MAC)
	}
	return false, nil
}
