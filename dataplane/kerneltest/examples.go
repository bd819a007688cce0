package kerneltest

import (
	"crypto/ecdh"
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// The underlay that a kernel under Suite must have.
const (
	UnderlayLink = "under0"
	UnderlayMTU  = 1500
)

// Addresses of the underlay's link, of both families, on one host.
var (
	Underlay4 = netip.MustParseAddr("192.0.2.1")
	Underlay6 = netip.MustParseAddr("2001:db8::1")
)

// Port is the UDP port of VXLAN in the examples.
const Port = 4797

// Example is a network as records tell it.
type Example struct {
	Name     string
	Snapshot store.Snapshot
	Underlay dataplane.Underlay
}

// Plan returns what the kernel must hold for the network.
func (e Example) Plan() (dataplane.Plan, error) {
	return dataplane.PlanNetwork(e.Snapshot, e.Underlay)
}

// HostPlan returns what the kernel must hold for the host.
func (e Example) HostPlan() dataplane.Plan {
	s := store.HostSnapshot{Self: e.Snapshot.Self, Peers: e.Snapshot.Peers}
	if n := e.Snapshot.Network; n != nil {
		s.Networks = append(s.Networks, *n)
		if n.Encrypted {
			s.Tunnels = s.Peers
		}
	}
	return dataplane.PlanHost(s, e.Underlay)
}

// Examples returns networks of all shapes, each with a VNI of its own.
func Examples() []Example {
	under4 := dataplane.Underlay{Address: Underlay4, Link: UnderlayLink, MTU: UnderlayMTU}
	under6 := dataplane.Underlay{Address: Underlay6, Link: UnderlayLink, MTU: UnderlayMTU}
	wide4, wide6 := under4, under6 // all peers are on the link
	wide4.Prefix, wide6.Prefix = netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")
	prog4, progWide := under4, wide4
	for _, u := range []*dataplane.Underlay{&prog4, &progWide} {
		u.Program, u.Ethernet = true, true
	}
	progWide.Flows = true
	v4, v6 := "10.1.0.0/24", "fd00:1::/64"
	noCheck := under4
	noCheck.NoChecksum, noCheck.Reason = true, "as the test has it"
	fixed := Network(4102, 2, 0, 0, under4, v4)
	fixed.Network.MTU = 1280
	empty := Network(4103, 0, 0, 0, under4, v4)
	return []Example{
		{"ipv4", Network(4096, 2, 2, 3, under4, v4), under4},
		{"ipv6", Network(4097, 2, 2, 3, under4, v6), under4},
		{"dual stack", Network(4098, 3, 2, 2, under4, v4, v6), under4},
		{"ipv6 underlay", Network(4099, 2, 2, 2, under6, v4, v6), under6},
		{"no underlay", Network(4100, 2, 1, 1, dataplane.Underlay{}, v4), dataplane.Underlay{}},
		{"no peers", Network(4101, 1, 0, 0, under4, v4), under4},
		{"fixed mtu", fixed, under4},
		{"no endpoints", empty, under4},
		{"no checksum offload", Network(4104, 1, 1, 1, noCheck, v4), noCheck},
		{"largest vni", Network(store.MaxVNI, 1, 1, 1, under4, v4), under4},
		{"routed", Routed(Network(4105, 2, 2, 3, wide4, v4)), wide4},
		{"routed through tunnels", Routed(Network(4106, 2, 2, 3, under4, v4, v6)), under4},
		{"routed dual stack", Routed(Network(4107, 2, 2, 2, wide4, v4, v6)), wide4},
		{"routed, ipv6 underlay", Routed(Network(4108, 2, 2, 2, under6, v4, v6)), under6},
		{"routed, ipv6 link", Routed(Network(4109, 1, 2, 2, wide6, v4, v6)), wide6},
		{"routed, no underlay", Routed(Network(4110, 2, 1, 1, dataplane.Underlay{}, v4)), dataplane.Underlay{}},
		{"routed, no endpoints", Routed(Network(4111, 0, 0, 0, wide4, v4)), wide4},
		{"own gateway", Led(Network(4117, 2, 2, 2, under4, v4)), under4},
		{"own gateway, dual stack", Led(Network(4118, 2, 2, 2, under4, v4, v6)), under4},
		{"program", Network(4119, 2, 2, 2, prog4, v4, v6), prog4},
		{"program, services", Served(Network(4121, 2, 2, 2, prog4, v4)), prog4},
		{"program, routed", Routed(Network(4120, 2, 2, 2, progWide, v4)), progWide},
		{"encrypted", Encrypted(Network(4112, 2, 2, 3, under4, v4), 1), under4},
		{"encrypted, routed, dual stack", Encrypted(Routed(Network(4113, 2, 2, 2, under4, v4, v6)), 1), under4},
		{"encrypted, ipv6 underlay", Encrypted(Network(4114, 1, 2, 2, under6, v6), 1), under6},
		{"encrypted, keys change", Encrypted(Network(4115, 2, 2, 2, under4, v4), 2), under4},
		{"encrypted, no underlay", Encrypted(Network(4116, 2, 1, 1, dataplane.Underlay{}, v4), 1), dataplane.Underlay{}},
	}
}

// Served gives the network a service of all endpoints, and one of nobody.
func Served(s store.Snapshot) store.Snapshot {
	all := []netip.Addr{netip.MustParseAddr("10.1.0.250")} // whose endpoint is not known yet
	for _, e := range s.Endpoints {
		all = append(all, e.IPv4.Addr())
	}
	for _, e := range s.Remote {
		all = append(all, e.IPv4)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	s.Served = true
	s.Services = []store.Service{{VNI: s.VNI, VIP: netip.MustParseAddr("10.1.0.253"), Backends: all}, {VNI: s.VNI, VIP: netip.MustParseAddr("10.1.0.254")}}
	return s
}

// Led gives the network a gateway of its own on its bridge, and publishes a port.
func Led(s store.Snapshot) store.Snapshot {
	s.Network.GatewayWeft = true
	s.Endpoints[0].Ports = []store.Port{{Proto: "tcp", Port: 80, HostPort: 8080}}
	return s
}

// TunnelPort is the UDP port of WireGuard in the examples.
const TunnelPort = 4798

// Encrypted makes the network an encrypted one, of hosts with that many keys each.
func Encrypted(s store.Snapshot, keys int) store.Snapshot {
	s.Network.Encrypted = true
	s.Self.Tunnel = TunnelOf(s.Self.ID, keys)
	for i := range s.Peers {
		s.Peers[i].Tunnel = TunnelOf(s.Peers[i].ID, keys)
	}
	return s
}

// TunnelOf returns the tunnel of a host in the examples.
func TunnelOf(host store.HostID, keys int) store.Tunnel {
	t := store.Tunnel{Port: TunnelPort}
	for i := range keys {
		t.Keys = append(t.Keys, publicKey(privateKey(host, i)))
	}
	return t
}

func privateKey(host store.HostID, i int) store.WGKey {
	return sha256.Sum256(fmt.Appendf(nil, "%s %d", host, i))
}

func publicKey(private store.WGKey) store.WGKey {
	k, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		panic(err) // only the length can be wrong
	}
	return store.WGKey(k.PublicKey().Bytes())
}

// WireGuardKey returns the private key of a public one of the hosts in the examples.
func WireGuardKey(public store.WGKey) (store.WGKey, bool) {
	for _, host := range []store.HostID{"self", "peer0", "peer1", "peer2", "host1", "host2"} {
		for i := range 2 {
			if private := privateKey(host, i); publicKey(private) == public {
				return private, true
			}
		}
	}
	return store.WGKey{}, false
}

// Routed makes the network a routed one.
func Routed(s store.Snapshot) store.Snapshot {
	s.Network.Mode = store.ModeRouted
	return s
}

// Network returns a network with that many endpoints of this host, peers, and
// endpoints of each peer.
func Network(v store.VNI, local, peers, remote int, u dataplane.Underlay, pools ...string) store.Snapshot {
	s := store.Snapshot{VNI: v, Self: store.Host{ID: "self", Address: u.Address, DataPort: Port}}
	n := store.Network{ID: store.NetworkID(fmt.Sprintf("%064x", uint32(v))), VNI: v, Mode: store.ModeVXLAN}
	for _, p := range pools {
		prefix := netip.MustParsePrefix(p)
		n.Subnets = append(n.Subnets, store.Subnet{Pool: prefix, Gateway: prefix.Addr().Next()})
	}
	s.Network = &n
	next := 2 // of the address
	for range local {
		s.Endpoints = append(s.Endpoints, endpoint(n, next))
		next++
	}
	for i := range peers {
		p := store.Peer{Host: store.Host{ID: store.HostID(fmt.Sprintf("peer%d", i)), Address: peerAddress(u, i), DataPort: Port}}
		s.Peers = append(s.Peers, p)
		for range remote {
			s.Remote = append(s.Remote, store.RemoteEndpoint{Owner: p.ID, SharedEndpoint: endpoint(n, next).Shared()})
			next++
		}
	}
	return s
}

func peerAddress(u dataplane.Underlay, i int) netip.Addr {
	if u.Address.Is6() {
		b := Underlay6.As16()
		b[14], b[15] = byte(1+i>>8), byte(i)
		return netip.AddrFrom16(b)
	}
	return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
}

// endpoint returns the endpoint with the i-th address of each pool.
func endpoint(n store.Network, i int) store.Endpoint {
	e := store.Endpoint{ID: store.EndpointID(fmt.Sprintf("%032x%032x", uint32(n.VNI), i)), Network: n.ID, VNI: n.VNI,
		MAC: store.DeriveMAC("example", fmt.Sprint(n.VNI), fmt.Sprint(i)), OwnMAC: true}
	for _, s := range n.Subnets {
		b := s.Pool.Addr().As16()
		b[14], b[15] = b[14]+byte(i>>8), b[15]+byte(i)
		p := netip.PrefixFrom(netip.AddrFrom16(b).Unmap(), s.Pool.Bits())
		if p.Addr().Is4() {
			e.IPv4 = p
		} else {
			e.IPv6 = p
		}
	}
	return e
}
