package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// Names of what the host holds once, for all networks.
const (
	setPeers4    = "weft-peers4"
	setPeers6    = "weft-peers6"
	chainPrerout = "WEFT-PREROUTING"
	chainOutput  = "WEFT-OUTPUT"
	chainInput   = "WEFT-INPUT"
	chainForward = "WEFT-FORWARD"
	chainPostrt  = "WEFT-POSTROUTING"
	chainPorts   = "WEFT-PORTS"
	chainClamp   = "WEFT-MSS"
)

// SetNames are the sets of the peers' addresses, by family.
var SetNames = [2]string{setPeers4, setPeers6}

// minMTU is the smallest MTU that IPv4 allows (RFC 791).
const minMTU = 68

// planClamp lets TCP agree on segments that fit the way, where hosts route: not every
// path brings the message that a packet was too large.
func planClamp(p Plan, v6 bool, networks []store.Network) {
	if len(throughHost(v6, networks)) == 0 {
		return
	}
	var rules []string
	for _, link := range []string{vethPrefix + "+", bridgePrefix + "+"} {
		for _, way := range []string{"-i ", "-o "} {
			rules = append(rules, way+link+" -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu")
		}
	}
	p.Add(NewChain("mangle", v6, chainClamp, rules...))
	p.Add(Jump{"mangle", v6, "FORWARD", chainClamp})
}

// Overhead returns the bytes that VXLAN adds to a packet: inner Ethernet 14,
// VXLAN 8, UDP 8 and the outer IP header (RFC 7348).
func Overhead(underlay netip.Addr) int {
	if underlay.Is6() {
		return 70
	}
	return 50
}

// MTU returns the MTU of a network's own links in bytes: the explicit one, else what the
// underlay leaves to a VXLAN device or to WireGuard, else Ethernet's minus the overhead;
// on a routed network the underlay's.
func MTU(n store.Network, u Underlay) int {
	switch {
	case n.MTU != 0:
		return n.MTU
	case n.Encrypted:
		return tunnelledMTU(u)
	case n.Mode == store.ModeRouted && u.MTU > minMTU:
		return u.MTU
	case n.Mode == store.ModeRouted:
		return 1500
	}
	return tunnelMTU(u)
}

// InnerMTU returns the MTU of the containers' interfaces in bytes: the explicit one, else
// the lowest of the ways to all peers, of which each has told the MTU of its own link.
func InnerMTU(n store.Network, self store.Host, around []store.Peer, u Underlay) int {
	if n.MTU != 0 {
		return n.MTU
	}
	// One family goes through a tunnel where hosts route and have addresses of the other.
	mixed := n.Mode == store.ModeRouted && !n.Encrypted && u.Address.IsValid() && len(pools(u.Address.Is4(), n)) > 0
	lowest := MTU(n, u)
	if mixed {
		lowest = min(lowest, tunnelMTU(u))
	}
	for _, p := range around {
		link := u
		if p.MTU != 0 {
			link.MTU = min(u.MTU, p.MTU)
		}
		way := MTU(n, link)
		switch {
		case n.Mode != store.ModeRouted || n.Encrypted:
		case across(self, p, u):
			way = tunnelledMTU(link)
		case mixed || !u.Near(p):
			way = tunnelMTU(link)
		}
		lowest = min(lowest, way)
	}
	return lowest
}

func tunnelMTU(u Underlay) int {
	if u.MTU > Overhead(u.Address)+minMTU {
		return u.MTU - Overhead(u.Address)
	}
	return 1500 - Overhead(u.Address)
}

// PlanNetwork returns what the kernel must hold for one network: nothing when the
// host does not run it.
func PlanNetwork(s store.Snapshot, u Underlay) (Plan, error) {
	p, _, err := planNetwork(s, u, nil, true)
	return p, err
}

// planNetwork is PlanNetwork for a kernel that holds something already, by which is
// decided whose an address is (settle), and returns what was decided. heard: the hosts
// have told what they have.
func planNetwork(s store.Snapshot, u Underlay, have Plan, heard bool) (p Plan, contests []Contest, err error) {
	// Three objects an endpoint; a map that grows costs more than what it holds.
	p = make(Plan, 3*len(s.Remote)+2*len(s.Endpoints)+len(s.Peers)+2)
	if s.Network == nil {
		return p, nil, nil
	}
	n := *s.Network
	s.Remote = given(s.Remote, n)
	if !heard {
		s.Remote = unheardOf(s, have)
	}
	s.Remote, contests = settle(s, u, have)
	s.Services = slices.DeleteFunc(slices.Clone(s.Services), func(o store.Service) bool { return !n.Gives(o.VIP) })
	if n.Routed() {
		planRouted(p, s, u, have)
		return p, contests, nil
	}
	if n.Mode != store.ModeVXLAN {
		return nil, nil, fmt.Errorf("network %s: mode %q is not known to this version", n.ID, n.Mode)
	}
	bridge, mtu := BridgeName(n.VNI), MTU(n, u)
	b := Bridge{Name: bridge, Alias: NetworkAlias(n), MAC: store.DeriveMAC("bridge", string(s.Self.ID), bridge), MTU: mtu, Up: true, Closed: true}
	if n.OwnGateway() {
		planLed(p, b, n, s.Endpoints)
	} else {
		p.Add(b)
	}
	inner := InnerMTU(n, s.Self, s.Around, u)
	for _, e := range s.Endpoints {
		planEndpoint(p, s, e, u, inner)
	}
	planServices(p, s, u)
	// Without an underlay the network works on this host.
	if !u.Address.IsValid() {
		return p, contests, nil
	}
	vx := VXLANName(n.VNI)
	p.Add(VXLAN{Name: vx, Alias: VXLANAlias(n.VNI), Bridge: bridge, VNI: n.VNI, Local: u.Address, Underlay: u.Link,
		Port: s.Self.DataPort, MTU: mtu, MAC: store.DeriveMAC("vxlan", string(s.Self.ID), vx), Up: true, Suppress: true, NoChecksum: u.NoChecksum})
	planRemote(p, s, u, bridge, vx)
	return p, contests, nil
}

func planEndpoint(p Plan, s store.Snapshot, e store.Endpoint, u Underlay, inner int) {
	if e.Left {
		return
	}
	veth := VethName(e.ID)
	p.Add(Veth{Name: veth, Alias: EndpointAlias(e), Bridge: BridgeName(s.VNI), MAC: e.MAC, MTU: inner, Up: true, Joined: e.Sandbox != "",
		Hairpin: len(e.Ports) > 0, Program: portOf(s, e, u, inner)})
	p.Add(FDB{Link: veth, MAC: e.MAC, Master: true})
	planLocalDests(p, s, e, u)
}

// planRemote adds what is needed to reach the peers' endpoints.
func planRemote(p Plan, s store.Snapshot, u Underlay, bridge, vx string) {
	peers := reached(s, u)
	for _, peer := range peers {
		p.Add(FDB{Link: vx, Dst: peer.Address})
	}
	for _, e := range s.Remote {
		peer, ok := peers[e.Owner]
		if !ok || e.MAC.IsZero() {
			continue
		}
		p.Add(FDB{Link: vx, MAC: e.MAC, Dst: peer.Address})
		p.Add(FDB{Link: vx, MAC: e.MAC, Master: true})
		planDest(p, Dest{VNI: s.VNI, MAC: e.MAC, Peer: peer.Address, Direct: u.Prefix.Contains(peer.Address)}, *s.Network, u)
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			// The kernel takes no IPv6 neighbours on a bridge that is closed
			// to IPv6: neighbour solicitations go to the peers instead.
			if a.Is4() {
				p.Add(Neigh{Link: bridge, IP: a, MAC: e.MAC})
			}
		}
	}
}

// reachable returns the peers that can be reached from the underlay's address without
// a tunnel through a NAT.
func reachable(s store.Snapshot, u Underlay) []store.Peer {
	return slices.DeleteFunc(slices.Clone(s.Peers), func(p store.Peer) bool {
		return p.Address == u.Address || p.Address.Is4() != u.Address.Is4() || across(s.Self, p, u)
	})
}

// given returns the endpoints of peers without addresses that the network does not give:
// else a peer could draw to itself what is for any address, of the internet or of another
// network.
func given(remote []store.RemoteEndpoint, n store.Network) []store.RemoteEndpoint {
	foreign := func(e store.RemoteEndpoint) bool { return n.Foreign(e.SharedEndpoint).IsValid() }
	if !slices.ContainsFunc(remote, foreign) {
		return remote
	}
	remote = slices.Clone(remote)
	for i := range remote {
		for _, a := range []*netip.Addr{&remote[i].IPv4, &remote[i].IPv6} {
			if !n.Gives(*a) {
				*a = netip.Addr{}
			}
		}
	}
	return remote
}

// PlanHost returns what the kernel must hold once for all networks: the set of
// peers, the chains that guard the underlay and separate the networks, and the
// jumps to them. A host without networks holds nothing.
func PlanHost(s store.HostSnapshot, u Underlay) Plan {
	p := Plan{}
	if len(s.Networks) == 0 {
		return p
	}
	// Through a NAT no VXLAN comes from a peer as it was sent: whoever has its address
	// here, which may be a private one, is somebody else. So is who has this host's.
	s.Peers = slices.DeleteFunc(slices.Clone(s.Peers), func(p store.Peer) bool { return p.Address == u.Address || across(s.Self, p, u) })
	var peers4, peers6 []string
	for _, peer := range s.Peers {
		switch {
		case !peer.Address.IsValid():
		case peer.Address.Is4():
			peers4 = append(peers4, peer.Address.String())
		default:
			peers6 = append(peers6, peer.Address.String())
		}
	}
	p.Add(peerSet(false, peers4))
	p.Add(peerSet(true, peers6))
	for _, v6 := range []bool{false, true} {
		planGuard(p, v6, s, u)
		planForward(p, v6, s, u)
		planRouter(p, v6, s)
		planClamp(p, v6, s.Networks)
	}
	planTunnels(p, s, u)
	planProgram(p, s, u)
	return p
}

func peerSet(v6 bool, members []string) Set {
	return Set{Name: peerSetName(v6), V6: v6, Members: joinMembers(members)}
}

func peerSetName(v6 bool) string {
	if v6 {
		return setPeers6
	}
	return setPeers4
}

func joinMembers(members []string) string {
	slices.Sort(members)
	return strings.Join(slices.Compact(members), ",")
}

// planGuard lets VXLAN in only from known peers on the underlay's link. It stands
// twice, in raw and in filter, so that it holds while either table is flushed; raw
// also keeps the tunnel out of connection tracking.
func planGuard(p Plan, v6 bool, s store.HostSnapshot, u Underlay) {
	set := peerSetName(v6)
	vxlan := fmt.Sprintf("-p udp -m udp --dport %d", s.Self.DataPort)
	var trusted []string
	if u.Address.IsValid() && u.Address.Is6() == v6 {
		trusted = []string{fmt.Sprintf("-i %s %s -m set --match-set %s src", u.Link, vxlan, set)}
	}
	raw, in := leakGuard(v6, s, u), []string(nil)
	for _, t := range trusted {
		raw = append(raw, t+" -j CT --notrack", t+" -j RETURN")
		in = append(in, t+" -j ACCEPT")
	}
	// Only what is for this host: containers may use the port among themselves,
	// and with br_netfilter raw sees their frames too. Those need no connection
	// tracking either: nothing inside a network is translated.
	raw = append(raw, vxlan+" -m addrtype ! --dst-type UNICAST -j DROP")
	raw = append(raw, ledTrack(v6, s.Networks)...)
	raw = append(raw, "-i "+bridgePrefix+"+ -j CT --notrack")
	if len(routedNetworks(v6, s.Networks)) > 0 {
		raw = append(raw, routedGuard(v6)...)
	}
	raw = append(raw, encryptedGuard(v6, s.Networks)...)
	raw = append(raw, routedTrack(v6, s)...)
	if tunnels(s, u) { // from anywhere: it answers to nobody but its peers
		in = append(in, fmt.Sprintf("-p udp -m udp --dport %d:%d -j ACCEPT", s.Self.Tunnel.Port, s.Self.Tunnel.Port+1), "-i "+tunnelPrefix+"+ -j DROP")
	}
	in = append(in, vxlan+" -j DROP")
	in = append(in, ledInput(v6, s.Networks)...)
	in = append(in, closedInput(v6, s.Networks)...)
	in = append(in, "-i "+bridgePrefix+"+ -j DROP")
	p.Add(NewChain("raw", v6, chainPrerout, raw...))
	p.Add(NewChain("raw", v6, chainOutput, vxlan+" -j CT --notrack"))
	p.Add(NewChain("filter", v6, chainInput, in...))
	p.Add(Jump{"raw", v6, "PREROUTING", chainPrerout})
	p.Add(Jump{"raw", v6, "OUTPUT", chainOutput})
	p.Add(Jump{"filter", v6, "INPUT", chainInput})
}

// leakGuard drops VXLAN that this host would forward to a peer for somebody who is not on
// the underlay's link: a container with a way out. Masqueraded, or with an address that it
// made up, it would come to the peer as from a host that the peer knows. A peer that takes
// VXLAN at another port closes that one at its own address alone: what it tells must not
// close a service of others. It stands twice, like planGuard: Docker's own rules may
// accept in filter before ours.
func leakGuard(v6 bool, s store.HostSnapshot, u Underlay) []string {
	elsewhere := ""
	if u.Link != "" {
		elsewhere = "! -i " + u.Link + " "
	}
	drop := func(port uint16, to string) string {
		return fmt.Sprintf("%s-p udp -m udp --dport %d %s -j DROP", elsewhere, port, to)
	}
	var others []string
	for _, peer := range s.Peers {
		// Port 0: a record that does not tell.
		if peer.DataPort != 0 && peer.DataPort != s.Self.DataPort && peer.Address.IsValid() && peer.Address.Is6() == v6 {
			others = append(others, drop(peer.DataPort, "-d "+peer.Address.String()))
		}
	}
	slices.Sort(others)
	return append([]string{drop(s.Self.DataPort, "-m set --match-set "+peerSetName(v6)+" dst")}, slices.Compact(others)...)
}

// planForward lets each network talk within itself, also where Docker's FORWARD
// policy is DROP and br_netfilter shows bridged frames to iptables, and keeps
// everything else off the bridges.
func planForward(p Plan, v6 bool, s store.HostSnapshot, u Underlay) {
	var within []string
	for _, n := range s.Networks {
		if !n.Routed() {
			b := BridgeName(n.VNI)
			within = append(within, fmt.Sprintf("-i %s -o %s -j ACCEPT", b, b))
		}
	}
	slices.Sort(within)
	rules := append(leakGuard(v6, s, u), within...)
	rules = append(rules, routedWithin(v6, s.Networks, u)...)
	rules = append(rules, closedForward(v6, s.Networks)...)
	rules = append(rules, dockersForward(v6, s.Networks)...)
	rules = append(rules, ledForward(v6, s.Networks)...)
	rules = append(rules, "-i "+bridgePrefix+"+ -j DROP", "-o "+bridgePrefix+"+ -j DROP")
	rules = append(rules, routedForward(v6, s.Networks)...)
	p.Add(NewChain("filter", v6, chainForward, rules...))
	p.Add(Jump{"filter", v6, "FORWARD", chainForward})
}
