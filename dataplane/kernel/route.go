package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// Fields of a routing rule (include/uapi/linux/fib_rules.h).
const (
	ruleToTable  = 1 // FR_ACT_TO_TBL
	ruleDrop     = 6 // FR_ACT_BLACKHOLE
	ruleTo       = 1 // FRA_DST
	rulePriority = 6
	ruleTable    = 15
	ruleProtocol = 21
	sizeofRule   = 12
)

// route is what the kernel tells of a route of our table.
type route struct {
	prefix netip.Prefix
	kind   uint8 // RTN_…
	link   int32 // index
	via    netip.Addr
	metric uint32
	odd    bool // has several next hops, a source, or is another program's
}

// parseRoute reads the payload of an RTM_NEWROUTE or RTM_DELROUTE. It reports false for
// routes of other tables.
func parseRoute(b []byte) (route, bool) {
	if len(b) < unix.SizeofRtMsg {
		return route{}, false
	}
	r := route{kind: b[7], odd: b[5] != dataplane.RouteProtocol || b[2] != 0}
	table, dst := uint32(b[4]), netip.IPv4Unspecified()
	if b[0] == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	for t, v := range attrs(b[unix.SizeofRtMsg:]) {
		switch t {
		case unix.RTA_TABLE:
			table = u32(v)
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case unix.RTA_OIF:
			r.link = int32(u32(v))
		case unix.RTA_GATEWAY:
			r.via, _ = netip.AddrFromSlice(v)
		case unix.RTA_VIA:
			r.via, _ = netip.AddrFromSlice(v[min(2, len(v)):])
		case unix.RTA_PRIORITY:
			r.metric = u32(v)
		case unix.RTA_MULTIPATH:
			r.odd = true
		}
	}
	r.prefix = netip.PrefixFrom(dst, int(b[1]))
	return r, table == dataplane.RouteTable
}

// routes returns our table. That it does not exist is no error.
func (k *Kernel) routes() ([]route, error) {
	var out []route
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(unix.RTM_GETROUTE, 0)
		req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family}})
		req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(dataplane.RouteTable)))
		msgs, err := k.strict.dump(req)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list routes of table %d: %w", dataplane.RouteTable, err)
		}
		for _, m := range msgs {
			if r, ok := parseRoute(m); ok {
				out = append(out, r)
			}
		}
	}
	return out, nil
}

// readRoutes adds the routes of a network. One that is not as we make it has a link
// that nobody wants.
func (k *Kernel) readRoutes(p dataplane.Plan, names map[int32]string, v store.VNI) error {
	all, err := k.routes()
	if err != nil {
		return err
	}
	var allowed map[netip.Prefix][2]store.WGKey // read if a route leads to a tunnel
	for _, r := range all {
		if store.VNI(r.metric) != v {
			continue
		}
		o := dataplane.Route{VNI: v, Prefix: r.prefix, Link: names[r.link], Via: r.via}
		if slices.Contains(dataplane.TunnelNames[:], o.Link) {
			if allowed == nil {
				if allowed, err = k.allowed(); err != nil {
					return err
				}
			}
			o.Peers = allowed[o.Prefix]
		}
		switch {
		case r.kind == unix.RTN_BLACKHOLE:
			o.Link = ""
		case r.kind != unix.RTN_UNICAST || r.odd || o.Link == "":
			o.Link = "?"
		}
		p.Add(o)
	}
	return nil
}

// applyRoutes runs operations on routes in few sends.
func (k *Kernel) applyRoutes(ops []dataplane.Op) []error {
	errs := make([]error, len(ops))
	// Who may send comes before the way there, and stays until nothing leads there.
	if err := k.allow(ops); err != nil {
		for i, op := range ops {
			if o := op.Object.(dataplane.Route); op.Verb == dataplane.Put && o.Peers != [2]store.WGKey{} {
				errs[i] = err
			}
		}
	}
	defer func() {
		if err := k.forbid(ops); err != nil {
			fill(errs, err)
		}
	}()
	index := map[string]int32{}
	var reqs []*nl.NetlinkRequest
	var at []int // the op of each request
	for i, op := range ops {
		o := op.Object.(dataplane.Route)
		if errs[i] != nil {
			continue
		}
		if op.Verb == dataplane.Put && o.Link != "" {
			if _, known := index[o.Link]; !known {
				l, err := k.link(o.Link)
				if err != nil {
					errs[i] = err
					continue
				}
				index[o.Link] = l.index
			}
		}
		reqs, at = append(reqs, routeRequest(op.Verb, o, index[o.Link])), append(at, i)
	}
	for j, err := range k.route.run(reqs...) {
		if reqs[j].Type == unix.RTM_DELROUTE && gone(err) {
			err = nil
		}
		errs[at[j]] = err
	}
	return errs
}

// peersBefore returns the peers that were allowed an address and no longer are.
func peersBefore(op dataplane.Op) (gone [2]store.WGKey) {
	var want [2]store.WGKey
	was, _ := op.Old.(dataplane.Route)
	if op.Verb == dataplane.Delete {
		was = op.Object.(dataplane.Route)
	} else {
		want = op.Object.(dataplane.Route).Peers
	}
	for i := range gone {
		if want[i].IsZero() { // else it moves to the new one
			gone[i] = was.Peers[i]
		}
	}
	return gone
}

func routeRequest(verb dataplane.Verb, o dataplane.Route, link int32) *nl.NetlinkRequest {
	msg := unix.RtMsg{Family: unix.AF_INET, Dst_len: uint8(o.Prefix.Bits()), Protocol: dataplane.RouteProtocol, Type: unix.RTN_UNICAST}
	if o.Prefix.Addr().Is6() {
		msg.Family = unix.AF_INET6
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	if verb == dataplane.Delete {
		req = nl.NewNetlinkRequest(unix.RTM_DELROUTE, 0)
		msg.Scope, msg.Type = unix.RT_SCOPE_NOWHERE, unix.RTN_UNSPEC // any
	} else if o.Link == "" {
		msg.Type = unix.RTN_BLACKHOLE
	} else if o.Via.IsValid() {
		msg.Flags = unix.RTNH_F_ONLINK
	} else {
		msg.Scope = unix.RT_SCOPE_LINK
	}
	req.AddData(&nl.RtMsg{RtMsg: msg})
	req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(dataplane.RouteTable)))
	req.AddData(nl.NewRtAttr(unix.RTA_DST, o.Prefix.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_PRIORITY, nl.Uint32Attr(uint32(o.VNI))))
	if verb == dataplane.Put && o.Link != "" {
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(link))))
		switch {
		case !o.Via.IsValid():
		case o.Via.Is6() == o.Prefix.Addr().Is6():
			req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, o.Via.AsSlice()))
		default: // struct rtvia: the address's family, then the address
			via := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
			req.AddData(nl.NewRtAttr(unix.RTA_VIA, append(via, o.Via.AsSlice()...)))
		}
	}
	return req
}

// readRules adds the rules that are ours.
func (k *Kernel) readRules(p dataplane.Plan) error {
	for _, v6 := range []bool{false, true} {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, 0)
		req.AddData(ruleMsg(v6))
		msgs, err := k.route.dump(req)
		if v6 && errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list routing rules: %w", err)
		}
		for _, m := range msgs {
			if o, ok := parseRule(m, v6); ok {
				p.Add(o)
			}
		}
	}
	return nil
}

// parseRule reads the payload of an RTM_NEWRULE. It reports false for a rule that is not
// one as we make it.
func parseRule(b []byte, v6 bool) (dataplane.RouteRule, bool) {
	o := dataplane.RouteRule{V6: v6}
	if len(b) < sizeofRule || b[2]|b[3] != 0 {
		return o, false
	}
	found := map[uint16]uint32{}
	for t, v := range attrs(b[sizeofRule:]) {
		switch t {
		case ruleTo:
			to, _ := netip.AddrFromSlice(v)
			o.Drop = netip.PrefixFrom(to, int(b[1]))
		case rulePriority, ruleTable:
			found[t] = u32(v)
		case ruleProtocol:
			found[t] = uint32(u8(v))
		}
	}
	if o.Drop.IsValid() {
		return o, b[7] == ruleDrop && found[rulePriority] == dataplane.DropPriority && found[ruleProtocol] == dataplane.RouteProtocol
	}
	return o, b[7] == ruleToTable && found[rulePriority] == dataplane.RulePriority && found[ruleTable] == dataplane.RouteTable && found[ruleProtocol] == dataplane.RouteProtocol
}

// ruleHeader is struct fib_rule_hdr.
type ruleHeader [sizeofRule]byte

func (h *ruleHeader) Len() int          { return sizeofRule }
func (h *ruleHeader) Serialize() []byte { return h[:] }

func ruleMsg(v6 bool) *ruleHeader {
	h := ruleHeader{0: unix.AF_INET, 7: ruleToTable}
	if v6 {
		h[0] = unix.AF_INET6
	}
	return &h
}

func (k *Kernel) applyRule(ctx context.Context, verb dataplane.Verb, o dataplane.RouteRule) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	if verb == dataplane.Delete {
		req = nl.NewNetlinkRequest(unix.RTM_DELRULE, 0)
	}
	msg := ruleMsg(o.V6)
	req.AddData(msg)
	if o.Drop.IsValid() {
		msg[1], msg[7] = byte(o.Drop.Bits()), ruleDrop
		req.AddData(nl.NewRtAttr(ruleTo, o.Drop.Addr().AsSlice()))
		req.AddData(nl.NewRtAttr(rulePriority, nl.Uint32Attr(dataplane.DropPriority)))
	} else {
		req.AddData(nl.NewRtAttr(rulePriority, nl.Uint32Attr(dataplane.RulePriority)))
		req.AddData(nl.NewRtAttr(ruleTable, nl.Uint32Attr(dataplane.RouteTable)))
	}
	req.AddData(nl.NewRtAttr(ruleProtocol, []byte{dataplane.RouteProtocol}))
	err := k.route.do(req)
	if verb == dataplane.Put && errors.Is(err, unix.EEXIST) || verb == dataplane.Delete && gone(err) {
		return nil
	}
	return err
}
