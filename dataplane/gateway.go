package dataplane

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// dockerBridges are Docker's bridges by the names that it gives them.
var dockerBridges = []string{"docker+", "br-+"}

// ledBridges returns the networks with a bridge and their own gateway.
func ledBridges(v6 bool, networks []store.Network) []store.Network {
	return chosen(v6, networks, func(n store.Network) bool { return n.OwnGateway() && !n.Routed() })
}

// leadsOut reports whether Weft leads a network's endpoints out: encrypted ones may have
// Docker's gateway for that, internal ones have none.
func leadsOut(n store.Network) bool { return n.OwnGateway() && !n.Internal }

// gatewaysOf returns the gateways of a network of the family.
func gatewaysOf(v6 bool, n store.Network) (out []netip.Addr) {
	for _, s := range n.Subnets {
		if s.Gateway.IsValid() && s.Gateway.Is6() == v6 {
			out = append(out, s.Gateway)
		}
	}
	return out
}

// planLed makes a network's bridge its gateway: the host has the gateways' addresses on
// it, routes to it, and knows the neighbours that are its own.
func planLed(p Plan, b Bridge, n store.Network, local []store.Endpoint) {
	ports := slices.ContainsFunc(local, func(e store.Endpoint) bool { return !e.Left && len(e.Ports) > 0 && e.IPv4.IsValid() })
	b.Closed, b.Router = false, NewRouter(ports, append(gatewaysOf(false, n), gatewaysOf(true, n)...)...)
	p.Add(b)
	for _, s := range n.Subnets {
		p.Add(Route{VNI: n.VNI, Prefix: s.Pool, Link: b.Name})
	}
	for _, e := range local {
		for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
			if a.IsValid() && !e.Left {
				p.Add(Neigh{Link: b.Name, IP: a, MAC: e.MAC})
			}
		}
	}
}

// closedForward keeps networks out of which Weft does not lead, internal ones among them,
// to themselves: what is published on this host, by Weft or by Docker, is outside too, and
// the gateway's address is one of the host's.
func closedForward(v6 bool, networks []store.Network) (rules []string) {
	for _, n := range throughHost(v6, networks) {
		b := BridgeName(n.VNI)
		switch {
		case leadsOut(n):
		case !n.Routed():
			rules = append(rules, "-i "+b+" -j DROP", "-o "+b+" -j DROP")
		default:
			for _, a := range pools(v6, n) {
				rules = append(rules, fmt.Sprintf("-i %s+ -s %s -j DROP", vethPrefix, a), fmt.Sprintf("-o %s+ -d %s -j DROP", vethPrefix, a))
			}
		}
	}
	return rules
}

// closedInput keeps such networks from this host's own ports, where a process may hand on
// to what is published (Docker's docker-proxy does). They may ping it, and answer it.
// Bridges are closed to it anyway.
func closedInput(v6 bool, networks []store.Network) (rules []string) {
	icmp := map[bool]string{false: "icmp", true: "ipv6-icmp"}[v6]
	for _, n := range routedNetworks(v6, networks) {
		if leadsOut(n) {
			continue
		}
		for _, a := range pools(v6, n) {
			rules = append(rules, fmt.Sprintf("-i %s+ -s %s ! -p %s -m conntrack --ctstate NEW -j DROP", vethPrefix, a, icmp))
		}
	}
	return rules
}

// dockersForward leaves to Docker's rules, behind ours, what its bridges begin to send to
// published ports: they keep its own internal networks from these.
func dockersForward(v6 bool, networks []store.Network) (rules []string) {
	if len(throughHost(v6, networks)) == 0 {
		return nil
	}
	for _, from := range dockerBridges {
		rules = append(rules, "-i "+from+" -o "+LinkPrefix+"+ -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j RETURN")
	}
	return rules
}

// ledForward lets the endpoints of bridges with their own gateway out, and in what they
// asked for or what is published; between networks, and to and from Docker's own
// bridges, nothing else passes.
func ledForward(v6 bool, networks []store.Network) (rules []string) {
	led := slices.DeleteFunc(ledBridges(v6, networks), func(n store.Network) bool { return n.Internal })
	for _, way := range []string{"-o ", "-i "} {
		for _, n := range led {
			rules = append(rules, way+BridgeName(n.VNI)+" -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT")
		}
	}
	for _, n := range led {
		b := BridgeName(n.VNI)
		for _, to := range append([]string{LinkPrefix + "+"}, dockerBridges...) {
			rules = append(rules, "-i "+b+" -o "+to+" -j DROP")
		}
		for _, a := range pools(v6, n) {
			rules = append(rules, fmt.Sprintf("-i %s -s %s -j ACCEPT", b, a))
		}
	}
	return rules
}

// ledInput lets the endpoints of such bridges reach this host.
func ledInput(v6 bool, networks []store.Network) (rules []string) {
	for _, n := range ledBridges(v6, networks) {
		if !n.Internal {
			rules = append(rules, "-i "+BridgeName(n.VNI)+" -j RETURN")
		}
	}
	return rules
}

// ledTrack keeps what goes through such a bridge's gateway in connection tracking, which
// masquerading and published ports need.
func ledTrack(v6 bool, networks []store.Network) (rules []string) {
	for _, n := range ledBridges(v6, networks) {
		b := BridgeName(n.VNI)
		for _, gw := range gatewaysOf(v6, n) {
			rules = append(rules, fmt.Sprintf("-i %s -d %s -j RETURN", b, gw))
		}
		if !v6 {
			rules = append(rules, fmt.Sprintf("-i %s -d 127.0.0.0/8 -j DROP", b))
		}
		for _, from := range pools(v6, n) {
			for _, to := range pools(v6, n) {
				rules = append(rules, fmt.Sprintf("-i %s -s %s -d %s -j CT --notrack", b, from, to), fmt.Sprintf("-i %s -s %s -d %s -j RETURN", b, from, to))
			}
			rules = append(rules, fmt.Sprintf("-i %s -s %s -j RETURN", b, from))
		}
	}
	return rules
}
