package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// entry is a neighbour or forwarding entry as the kernel tells it
// (include/uapi/linux/neighbour.h).
type entry struct {
	family uint8
	index  int32
	state  uint16
	flags  uint8
	dst    netip.Addr
	mac    store.MAC
	vlan   bool
	master int32
	odd    bool // has a port, VNI, link or next hop of its own
}

func parseEntry(b []byte) (entry, bool) {
	if len(b) < unix.SizeofNdMsg {
		return entry{}, false
	}
	e := entry{family: b[0], index: int32(binary.NativeEndian.Uint32(b[4:])), state: binary.NativeEndian.Uint16(b[8:]), flags: b[10]}
	for t, v := range attrs(b[unix.SizeofNdMsg:]) {
		switch t {
		case unix.NDA_DST:
			e.dst, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			copy(e.mac[:], v)
		case unix.NDA_VLAN:
			e.vlan = port16(v) != 0
		case unix.NDA_MASTER:
			e.master = int32(u32(v))
		case unix.NDA_PORT, unix.NDA_VNI, unix.NDA_IFINDEX, netlink.NDA_NH_ID:
			e.odd = true
		}
	}
	return e, true
}

// wrong is the destination under which Read reports an entry that has the key of
// one of ours and is not as we make it: learned, or with a port or next hop of its
// own. Nobody wants it, so that Diff replaces or removes it.
var wrong = netip.IPv4Unspecified()

// readEntries adds the forwarding entries and neighbours of a network's links.
func (k *Kernel) readEntries(p dataplane.Plan, links []*link, v store.VNI) error {
	own := map[int32]*link{}
	alone := map[int32]*link{} // no bridge's ports
	var bridges, tunnels []*link
	for _, l := range links {
		if n, ok := l.vni(); !ok || n != v {
			continue
		}
		own[l.index] = l
		if l.master == 0 && l.kind != "bridge" {
			alone[l.index] = l
		}
		switch l.kind {
		case "bridge":
			bridges = append(bridges, l)
		case "vxlan":
			tunnels = append(tunnels, l)
		}
	}
	for _, b := range bridges {
		if err := k.readFDB(p, own, b.index, 0); err != nil {
			return fmt.Errorf("list forwarding entries of %s: %w", b.name, err)
		}
		if err := k.readNeighs(p, b.index, map[int32]*link{b.index: b}); err != nil {
			return fmt.Errorf("list neighbours of %s: %w", b.name, err)
		}
	}
	if len(alone) > 0 {
		if err := k.readNeighs(p, 0, alone); err != nil {
			return fmt.Errorf("list neighbours: %w", err)
		}
	}
	for _, t := range tunnels {
		if m := own[t.master]; m != nil && m.kind == "bridge" {
			continue // it was among the bridge's
		}
		if err := k.readFDB(p, own, 0, t.index); err != nil {
			return fmt.Errorf("list forwarding entries of %s: %w", t.name, err)
		}
	}
	return nil
}

// readFDB adds the entries of a bridge and its ports, or of one link.
func (k *Kernel) readFDB(p dataplane.Plan, own map[int32]*link, bridge, port int32) error {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = port
	req.AddData(msg)
	if bridge != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(bridge))))
	}
	msgs, err := k.route.dump(req)
	if err != nil {
		return err
	}
	for _, m := range msgs {
		e, ok := parseEntry(m)
		l := own[e.index]
		if !ok || l == nil || e.vlan {
			continue // a stranger's port, or the kernel's own entry of a VLAN that is off
		}
		switch {
		case e.flags&unix.NTF_SELF != 0:
			if l.kind == "vxlan" {
				addTunnelEntry(p, l, e)
			}
		case e.master == bridge && bridge != 0 && l.index != bridge && e.mac != l.mac:
			o := dataplane.FDB{Link: l.name, MAC: e.mac, Master: true}
			if e.state != unix.NUD_NOARP || e.flags&(unix.NTF_EXT_LEARNED|netlink.NTF_STICKY) != 0 {
				o.Dst = wrong
			}
			p.Add(o)
		}
	}
	return nil
}

// addTunnelEntry adds an entry of a VXLAN device. A head-end entry keeps its key
// when it is wrong, and is marked by Master.
func addTunnelEntry(p dataplane.Plan, l *link, e entry) {
	o := dataplane.FDB{Link: l.name, MAC: e.mac, Dst: e.dst}
	bad := e.odd || !e.dst.IsValid() || e.state&unix.NUD_PERMANENT == 0 || e.flags != unix.NTF_SELF
	switch {
	case e.mac.IsZero():
		o.Master = bad
	case bad:
		o.Dst = wrong
	}
	p.Add(o)
}

// readNeighs adds the neighbours on links of ours, asked for on one of them, or with 0
// on all at once.
func (k *Kernel) readNeighs(p dataplane.Plan, only int32, own map[int32]*link) error {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_UNSPEC})
	if only != 0 {
		req.AddData(nl.NewRtAttr(unix.NDA_IFINDEX, nl.Uint32Attr(uint32(only))))
	}
	msgs, err := k.route.dump(req)
	if err != nil {
		return err
	}
	const valid = unix.NUD_PERMANENT | unix.NUD_REACHABLE | unix.NUD_PROBE | unix.NUD_STALE | unix.NUD_DELAY
	for _, m := range msgs {
		e, ok := parseEntry(m)
		// Multicast entries are the kernel's own; one that is not valid
		// answers nobody.
		l := own[e.index]
		if !ok || l == nil || !e.dst.IsValid() || e.dst.IsMulticast() || e.state&valid == 0 {
			continue
		}
		o := dataplane.Neigh{Link: l.name, IP: e.dst, MAC: e.mac}
		if e.state&unix.NUD_PERMANENT == 0 {
			if l.kind == "veth" && e.dst.IsLinkLocalUnicast() {
				continue // the container's own, which it makes itself
			}
			o.MAC = store.MAC{} // learned; nobody wants that
		}
		p.Add(o)
	}
	return nil
}

// applyEntries runs operations on forwarding entries and neighbours in few sends.
// Entries of links that later operations delete go with their link.
func (k *Kernel) applyEntries(ops, later []dataplane.Op) []error {
	errs := make([]error, len(ops))
	doomed := map[string]bool{}
	for _, op := range later {
		if classOf(op) == classLinkGone {
			doomed[op.Object.Key().Name] = true
		}
	}
	index := map[string]int32{} // 0: not there
	var reqs []*nl.NetlinkRequest
	var at []int // the op of each request
	for i, op := range ops {
		name := entryLink(op.Object)
		if op.Verb == dataplane.Delete && doomed[name] {
			continue
		}
		if _, known := index[name]; !known {
			l, err := k.link(name)
			switch {
			case err == nil:
				index[name] = l.index
			case errors.Is(err, errNoLink):
				index[name] = 0
			default:
				errs[i] = err
				continue
			}
		}
		if index[name] == 0 {
			if op.Verb == dataplane.Put {
				errs[i] = fmt.Errorf("link %s: %w", name, errNoLink)
			}
			continue
		}
		for _, req := range entryRequests(op, index[name]) {
			reqs, at = append(reqs, req), append(at, i)
		}
	}
	for j, err := range k.route.run(reqs...) {
		if reqs[j].Type == unix.RTM_DELNEIGH && gone(err) {
			err = nil
		}
		if err != nil {
			errs[at[j]] = err
		}
	}
	return errs
}

func entryLink(o dataplane.Object) string {
	switch o := o.(type) {
	case dataplane.FDB:
		return o.Link
	case dataplane.Neigh:
		return o.Link
	}
	return ""
}

// entryRequests returns the messages of one operation.
func entryRequests(op dataplane.Op, index int32) []*nl.NetlinkRequest {
	if o, ok := op.Object.(dataplane.Neigh); ok {
		msg := netlink.Ndmsg{Family: unix.AF_INET, Index: uint32(index), State: unix.NUD_PERMANENT}
		if o.IP.Is6() {
			msg.Family = unix.AF_INET6
		}
		return []*nl.NetlinkRequest{entryRequest(op.Verb, unix.NLM_F_REPLACE, msg, o.IP, o.MAC)}
	}
	o := op.Object.(dataplane.FDB)
	msg := netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(index), Flags: unix.NTF_SELF, State: unix.NUD_PERMANENT | unix.NUD_NOARP}
	mode, all := unix.NLM_F_REPLACE, netip.Addr{}
	switch {
	case o.MAC.IsZero():
		mode, all = unix.NLM_F_APPEND, o.Dst // the kernel replaces only unicast entries
	case o.Master:
		msg.Flags, msg.State = unix.NTF_MASTER, unix.NUD_NOARP
		o.Dst = netip.Addr{}
	}
	remove := entryRequest(dataplane.Delete, 0, msg, all, o.MAC)
	if op.Verb == dataplane.Delete {
		return []*nl.NetlinkRequest{remove}
	}
	put := entryRequest(dataplane.Put, mode, msg, o.Dst, o.MAC)
	// The kernel would keep an entry's port, flags or next hop.
	if old, ok := op.Old.(dataplane.FDB); ok && (old.Dst == wrong || old.Master != o.Master) {
		return []*nl.NetlinkRequest{remove, put}
	}
	return []*nl.NetlinkRequest{put}
}

func entryRequest(verb dataplane.Verb, mode int, msg netlink.Ndmsg, dst netip.Addr, mac store.MAC) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|mode)
	if verb == dataplane.Delete {
		req = nl.NewNetlinkRequest(unix.RTM_DELNEIGH, 0)
	}
	req.AddData(&msg)
	if dst.IsValid() {
		req.AddData(nl.NewRtAttr(unix.NDA_DST, dst.AsSlice()))
	}
	if msg.Family == unix.AF_BRIDGE || verb == dataplane.Put {
		req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, mac[:]))
	}
	return req
}
