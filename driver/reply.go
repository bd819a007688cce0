package driver

import (
	"net/netip"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// Capabilities is the answer to GetCapabilities. It has the field that the
// helpers' type lacks.
type Capabilities struct {
	Scope             string
	ConnectivityScope string
	GwAllocChecker    bool
}

// GwAllocCheckRequest asks whether Docker may leave out the gateway's address
// (engine 28 and newer). We never say so: hosts with older engines keep it.
type GwAllocCheckRequest struct{ Options map[string]any }

// GwAllocCheckResponse is the answer to it.
type GwAllocCheckResponse struct{ SkipIPv4, SkipIPv6 bool }

// InterfaceName is network.InterfaceName with the exact name in the container,
// which the newest engine honours and older ones ignore.
type InterfaceName struct {
	SrcName   string
	DstPrefix string
	DstName   string `json:",omitempty"`
}

// JoinResponse is the answer to Join. Without a gateway Docker adds its own way
// out (docker_gwbridge) and publishes ports there; not so for internal networks.
type JoinResponse struct {
	InterfaceName         InterfaceName
	Gateway               string
	GatewayIPv6           string
	StaticRoutes          []network.StaticRoute
	DisableGatewayService bool
}

func endpointReply(e store.Endpoint) network.CreateEndpointResponse {
	if !e.OwnMAC {
		return network.CreateEndpointResponse{Interface: &network.EndpointInterface{}}
	}
	return network.CreateEndpointResponse{Interface: &network.EndpointInterface{MacAddress: e.MAC.String()}}
}

func joinReply(n store.Network, e store.Endpoint) JoinResponse {
	prefix := n.Ifname
	if prefix == "" {
		prefix = "eth"
	}
	r := JoinResponse{InterfaceName: InterfaceName{SrcName: store.ContainerLink(e.ID.HostLink()), DstPrefix: prefix, DstName: e.Ifname},
		DisableGatewayService: n.Internal}
	if n.Routed() {
		r.StaticRoutes = routedRoutes(n, e)
	} else {
		r.StaticRoutes = subnetRoutes(n, e)
	}
	if !n.OwnGateway() {
		return r
	}
	for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
		switch gw := n.GatewayOf(a); {
		case n.Internal || !gw.IsValid():
		case gw.Is4():
			r.Gateway = gw.String()
		default:
			r.GatewayIPv6 = gw.String()
		}
	}
	return r
}

// Kinds of static routes (libnetwork's types.NEXTHOP and CONNECTED).
const (
	nextHop   = 0
	connected = 1
)

// subnetRoutes lead to the network's other subnets, which are on the same link.
func subnetRoutes(n store.Network, e store.Endpoint) []network.StaticRoute {
	var out []network.StaticRoute
	for _, s := range n.Subnets {
		own := e.IPv4
		if s.Pool.Addr().Is6() {
			own = e.IPv6
		}
		if own.IsValid() && !s.Pool.Contains(own.Addr()) {
			out = append(out, network.StaticRoute{Destination: s.Pool.String(), RouteType: connected})
		}
	}
	return out
}

// routedRoutes lead to all of the network by its gateway. The container's address has
// the length of its pool, so the kernel takes the whole pool to be on the link; its two
// halves are more exact. Then the gateway is the only neighbour, and nobody need answer
// for others.
func routedRoutes(n store.Network, e store.Endpoint) []network.StaticRoute {
	var direct, out []network.StaticRoute
	for _, own := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
		gw := n.GatewayOf(own)
		if !gw.IsValid() {
			continue
		}
		direct = append(direct, network.StaticRoute{Destination: netip.PrefixFrom(gw, gw.BitLen()).String(), RouteType: connected})
		for _, s := range n.Subnets {
			switch {
			case s.Pool.Addr().Is6() != own.Is6():
			case s.Pool.Contains(own) && s.Pool.Bits() >= own.BitLen()-1: // two addresses
			case s.Pool.Contains(own):
				for _, half := range halves(s.Pool) {
					out = append(out, network.StaticRoute{Destination: half.String(), RouteType: nextHop, NextHop: gw.String()})
				}
			default:
				out = append(out, network.StaticRoute{Destination: s.Pool.String(), RouteType: nextHop, NextHop: gw.String()})
			}
		}
	}
	return append(direct, out...)
}

// halves returns the two halves of a prefix.
func halves(p netip.Prefix) [2]netip.Prefix {
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(b)
	return [2]netip.Prefix{netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(upper, p.Bits()+1)}
}
