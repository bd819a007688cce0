package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// Positions in the arrays of settings that a link message carries
// (include/uapi/linux/ip.h, counted from 1, and ipv6.h, from 0).
const (
	ipv4Forwarding    = 1
	ipv4SendRedirects = 6
	ipv4RPFilter      = 8
	ipv4ARPIgnore     = 19
	ipv4RouteLocalnet = 26
	ipv6Forwarding    = 0
	ipv6DisableIPv6   = 26

	inetConf    = 1 // IFLA_INET_CONF
	inet6Conf   = 2 // IFLA_INET6_CONF
	genModeNone = 1 // IN6_ADDR_GEN_MODE_NONE

	operUnknown = 0 // IF_OPER_UNKNOWN: of devices that have no carrier to lose
	operUp      = 6 // IF_OPER_UP

	skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
)

// link is what the kernel tells of a link.
type link struct {
	index  int32
	name   string
	alias  string
	kind   string // "bridge", "vxlan", "veth", …
	master int32  // index, or 0
	lower  int32  // index of the veth's peer or of the link below, or 0
	away   bool   // lower counts in another namespace
	group  uint32
	mtu    int
	mac    store.MAC
	up     bool
	oper   bool // up, and not without a carrier
	ether  bool // frames have Ethernet headers
	port   port
	bridge bridgeSettings
	tunnel tunnel
	// closed4 and closed6: the host's stack takes nothing from the link.
	closed4, closed6 bool
	// router4 and forward6: the host's stack takes from the link what has a way back
	// there, and forwards it.
	router4, forward6 bool
	localnet          bool // packets to and from 127.0.0.0/8 pass
	// network is set where the alias tells none (adopt).
	network store.VNI
}

// port is the part of a link that is a port of a bridge.
type port struct {
	learning, suppress, hairpin bool
	limited                     bool // isolated or locked, or the bridge does not flood all to it
	stopped                     bool // it forwards nothing; so does one without a carrier
}

// Flags of a port that must be off, and that must be on, for all to pass.
var (
	portOff = []int{nl.IFLA_BRPORT_ISOLATED, nl.IFLA_BRPORT_LOCKED, nl.IFLA_BRPORT_MAB, nl.IFLA_BRPORT_PROXYARP, nl.IFLA_BRPORT_PROXYARP_WIFI}
	portOn  = []int{nl.IFLA_BRPORT_UNICAST_FLOOD, nl.IFLA_BRPORT_MCAST_FLOOD, nl.IFLA_BRPORT_BCAST_FLOOD}
)

// forwarding is the state of a port that forwards (BR_STATE_FORWARDING in
// include/uapi/linux/if_bridge.h).
const forwarding = 3

// bridgeSettings must all be off.
type bridgeSettings struct{ stp, snooping, vlan bool }

// tunnel is what a VXLAN device has for life.
type tunnel struct {
	vni   store.VNI
	local netip.Addr
	under int32 // index
	port  uint16
	odd   bool // learns, has a default destination, or takes any VNI
}

// vni returns the network that the link belongs to, if it is ours: name and
// alias must both say so, or what adopt found.
func (l *link) vni() (store.VNI, bool) {
	if !strings.HasPrefix(l.name, dataplane.LinkPrefix) {
		return 0, false
	}
	if v, ok := dataplane.AliasVNI(l.alias); ok {
		return v, true
	}
	return l.network, l.network != 0
}

// renamed reports whether the link looks like an endpoint's to which somebody gave
// another alias, as tools do for SNMP.
func (l *link) renamed() bool {
	_, ok := dataplane.AliasVNI(l.alias)
	return !ok && l.kind == "veth" && dataplane.IsVethName(l.name)
}

// adopt tells by what they hang on whose the renamed links are: by the bridge of a
// network, or by a route of ours. As a stranger's the link would count as lost, and the
// address of its container would become free.
func (k *Kernel) adopt(links []*link) error {
	var routes []route
	for _, l := range links {
		if !l.renamed() {
			continue
		}
		if at := slices.IndexFunc(links, func(o *link) bool { return o.index == l.master && o.kind == "bridge" }); at >= 0 {
			l.network, _ = dataplane.BridgeVNI(links[at].name)
			continue
		}
		if routes == nil {
			var err error
			if routes, err = k.routes(); err != nil {
				return err
			}
		}
		if at := slices.IndexFunc(routes, func(r route) bool { return r.link == l.index && !r.odd }); at >= 0 {
			l.network = store.VNI(routes[at].metric)
		}
	}
	return nil
}

// ours reports whether the link is ours: a network's, or a WireGuard device.
func (l *link) ours() bool {
	_, ok := l.vni()
	return ok || l.isTunnel()
}

// isTunnel reports whether the link is a WireGuard device of ours.
func (l *link) isTunnel() bool {
	return slices.Contains(dataplane.TunnelNames[:], l.name) && l.alias == dataplane.TunnelAlias
}

// errNoLink says that a link is not there.
var errNoLink = errors.New("no such link")

// links returns all links of the namespace.
func (k *Kernel) links() ([]*link, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	msgs, err := k.route.dump(req)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := make([]*link, 0, len(msgs))
	for _, m := range msgs {
		if l, ok := parseLink(m); ok {
			out = append(out, l)
		}
	}
	return out, k.adopt(out)
}

// link returns one link by name, or errNoLink.
func (k *Kernel) link(name string) (*link, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	msg, err := k.route.get(req)
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("link %s: %w", name, errNoLink)
	}
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", name, err)
	}
	l, ok := parseLink(msg)
	if !ok {
		return nil, fmt.Errorf("link %s: the kernel's answer is malformed", name)
	}
	if l.renamed() {
		links, err := k.links()
		if err != nil {
			return nil, err
		}
		if at := slices.IndexFunc(links, func(o *link) bool { return o.index == l.index }); at >= 0 {
			return links[at], nil
		}
	}
	return l, nil
}

// parseLink reads the payload of an RTM_NEWLINK or RTM_DELLINK.
func parseLink(b []byte) (*link, bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return nil, false
	}
	l := &link{
		index:   int32(binary.NativeEndian.Uint32(b[4:])),
		up:      binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0,
		ether:   binary.NativeEndian.Uint16(b[2:]) == unix.ARPHRD_ETHER,
		closed6: true, // unless the link has a part of IPv6
	}
	for t, v := range attrs(b[unix.SizeofIfInfomsg:]) {
		switch t {
		case unix.IFLA_IFNAME:
			l.name = text(v)
		case unix.IFLA_IFALIAS:
			l.alias = text(v)
		case unix.IFLA_MTU:
			l.mtu = int(u32(v))
		case unix.IFLA_ADDRESS:
			copy(l.mac[:], v)
		case unix.IFLA_MASTER:
			l.master = int32(u32(v))
		case unix.IFLA_LINK:
			l.lower = int32(u32(v))
		case unix.IFLA_LINK_NETNSID:
			l.away = true
		case unix.IFLA_GROUP:
			l.group = u32(v)
		case unix.IFLA_OPERSTATE:
			l.oper = l.up && (u8(v) == operUp || u8(v) == operUnknown)
		case unix.IFLA_LINKINFO:
			l.parseKind(v)
		case unix.IFLA_AF_SPEC:
			l.parseSettings(v)
		}
	}
	return l, true
}

func (l *link) parseKind(b []byte) {
	var own []byte
	for t, v := range attrs(b) {
		switch t {
		case unix.IFLA_INFO_KIND:
			l.kind = text(v)
		case unix.IFLA_INFO_DATA:
			own = v
		case unix.IFLA_INFO_SLAVE_DATA:
			for t, v := range attrs(v) {
				switch t {
				case nl.IFLA_BRPORT_LEARNING:
					l.port.learning = u8(v) != 0
				case nl.IFLA_BRPORT_NEIGH_SUPPRESS:
					l.port.suppress = u8(v) != 0
				case nl.IFLA_BRPORT_MODE:
					l.port.hairpin = u8(v) != 0
				case nl.IFLA_BRPORT_STATE:
					l.port.stopped = u8(v) != forwarding
				default:
					on := u8(v) != 0
					l.port.limited = l.port.limited || on && slices.Contains(portOff, int(t)) || !on && slices.Contains(portOn, int(t))
				}
			}
		}
	}
	switch l.kind {
	case "bridge":
		for t, v := range attrs(own) {
			switch t {
			case nl.IFLA_BR_STP_STATE:
				l.bridge.stp = u32(v) != 0
			case nl.IFLA_BR_MCAST_SNOOPING:
				l.bridge.snooping = u8(v) != 0
			case nl.IFLA_BR_VLAN_FILTERING:
				l.bridge.vlan = u8(v) != 0
			}
		}
	case "vxlan":
		l.parseTunnel(own)
	}
}

func (l *link) parseTunnel(b []byte) {
	for t, v := range attrs(b) {
		switch t {
		case nl.IFLA_VXLAN_ID:
			l.tunnel.vni = store.VNI(u32(v))
		case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
			l.tunnel.local, _ = netip.AddrFromSlice(v)
		case nl.IFLA_VXLAN_LINK:
			l.tunnel.under = int32(u32(v))
		case nl.IFLA_VXLAN_PORT:
			l.tunnel.port = port16(v)
		case nl.IFLA_VXLAN_GROUP, nl.IFLA_VXLAN_GROUP6:
			l.tunnel.odd = true
		case nl.IFLA_VXLAN_LEARNING, nl.IFLA_VXLAN_FLOWBASED, nl.IFLA_VXLAN_PROXY, nl.IFLA_VXLAN_RSC:
			l.tunnel.odd = l.tunnel.odd || u8(v) != 0
		}
	}
}

// parseSettings reads the per-link settings of the host's stack.
func (l *link) parseSettings(b []byte) {
	for family, v := range attrs(b) {
		for t, conf := range attrs(v) {
			at := func(i int) uint32 { return u32(conf[min(4*i, len(conf)):]) }
			switch {
			case family == unix.AF_INET && t == inetConf:
				l.closed4 = at(ipv4RPFilter-1) == 1 && at(ipv4ARPIgnore-1) == 1
				l.localnet = at(ipv4RouteLocalnet-1) != 0
				l.router4 = at(ipv4RPFilter-1) == 1 && at(ipv4Forwarding-1) == 1 && at(ipv4SendRedirects-1) == 0
			case family == unix.AF_INET6 && t == inet6Conf:
				l.closed6 = at(ipv6DisableIPv6) == 1
				l.forward6 = at(ipv6Forwarding) != 0
			}
		}
	}
}

// readLinks adds the links of a network to p. Settings that a Plan has no field
// for are reported in a field that they spoil, in words, so that the object
// differs from what is wanted.
func (k *Kernel) readLinks(p dataplane.Plan, links []*link, v store.VNI) error {
	var own map[int32][]netip.Prefix // of all links; read if one of ours is no port
	byIndex := map[int32]*link{}
	for _, l := range links {
		byIndex[l.index] = l
	}
	name := func(i int32) string {
		if l := byIndex[i]; l != nil {
			return l.name
		}
		return ""
	}
	router := func(l *link) (r dataplane.Router, err error) {
		if own == nil {
			own, err = k.addresses()
		}
		return readRouter(l, own[l.index]), err
	}
	for _, l := range links {
		if n, ok := l.vni(); !ok || n != v {
			continue
		}
		switch l.kind {
		case "bridge":
			o := dataplane.Bridge{Name: l.name, MAC: l.mac, MTU: l.mtu, Up: l.up, Closed: l.closed4 && l.closed6,
				Alias: spoil(l.alias, map[string]bool{"stp": l.bridge.stp, "multicast snooping": l.bridge.snooping, "vlan filtering": l.bridge.vlan})}
			if n, ok := dataplane.ParseNetworkAlias(l.alias); ok && n.OwnGateway() && !n.Routed() {
				r, err := router(l)
				if err != nil {
					return err
				}
				r.On = r.On && l.closed4 && (l.closed6 || r.HasIPv6())
				o.Closed, o.Router = false, r
			}
			p.Add(o)
		case "vxlan":
			p.Add(dataplane.VXLAN{Name: l.name, Alias: l.alias, VNI: l.tunnel.vni, Local: l.tunnel.local, Port: l.tunnel.port,
				Underlay: spoil(name(l.tunnel.under), map[string]bool{"learning or default destination": l.tunnel.odd}),
				Bridge:   spoil(name(l.master), wrongPort(l, byIndex[l.master])),
				MTU:      l.mtu, MAC: l.mac, Up: l.up, Suppress: l.port.suppress, NoChecksum: !k.offloads(l.name)})
		case "veth":
			o := readVeth(l, byIndex[l.lower], byIndex[l.master])
			if l.master == 0 {
				r, err := router(l)
				if err != nil {
					return err
				}
				r.On = r.On && l.mac == dataplane.RouterMAC
				o.Router = r
			}
			port, err := k.readPort(l)
			if err != nil {
				return err
			}
			o.Program = port
			p.Add(o)
		}
	}
	return nil
}

func readVeth(l, peer, bridge *link) dataplane.Veth {
	name := ""
	if bridge != nil {
		name = bridge.name
	}
	e, _ := dataplane.ParseEndpointAlias(l.alias)
	o := dataplane.Veth{Name: l.name, Alias: l.alias, MAC: e.MAC, MTU: l.mtu, Up: l.up, Joined: e.Sandbox != "",
		Hairpin: l.port.hairpin, Bridge: spoil(name, wrongPort(l, bridge))}
	if waits(l, peer) {
		o.MAC, o.Waits = peer.mac, true
		if peer.mtu != o.MTU {
			o.MTU = 0 // the two sides differ
		}
	}
	return o
}

// waits reports whether peer is the container's side of l and still ours to set.
func waits(l, peer *link) bool {
	return peer != nil && !l.away && peer.name == dataplane.PeerName(l.name)
}

// wrongPort returns what is wrong with a port of a bridge. One of a bridge that is down
// forwards nothing, and will when that is up.
func wrongPort(l, bridge *link) map[string]bool {
	return map[string]bool{"learning": l.port.learning, "isolated, locked or without flooding": l.port.limited,
		"stopped": l.port.stopped && l.oper && bridge != nil && bridge.up}
}

// spoil appends the settings that are on and should not be.
func spoil(s string, wrong map[string]bool) string {
	for _, what := range []string{"stp", "multicast snooping", "vlan filtering", "learning", "learning or default destination", "isolated, locked or without flooding", "stopped"} {
		if wrong[what] {
			s += " (" + what + ")"
		}
	}
	return s
}
