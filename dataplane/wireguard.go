package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// TunnelNames are the host's WireGuard devices: of the first keys, and of the last
// while a host changes its key (store.Tunnel).
var TunnelNames = [2]string{tunnelPrefix + "0", tunnelPrefix + "1"}

// TunnelAlias is the alias of both. They belong to no network.
const TunnelAlias = AliasPrefix + "wireguard"

// keepalive keeps NAT on the way open and shows that the way works, in seconds
// (wg(8) recommends 25).
const keepalive = 25

// WireGuard is a device of the host that encrypts, for all its encrypted networks. What
// the kernel does not have a module for, a device in this process does.
type WireGuard struct {
	Name   string
	Public store.WGKey // key
	Port   uint16      // UDP
	MTU    int         // bytes
	Up     bool
	// Program: the port program takes what the device decrypts to its endpoint.
	Program bool
}

// TunnelPeer is a host to which a device encrypts. Its allowed addresses come with the
// routes through the device (Route.Peers).
type TunnelPeer struct {
	Device    string
	Public    store.WGKey // key
	Endpoints string      // where it may be found, the likeliest first, separated by commas
	// Talks: a handshake is not older than three minutes, so the endpoint in use is
	// right whatever it is: it may have been learned from the peer's packets.
	Talks bool
	// Stray: it has allowed addresses to which no route of ours leads.
	Stray bool
	// Odd: it has a preshared key, or another keepalive.
	Odd bool
}

func (WireGuard) object()  {}
func (TunnelPeer) object() {}

// Key implements Object.
func (o WireGuard) Key() Key { return Key{Kind: KindWireGuard, Name: o.Name} }

// Key implements Object.
func (o TunnelPeer) Key() Key { return Key{Kind: KindPeer, Name: o.Device + " " + o.Public.String()} }

func (o WireGuard) String() string {
	s := fmt.Sprintf("link %s wireguard key %s port %d mtu %d %s alias %q", o.Name, o.Public, o.Port, o.MTU, updown(o.Up), TunnelAlias)
	if o.Program {
		s += " program"
	}
	return s
}

func (o TunnelPeer) String() string {
	s := fmt.Sprintf("wg %s peer %s endpoint %s persistent-keepalive %d", o.Device, o.Public, o.Endpoints, keepalive)
	if o.Stray {
		s += " (allowed addresses without a route)"
	}
	if o.Odd {
		s += " (a preshared key, or another keepalive)"
	}
	return s
}

// TunnelOverhead returns the bytes that WireGuard adds to a packet: its header and tag
// 32, UDP 8 and the outer IP header.
func TunnelOverhead(underlay netip.Addr) int {
	if underlay.Is6() {
		return 80
	}
	return 60
}

// tunnelled reports whether two hosts can encrypt to each other.
func tunnelled(a, b store.Host) bool {
	return len(a.Tunnel.Keys) > 0 && len(b.Tunnel.Keys) > 0 && a.Tunnel.Keys[0] != b.Tunnel.Keys[0]
}

// across reports whether a NAT lies between two hosts, which takes none but WireGuard's
// packets as they are.
func across(self store.Host, peer store.Peer, u Underlay) bool {
	return self.Public != peer.Public && !u.Near(peer)
}

// TunnelPeers returns the peers to which this host has a tunnel: those that share an
// encrypted network, and those behind a NAT that share a routed one.
func TunnelPeers(s store.HostSnapshot, u Underlay) []store.Peer {
	out := slices.Clone(s.Tunnels)
	for _, p := range s.Routed {
		if across(s.Self, p, u) && !slices.ContainsFunc(out, func(o store.Peer) bool { return o.ID == p.ID }) {
			out = append(out, p)
		}
	}
	return out
}

// planTunnels adds the devices and their peers. The second device is there while this
// host or a peer of it changes its key.
func planTunnels(p Plan, s store.HostSnapshot, u Underlay) {
	self, peers := s.Self.Tunnel, TunnelPeers(s, u)
	if !tunnels(s, u) || !u.Address.IsValid() || len(self.Keys) == 0 {
		return
	}
	mtu := tunnelledMTU(u)
	device := func(way int) {
		p.Add(WireGuard{Name: TunnelNames[way], Public: self.Key(way), Port: self.Port + uint16(way), MTU: mtu, Up: true,
			Program: u.Program && slices.ContainsFunc(s.Networks, fast)})
	}
	device(0)
	if self.Rotating() {
		device(1)
	}
	for _, peer := range peers {
		if !tunnelled(s.Self, peer.Host) {
			continue
		}
		ways := 1
		if self.Rotating() || peer.Tunnel.Rotating() {
			device(1)
			ways = 2
		}
		for way := range ways {
			p.Add(TunnelPeer{Device: TunnelNames[way], Public: peer.Tunnel.Key(way), Endpoints: candidates(s.Self, peer, uint16(way), u)})
		}
	}
}

// candidates returns where a peer may be found. Hosts behind one NAT, or on one link,
// prefer the inside.
func candidates(self store.Host, peer store.Peer, way uint16, u Underlay) string {
	all := []netip.Addr{peer.Public, peer.Address}
	if self.Inside(peer.Host, u.Near(peer)) {
		slices.Reverse(all)
	}
	var out []string
	for _, a := range all {
		if a.IsValid() {
			out = append(out, netip.AddrPortFrom(a, peer.Tunnel.Port+way).String())
		}
	}
	return strings.Join(slices.Compact(out), ",")
}

func encrypted(networks []store.Network) bool { return slices.ContainsFunc(networks, isEncrypted) }

func isEncrypted(n store.Network) bool { return n.Encrypted }

// tunnels reports whether this host needs a tunnel.
func tunnels(s store.HostSnapshot, u Underlay) bool {
	return s.Tunnel || encrypted(s.Networks) || len(TunnelPeers(s, u)) > 0
}

func tunnelledMTU(u Underlay) int {
	if u.MTU > TunnelOverhead(u.Address)+minMTU {
		return u.MTU - TunnelOverhead(u.Address)
	}
	return 1500 - TunnelOverhead(u.Address)
}

// Fits returns why a network cannot be run on the underlay, or nil.
func Fits(n store.Network, u Underlay) error {
	if !u.Address.IsValid() {
		return nil
	}
	auto := n
	auto.MTU = 0
	room := InnerMTU(auto, store.Host{}, nil, u)
	if n.Encrypted && n.MTU > room {
		return fmt.Errorf("option mtu: %d does not fit: WireGuard adds %d bytes, and link %s has %d; choose at most %d", n.MTU, TunnelOverhead(u.Address), u.Link, u.MTU, room)
	}
	if room < 1280 && len(pools(true, n)) > 0 {
		return fmt.Errorf("IPv6 needs packets of 1280 bytes, and %d of the %d of link %s are left; raise its MTU, or give the network no IPv6 subnet", room, u.MTU, u.Link)
	}
	return nil
}

// planEncrypted adds the ways to the peers' endpoints of an encrypted network.
func planEncrypted(p Plan, s store.Snapshot, u Underlay) {
	// Nothing is on it: its alias keeps the network for a host that lost its database.
	p.Add(Bridge{Name: BridgeName(s.Network.VNI), Alias: NetworkAlias(*s.Network), MAC: store.DeriveMAC("bridge", string(s.Self.ID), BridgeName(s.Network.VNI)), MTU: MTU(*s.Network, u), Closed: true})
	if !u.Address.IsValid() {
		return
	}
	planWays(p, s, u, func(peer store.Peer, a netip.Addr) Route { return planTunnelled(p, s, peer, a, u) })
}

// planTunnelled makes the address of a peer's endpoint known to the program, and returns
// the route.
func planTunnelled(p Plan, s store.Snapshot, peer store.Peer, a netip.Addr, u Underlay) Route {
	r := tunnelRoute(s.Self, peer.Host)
	planDest(p, Dest{VNI: s.Network.VNI, IP: a, Link: r.Link, Tunnel: true}, *s.Network, u)
	return r
}

// tunnelRoute returns a route through the tunnel to a peer, without network and prefix.
func tunnelRoute(self, peer store.Host) Route {
	r := Route{Link: TunnelNames[0], Peers: [2]store.WGKey{peer.Tunnel.Key(0)}}
	if self.Tunnel.Rotating() || peer.Tunnel.Rotating() {
		r.Peers[1] = peer.Tunnel.Key(1)
		if self.Tunnel.Last || peer.Tunnel.Last {
			r.Link = TunnelNames[1]
		}
	}
	return r
}

// encryptedForward lets the endpoints of an encrypted network talk among themselves, on
// this host and through the tunnels, and nowhere else: also what belongs to a known
// connection must not come or go plain.
func encryptedForward(v6 bool, networks []store.Network) (rules []string) {
	for _, n := range chosen(v6, networks, isEncrypted) {
		for _, a := range pools(v6, n) {
			for _, b := range pools(v6, n) {
				for _, way := range [][2]string{{vethPrefix, vethPrefix}, {vethPrefix, tunnelPrefix}, {tunnelPrefix, vethPrefix}} {
					rules = append(rules, fmt.Sprintf("-i %s+ -o %s+ -s %s -d %s -j ACCEPT", way[0], way[1], a, b))
				}
				rules = append(rules, fmt.Sprintf("-s %s -d %s -j DROP", a, b))
			}
		}
	}
	return rules
}

// encryptedGuard drops plain packets of an encrypted network on arrival, beside what
// encryptedForward drops.
func encryptedGuard(v6 bool, networks []store.Network) (rules []string) {
	for _, n := range chosen(v6, networks, isEncrypted) {
		for _, a := range pools(v6, n) {
			rules = append(rules, fmt.Sprintf("! -i %s+ -s %s -j DROP", LinkPrefix, a), fmt.Sprintf("! -i %s+ -d %s -j DROP", LinkPrefix, a))
		}
	}
	return rules
}
