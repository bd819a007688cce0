package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// Numbers by which our routes and the rule that leads to them are told from others'.
// They stand in a table of their own, asked before the main one, so that no route that
// appears later takes a network's traffic elsewhere.
const (
	RouteTable    = 4796
	RulePriority  = 4796
	DropPriority  = 4797 // of rules that drop
	RouteProtocol = 119
)

// RouterMAC is the host's side of every endpoint's link on a routed network, the same
// on all hosts.
var RouterMAC = store.MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// Router is what makes a link a router's port: the host takes from it only what comes
// from the endpoint's own addresses (rp_filter), forwards it, and answers for the
// network's gateways. The zero value is none.
type Router struct {
	On       bool
	Local    bool   // published ports are reached from 127.0.0.1 too (route_localnet)
	Gateways string // addresses, sorted, separated by commas
}

// NewRouter returns a router's port with the gateways.
func NewRouter(local bool, gateways ...netip.Addr) Router {
	return Router{On: true, Local: local, Gateways: joinAddrs(gateways)}
}

func joinAddrs(all []netip.Addr) string {
	all = slices.DeleteFunc(slices.Clone(all), func(a netip.Addr) bool { return !a.IsValid() })
	slices.SortFunc(all, netip.Addr.Compare)
	text := make([]string, 0, len(all))
	for _, a := range slices.Compact(all) {
		text = append(text, a.String())
	}
	return strings.Join(text, ",")
}

// Addresses returns the gateways.
func (r Router) Addresses() (out []netip.Addr) {
	for text := range strings.SplitSeq(r.Gateways, ",") {
		if a, err := netip.ParseAddr(text); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// HasIPv6 reports whether one of the gateways is of IPv6.
func (r Router) HasIPv6() bool { return slices.ContainsFunc(r.Addresses(), netip.Addr.Is6) }

func (r Router) String() string {
	s := "router"
	for _, a := range r.Addresses() {
		s += " " + a.String()
	}
	if r.Local {
		s += " localnet"
	}
	if !r.On {
		s += " (set up wrongly)"
	}
	return s
}

// RouteRule leads every packet to our table before the main one. With Drop it drops
// what is for an encrypted network, after that table: should the table lose its routes,
// the main one is not asked.
type RouteRule struct {
	V6   bool
	Drop netip.Prefix // zero: leads to our table
}

// Route is a route of our table. Its metric is the VNI.
type Route struct {
	VNI    store.VNI
	Prefix netip.Prefix
	Link   string     // "": a blackhole
	Via    netip.Addr // next hop on the link; zero: Prefix itself is there
	// Peers are the peers of the two WireGuard devices that may send from Prefix, and
	// are sent what is for it; zero: none.
	Peers [2]store.WGKey
}

func (RouteRule) object() {}
func (Route) object()     {}

// Key implements Object.
func (o RouteRule) Key() Key {
	k := Key{Kind: KindRule, Name: family(o.V6)}
	if o.Drop.IsValid() {
		k.IP, k.Bits = o.Drop.Addr(), uint8(o.Drop.Bits())
	}
	return k
}

// Key implements Object.
func (o Route) Key() Key {
	kind := KindRoute
	if o.Link == "" {
		kind = KindBlackhole
	}
	return Key{Kind: kind, IP: o.Prefix.Addr(), Bits: uint8(o.Prefix.Bits())}
}

func (o RouteRule) String() string {
	if o.Drop.IsValid() {
		return fmt.Sprintf("rule %s pref %d to %s blackhole", family(o.V6), DropPriority, o.Drop)
	}
	return fmt.Sprintf("rule %s pref %d lookup %d", family(o.V6), RulePriority, RouteTable)
}

func (o Route) String() string {
	s := "route blackhole " + o.Prefix.String()
	if o.Link != "" {
		s = "route " + o.Prefix.String()
		if o.Via.IsValid() {
			s += " via " + o.Via.String()
		}
		s += " dev " + o.Link
	}
	for i, k := range o.Peers {
		if !k.IsZero() {
			s += fmt.Sprintf(" wg %s peer %s", TunnelNames[i], k)
		}
	}
	return fmt.Sprintf("%s table %d proto %d metric %d", s, RouteTable, RouteProtocol, o.VNI)
}
