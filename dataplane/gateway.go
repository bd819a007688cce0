package dataplane

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// ledBridges returns the networks with a bridge and their own gateway.
func ledBridges(v6 bool, networks []store.Network) []store.Network {
	return chosen(v6, networks, func(n store.Network) bool { return n.OwnGateway() && !n.Routed() })
}

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

// ledForward lets the endpoints of bridges with their own gateway out, and in what they
// asked for or what is published; between networks, and to and from Docker's own
// bridges, nothing else passes.
func ledForward(v6 bool, networks []store.Network) (rules []string) {
	led := ledBridges(v6, networks)
	for _, n := range led {
		rules = append(rules, "-o "+BridgeName(n.VNI)+" -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT")
	}
	for _, n := range led {
		b := BridgeName(n.VNI)
		rules = append(rules, "-i "+b+" -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT")
		if n.Internal {
			continue
		}
		rules = append(rules, "-i "+b+" -o "+LinkPrefix+"+ -j DROP", "-i "+b+" -o docker+ -j DROP", "-i "+b+" -o br-+ -j DROP")
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
