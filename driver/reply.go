package driver

import (
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
	return JoinResponse{InterfaceName: InterfaceName{SrcName: store.ContainerLink(e.ID.HostLink()), DstPrefix: prefix, DstName: e.Ifname},
		// Docker does not know of the option internal.
		StaticRoutes: subnetRoutes(n, e), DisableGatewayService: n.Internal}
}

// subnetRoutes lead to the network's other subnets, which are on the same link.
func subnetRoutes(n store.Network, e store.Endpoint) []network.StaticRoute {
	const connected = 1 // libnetwork's types.CONNECTED
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
