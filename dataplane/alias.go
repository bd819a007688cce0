package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weftnet/weft/store"
)

// Names of links. A VNI has at most eight digits, so all fit the kernel's 15
// characters.
const (
	bridgePrefix = "weftb"
	vxlanPrefix  = "weftx"
	vethPrefix   = "weftv" // see store.EndpointID.HostLink
	tunnelPrefix = "weftw"

	// LinkPrefix begins the name of every link of ours.
	LinkPrefix = "weft"
	// AliasPrefix begins the alias of every link of ours. A link with our name
	// but without it belongs to somebody else.
	AliasPrefix = "weft:"
)

// BridgeName returns the name of a network's bridge.
func BridgeName(v store.VNI) string { return bridgePrefix + strconv.Itoa(int(v)) }

// BridgeVNI reads BridgeName back.
func BridgeVNI(name string) (store.VNI, bool) {
	number, ok := strings.CutPrefix(name, bridgePrefix)
	v, err := strconv.ParseUint(number, 10, 24)
	return store.VNI(v), ok && err == nil && v > 0
}

// VXLANName returns the name of a network's VXLAN device.
func VXLANName(v store.VNI) string { return vxlanPrefix + strconv.Itoa(int(v)) }

// VethName returns the name of the host's side of an endpoint's link.
func VethName(e store.EndpointID) string { return e.HostLink() }

// IsVethName reports whether VethName may have made a name.
func IsVethName(name string) bool {
	digest, ok := strings.CutPrefix(name, vethPrefix)
	return ok && len(name) == len(VethName("")) && strings.Trim(digest, "0123456789abcdef") == ""
}

// PeerName returns the name that the container's side has until Docker moves it.
func PeerName(veth string) string { return store.ContainerLink(veth) }

// The alias of a link says whose it is and holds what a host needs to rebuild its
// records when the database was lost. The kernel keeps at most 255 bytes.
//
//	weft:net 4096 <network id> <mtu, 0 automatic> <internal 0|1, r routed, n no masquerade, e encrypted, g gateway ours, u unguarded, s slow path, t any ethertype> 10.1.0.0/16=10.1.0.1,fd00::/64
//	weft:vxlan 4096
//	weft:ep 4096 <endpoint id> <network id> 02:… 10.1.0.2/16 - joined 8080:80,192.0.2.1:53:53/udp

const maxAlias = 255

// NetworkAlias returns the alias of a network's bridge, or of the VXLAN device of a
// routed one. Subnets that do not fit are left out from the end.
func NetworkAlias(n store.Network) string {
	how := strconv.Itoa(bit(n.Internal))
	if n.Mode == store.ModeRouted {
		how += "r"
	}
	if n.NoMasquerade {
		how += "n"
	}
	if n.Encrypted {
		how += "e"
	}
	if n.GatewayWeft {
		how += "g"
	}
	if n.Unguarded {
		how += "u"
	}
	if n.SlowPath {
		how += "s"
	}
	if n.AnyEthertype {
		how += "t"
	}
	var subnets []string
	for _, sub := range n.Subnets {
		part := sub.Pool.String()
		if sub.Gateway.IsValid() {
			part += "=" + sub.Gateway.String()
		}
		subnets = append(subnets, part)
	}
	return withList(fmt.Sprintf("%snet %d %s %d %s", AliasPrefix, n.VNI, n.ID, n.MTU, how), subnets)
}

// withList appends a list to an alias, as far as it fits.
func withList(s string, list []string) string {
	sep := " "
	for _, part := range list {
		if len(s)+len(sep)+len(part) > maxAlias {
			break
		}
		s += sep + part
		sep = ","
	}
	return s
}

// ParseNetworkAlias reads NetworkAlias back.
func ParseNetworkAlias(s string) (store.Network, bool) {
	var n store.Network
	f := strings.Fields(strings.TrimPrefix(s, AliasPrefix+"net "))
	if !strings.HasPrefix(s, AliasPrefix+"net ") || len(f) < 4 {
		return n, false
	}
	vni, err1 := strconv.ParseUint(f[0], 10, 24)
	mtu, err2 := strconv.Atoi(f[2])
	if err1 != nil || err2 != nil {
		return n, false
	}
	n = store.Network{ID: store.NetworkID(f[1]), VNI: store.VNI(vni), Mode: store.ModeVXLAN, MTU: mtu,
		Internal: strings.HasPrefix(f[3], "1"), NoMasquerade: strings.Contains(f[3], "n"), Encrypted: strings.Contains(f[3], "e"), GatewayWeft: strings.Contains(f[3], "g"),
		Unguarded: strings.Contains(f[3], "u"), SlowPath: strings.Contains(f[3], "s"), AnyEthertype: strings.Contains(f[3], "t")}
	if strings.Contains(f[3], "r") {
		n.Mode = store.ModeRouted
	}
	if len(f) < 5 {
		return n, true
	}
	for part := range strings.SplitSeq(f[4], ",") {
		pool, gw, _ := strings.Cut(part, "=")
		p, err := netip.ParsePrefix(pool)
		if err != nil {
			return n, false
		}
		a, _ := netip.ParseAddr(gw) // none is the zero Addr
		n.Subnets = append(n.Subnets, store.Subnet{Pool: p, Gateway: a})
	}
	return n, true
}

// VXLANAlias returns the alias of a network's VXLAN device.
func VXLANAlias(v store.VNI) string { return fmt.Sprintf("%svxlan %d", AliasPrefix, v) }

// EndpointAlias returns the alias of the host's side of an endpoint's link. Published
// ports that do not fit are left out from the end; a few always do.
func EndpointAlias(e store.Endpoint) string {
	s := fmt.Sprintf("%sep %d %s %s %s %s %s", AliasPrefix, e.VNI, e.ID, e.Network, e.MAC, prefixText(e.IPv4), prefixText(e.IPv6))
	switch {
	case e.Sandbox != "":
		s += " joined"
	case len(e.Ports) > 0:
		s += " -"
	}
	var ports []string
	for _, p := range e.Ports {
		ports = append(ports, portText(p))
	}
	return withList(s, ports)
}

// ParseEndpointAlias reads EndpointAlias back. Of a joined endpoint the sandbox is
// not known; it is set to "?".
func ParseEndpointAlias(s string) (store.Endpoint, bool) {
	var e store.Endpoint
	f := strings.Fields(strings.TrimPrefix(s, AliasPrefix+"ep "))
	if !strings.HasPrefix(s, AliasPrefix+"ep ") || len(f) < 6 {
		return e, false
	}
	vni, err := strconv.ParseUint(f[0], 10, 24)
	mac, err2 := store.ParseMAC(f[3])
	if err != nil || err2 != nil {
		return e, false
	}
	e = store.Endpoint{ID: store.EndpointID(f[1]), Network: store.NetworkID(f[2]), VNI: store.VNI(vni), MAC: mac}
	e.IPv4, _ = netip.ParsePrefix(f[4]) // "-" is the zero Prefix
	e.IPv6, _ = netip.ParsePrefix(f[5])
	if len(f) > 6 && f[6] == "joined" {
		e.Sandbox = "?"
	}
	if len(f) > 7 {
		for part := range strings.SplitSeq(f[7], ",") {
			if p, ok := parsePort(part); ok {
				e.Ports = append(e.Ports, p)
			}
		}
	}
	return e, true
}

// portText is a published port as docker run -p has it: [address:]port:port[/protocol].
func portText(p store.Port) string {
	host := strconv.Itoa(int(p.HostPort))
	if p.HostIP.IsValid() {
		host = netip.AddrPortFrom(p.HostIP, p.HostPort).String()
	}
	s := fmt.Sprintf("%s:%d", host, p.Port)
	if p.Proto != "tcp" {
		s += "/" + p.Proto
	}
	return s
}

// parsePort reads portText back.
func parsePort(s string) (store.Port, bool) {
	p := store.Port{Proto: "tcp"}
	s, proto, other := strings.Cut(s, "/")
	if other {
		p.Proto = proto
	}
	at := strings.LastIndexByte(s, ':')
	if at < 0 {
		return p, false
	}
	inner, err := strconv.ParseUint(s[at+1:], 10, 16)
	if err != nil {
		return p, false
	}
	p.Port = uint16(inner)
	if host, err := netip.ParseAddrPort(s[:at]); err == nil {
		p.HostIP, p.HostPort = host.Addr(), host.Port()
	} else if host, err := strconv.ParseUint(s[:at], 10, 16); err == nil {
		p.HostPort = uint16(host)
	}
	return p, p.Port != 0 && p.HostPort != 0 && slices.Contains([]string{"tcp", "udp", "sctp"}, p.Proto)
}

// AliasVNI returns the network that a link of ours belongs to.
func AliasVNI(s string) (store.VNI, bool) {
	rest, ok := strings.CutPrefix(s, AliasPrefix)
	if f := strings.Fields(rest); ok && len(f) >= 2 {
		if v, err := strconv.ParseUint(f[1], 10, 24); err == nil && v > 0 {
			return store.VNI(v), true
		}
	}
	return 0, false
}

func prefixText(p netip.Prefix) string {
	if !p.IsValid() {
		return "-"
	}
	return p.String()
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}
