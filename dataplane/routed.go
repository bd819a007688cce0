package dataplane

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// planRouted adds what a routed network needs: a link per endpoint that the host
// routes to, a route per endpoint of a peer, and under all of them a blackhole, so that
// no packet of the network ever takes another way.
//
// A peer on the underlay's link is the next hop itself. Others are reached through a
// VXLAN device that carries no frames but those between its two ends: its MAC on every
// host follows from the host's id, so nobody need tell it.
func planRouted(p Plan, s store.Snapshot, u Underlay, have Plan) {
	n := *s.Network
	for _, sub := range n.Subnets {
		p.Add(Route{VNI: n.VNI, Prefix: sub.Pool})
	}
	mtu := InnerMTU(n, s.Self, s.Around, u)
	for _, e := range s.Endpoints {
		if e.Left {
			continue
		}
		veth := VethName(e.ID)
		o := Veth{Name: veth, Alias: EndpointAlias(e), MAC: e.MAC, MTU: mtu, Up: true, Joined: e.Sandbox != "",
			Program: portOf(s, e, u, mtu), Router: NewRouter(len(e.Ports) > 0 && e.IPv4.IsValid(), n.GatewayOf(e.IPv4.Addr()), n.GatewayOf(e.IPv6.Addr()))}
		for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
			if !a.IsValid() {
				continue
			}
			p.Add(Route{VNI: n.VNI, Prefix: netip.PrefixFrom(a, a.BitLen()), Link: veth})
			p.Add(Neigh{Link: veth, IP: a, MAC: e.MAC})
		}
		p.Add(o)
		planLocalDests(p, s, e, u)
	}
	planServices(p, s, u)
	switch {
	case n.Encrypted:
		planEncrypted(p, s, u)
	case u.Address.IsValid():
		planPeers(p, s, u, have)
	}
}

// planPeers adds the ways to the peers' endpoints: a plain route, or where that does not
// lead there a tunnel.
func planPeers(p Plan, s store.Snapshot, u Underlay, have Plan) {
	n, vx := *s.Network, VXLANName(s.Network.VNI)
	p.Add(VXLAN{Name: vx, Alias: NetworkAlias(n), VNI: n.VNI, Local: u.Address, Underlay: u.Link, Port: s.Self.DataPort,
		MTU: tunnelMTU(u), MAC: tunnelMAC(s.Self.ID, vx), Up: true, NoChecksum: u.NoChecksum})
	peers := reachable(s, u)
	for _, peer := range peers {
		p.Add(FDB{Link: vx, MAC: tunnelMAC(peer.ID, vx), Dst: peer.Address})
	}
	hops := nextHops(peers, vx, have)
	planWays(p, s, u, func(peer store.Peer, a netip.Addr) Route {
		switch {
		case across(s.Self, peer, u):
			return planTunnelled(p, s, peer, a, u)
		case direct(peer, a, u):
			planDest(p, Dest{VNI: n.VNI, IP: a, Peer: peer.Address, Direct: true}, n, u)
			return Route{Link: u.Link, Via: peer.Address}
		}
		mac := tunnelMAC(peer.ID, vx)
		r := Route{Link: vx, Via: linkLocal(mac)}
		if a.Is4() && hops[peer.Address] == peer.ID {
			r.Via = peer.Address
		}
		p.Add(Neigh{Link: vx, IP: r.Via, MAC: mac})
		return r
	})
}

// nextHops returns which peer has its IPv4 address as next hop on the VXLAN device. Of
// several that tell one address, be it that one of them lies, that is who has it already:
// the kernel knows a single MAC for it. The others have the address that follows from
// theirs, as all have where the underlay is IPv6.
func nextHops(peers []store.Peer, vx string, have Plan) map[netip.Addr]store.HostID {
	out := make(map[netip.Addr]store.HostID, len(peers))
	for _, peer := range peers {
		_, taken := out[peer.Address]
		if peer.Address.Is4() && (!taken || leadsTo(peer, peer.Address, vx, have)) {
			out[peer.Address] = peer.ID
		}
	}
	return out
}

// leadsTo reports whether the kernel has a peer as a next hop on the VXLAN device.
func leadsTo(peer store.Peer, via netip.Addr, vx string, have Plan) bool {
	neigh, ok := have[Neigh{Link: vx, IP: via}.Key()].(Neigh)
	return ok && neigh.MAC == tunnelMAC(peer.ID, vx)
}

// planWays adds a route to each address of the endpoints of peers, that way tells.
func planWays(p Plan, s store.Snapshot, u Underlay, way func(store.Peer, netip.Addr) Route) {
	peers := reached(s, u)
	for _, e := range s.Remote {
		peer, ok := peers[e.Owner]
		if !ok {
			continue
		}
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if !a.IsValid() {
				continue
			}
			r := way(peer, a)
			r.VNI, r.Prefix = s.Network.VNI, netip.PrefixFrom(a, a.BitLen())
			p.Add(r)
		}
	}
}

// direct reports whether a peer on the same link can be the next hop to its endpoint's
// address: an IPv4 host cannot be one for IPv6 (ip-route(8)).
func direct(peer store.Peer, a netip.Addr, u Underlay) bool {
	return u.Near(peer) && a.Is4() == peer.Address.Is4()
}

// Way returns how packets go to a peer's endpoints on a routed network, in words.
func Way(self store.Host, peer store.Peer, u Underlay) string {
	if across(self, peer, u) {
		return "wireguard"
	}
	if u.Near(peer) {
		return "direct"
	}
	return store.ModeVXLAN
}

// InVXLAN reports whether packets of a network go to a peer in VXLAN, which both must have
// on one port.
func InVXLAN(n store.Network, self store.Host, peer store.Peer, u Underlay) bool {
	switch {
	case n.Encrypted || across(self, peer, u):
		return false
	case n.Mode == store.ModeVXLAN:
		return true
	}
	return slices.ContainsFunc(n.Prefixes(), func(p netip.Prefix) bool { return !direct(peer, p.Addr(), u) })
}

func tunnelMAC(host store.HostID, vx string) store.MAC {
	return store.DeriveMAC("vxlan", string(host), vx)
}

// linkLocal returns the address that follows from a MAC (RFC 4291, appendix A).
func linkLocal(m store.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// chosen returns the networks that pick takes and that have subnets of the family, by VNI.
func chosen(v6 bool, networks []store.Network, pick func(store.Network) bool) []store.Network {
	out := slices.DeleteFunc(slices.Clone(networks), func(n store.Network) bool { return !pick(n) || len(pools(v6, n)) == 0 })
	slices.SortFunc(out, func(a, b store.Network) int { return int(a.VNI) - int(b.VNI) })
	return out
}

// routedNetworks returns the networks to whose endpoints hosts route.
func routedNetworks(v6 bool, networks []store.Network) []store.Network {
	return chosen(v6, networks, store.Network.Routed)
}

// throughHost returns the networks of which the host's stack sees packets: routed ones,
// then bridges with their own gateway.
func throughHost(v6 bool, networks []store.Network) []store.Network {
	return append(routedNetworks(v6, networks), ledBridges(v6, networks)...)
}

func pools(v6 bool, n store.Network) (out []netip.Prefix) {
	for _, s := range n.Subnets {
		if s.Pool.Addr().Is6() == v6 {
			out = append(out, s.Pool)
		}
	}
	return out
}

// planRouter adds the rules that lead to our routes and close encrypted networks, and
// masquerades what leaves a network that has its own gateway and is not internal.
func planRouter(p Plan, v6 bool, s store.HostSnapshot) {
	through := throughHost(v6, s.Networks)
	if len(through) == 0 {
		return
	}
	p.Add(RouteRule{V6: v6})
	for _, n := range chosen(v6, s.Networks, isEncrypted) {
		for _, a := range pools(v6, n) {
			p.Add(RouteRule{V6: v6, Drop: a})
		}
	}
	rules := planPorts(p, v6, s.Published, s.Networks)
	for _, n := range through {
		if !leadsOut(n) || n.NoMasquerade {
			continue
		}
		own := vethPrefix + "+"
		if !n.Routed() {
			own = BridgeName(n.VNI)
		}
		for _, from := range pools(v6, n) {
			for _, to := range pools(v6, n) {
				rules = append(rules, fmt.Sprintf("-s %s -d %s -j RETURN", from, to))
			}
			rules = append(rules, fmt.Sprintf("-s %s ! -o %s -j MASQUERADE", from, own))
		}
	}
	if len(rules) > 0 {
		p.Add(NewChain("nat", v6, chainPostrt, rules...))
		p.Add(Jump{"nat", v6, "POSTROUTING", chainPostrt})
	}
}

// routedGuard drops what an endpoint sends from an address that is not its own, beside
// rp_filter, which IPv6 does not have; and what it sends to the host's loopback, which
// is open to it where a published port is reached from 127.0.0.1.
func routedGuard(v6 bool) []string {
	if v6 {
		return []string{"-i " + vethPrefix + "+ ! -s fe80::/10 -m rpfilter --invert -j DROP"}
	}
	return []string{"-i " + vethPrefix + "+ -d 127.0.0.0/8 -j DROP", "-i " + vethPrefix + "+ -m rpfilter --invert -j DROP"}
}

// routedTrack keeps what endpoints of a routed network send each other out of connection
// tracking, which costs more than the rest of the way; but for endpoints with published
// ports, whose answers may have to be translated back, and for the gateway.
func routedTrack(v6 bool, s store.HostSnapshot) (rules []string) {
	for _, n := range routedNetworks(v6, s.Networks) {
		for _, gw := range gatewaysOf(v6, n) {
			rules = append(rules, fmt.Sprintf("-d %s -j RETURN", gw))
		}
		for _, e := range s.Published {
			at := e.IPv4.Addr()
			if v6 {
				at = e.IPv6.Addr()
			}
			if at.IsValid() && e.Network == n.ID {
				rules = append(rules, fmt.Sprintf("-s %s -j RETURN", at), fmt.Sprintf("-d %s -j RETURN", at))
			}
		}
		for _, a := range pools(v6, n) {
			for _, b := range pools(v6, n) {
				rules = append(rules, fmt.Sprintf("-s %s -d %s -j CT --notrack", a, b))
			}
		}
	}
	return rules
}

// routedWithin lets the endpoints of each routed network talk among themselves.
func routedWithin(v6 bool, networks []store.Network, u Underlay) []string {
	rules := encryptedForward(v6, networks)
	for _, n := range routedNetworks(v6, networks) {
		if n.Encrypted {
			continue
		}
		from := []string{vethPrefix + "+", VXLANName(n.VNI), tunnelPrefix + "+"}
		if u.Link != "" {
			from = append(from, u.Link)
		}
		for _, a := range pools(v6, n) {
			for _, b := range pools(v6, n) {
				for _, in := range from {
					rules = append(rules, fmt.Sprintf("-i %s -s %s -d %s -j ACCEPT", in, a, b))
				}
			}
		}
	}
	return rules
}

// routedForward lets the endpoints of routed networks out, and in what they asked for or
// what is published; between networks, and to and from Docker's own bridges, nothing else
// passes.
func routedForward(v6 bool, networks []store.Network) []string {
	routed := routedNetworks(v6, networks)
	if len(routed) == 0 {
		return nil
	}
	veths := vethPrefix + "+"
	rules := []string{
		"-o " + veths + " -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT",
		"-i " + veths + " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		"-o " + veths + " -j DROP",
		"-i " + vxlanPrefix + "+ -j DROP", "-o " + vxlanPrefix + "+ -j DROP", "-i " + tunnelPrefix + "+ -j DROP", "-o " + tunnelPrefix + "+ -j DROP",
		"-i " + veths + " -m conntrack --ctstate DNAT -j ACCEPT", // a port that Docker publishes
	}
	for _, to := range dockerBridges {
		rules = append(rules, "-i "+veths+" -o "+to+" -j DROP")
	}
	for _, n := range routed {
		if !leadsOut(n) {
			continue
		}
		for _, a := range pools(v6, n) {
			for _, o := range routed { // an endpoint elsewhere of another network
				for _, b := range pools(v6, o) {
					rules = append(rules, fmt.Sprintf("-i %s -s %s -d %s -j DROP", veths, a, b))
				}
			}
			rules = append(rules, fmt.Sprintf("-i %s -s %s -j ACCEPT", veths, a))
		}
	}
	return append(rules, "-i "+veths+" -j DROP")
}

// planPorts adds the chain that leads from ports of the host to endpoints, and returns
// the rules that masquerade what would not find its way back: an endpoint that talks to
// itself through the host's port, or to one on its own bridge, which answers it past the
// host; and what the host sends from 127.0.0.1.
func planPorts(p Plan, v6 bool, published []store.Endpoint, networks []store.Network) (masquerade []string) {
	var rules []string
	for _, e := range published {
		at := e.IPv4.Addr()
		if v6 {
			at = e.IPv6.Addr()
		}
		if !at.IsValid() {
			continue
		}
		for _, port := range e.Ports {
			to := ""
			switch {
			case port.HostIP.IsValid() && port.HostIP.Is6() != v6, port.HostIP == netip.IPv6Loopback():
				continue
			case !port.HostIP.IsValid() || port.HostIP.IsUnspecified():
				if v6 {
					to = "! -d ::1 " // the process that holds the port hands that on
				}
			default:
				to = "-d " + port.HostIP.String() + " "
			}
			rules = append(rules, fmt.Sprintf("%s-p %s -m %s --dport %d -m addrtype --dst-type LOCAL -j DNAT --to-destination %s",
				to, port.Proto, port.Proto, port.HostPort, netip.AddrPortFrom(at, port.Port)))
		}
		i := slices.IndexFunc(networks, func(n store.Network) bool { return n.ID == e.Network })
		if i < 0 || networks[i].Routed() {
			masquerade = append(masquerade, fmt.Sprintf("-s %s -d %s -j MASQUERADE", at, at))
			continue
		}
		for _, pool := range pools(v6, networks[i]) {
			masquerade = append(masquerade, fmt.Sprintf("-s %s -d %s -m conntrack --ctstate DNAT -j MASQUERADE", pool, at))
		}
	}
	if len(rules) == 0 {
		return nil
	}
	if !v6 {
		masquerade = append(masquerade, "-s 127.0.0.0/8 -o "+vethPrefix+"+ -j MASQUERADE", "-s 127.0.0.0/8 -o "+bridgePrefix+"+ -j MASQUERADE")
	}
	p.Add(NewChain("nat", v6, chainPorts, rules...))
	p.Add(Jump{"nat", v6, "PREROUTING", chainPorts})
	p.Add(Jump{"nat", v6, "OUTPUT", chainPorts})
	return masquerade
}
