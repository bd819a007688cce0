package dataplane

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// The port program stands on the host's side of every endpoint's link, and on the
// underlay's. It guards what endpoints send, and takes packets to destinations that it
// knows past bridge, routes and rules, which do without it. dataplane/kernel/bpf has it.

// Program is the port program on this host as a whole: attached to the underlay's link,
// and what it must know to exchange VXLAN with peers there.
type Program struct {
	Underlay string     // link; "": attached to endpoints' links alone
	Address  netip.Addr // of this host there, IPv4
	Port     uint16     // UDP, of VXLAN
	Routed   bool       // look at what arrives for endpoints of routed networks too
	Peers    string     // IPv4 addresses from which VXLAN is taken, sorted, separated by commas
	Flows    bool       // count who sends what to whom
	Stray    int        // endpoints that it knows and that are gone; Read tells it
}

// Port is what the port program knows of an endpoint of this host. The zero value is an
// endpoint without it.
type Port struct {
	VNI        store.VNI
	MAC        store.MAC
	IPv4, IPv6 netip.Addr
	Guard      bool // nothing but its own addresses, and no announcements of a router, server or bridge
	Other      bool // the guard lets ethertypes pass that are not IPv4, IPv6 or ARP
	Fast       bool // known destinations are reached past the host's stack
	Routed     bool // the host is the next hop of every packet
	Services   bool // of the network: virtual addresses are answered
	// MTU in bytes of the network where that may change: who sends longer packets is told.
	// A container keeps the MTU with which it started. 0: any length passes.
	MTU int
}

// Dest is a destination that the port program knows: in a bridged network a MAC, in a
// routed one an address.
type Dest struct {
	VNI      store.VNI
	MAC      store.MAC  // of the endpoint
	IP       netip.Addr // of the endpoint on a routed network; else the zero Addr
	Link     string     // host's side of the link of an endpoint of this host, or the WireGuard device of Tunnel; or
	Peer     netip.Addr // IPv4 underlay address of its host
	Direct   bool       // the peer is on the underlay's link
	Tunnel   bool       // Link leads to the peer
	Services bool       // Link's endpoint may have asked a virtual address
	Stack    bool       // the host's stack must see all of its packets: some are translated
}

// Service is a virtual address that the program answers, and the tasks behind it.
type Service struct {
	VNI      store.VNI
	VIP      netip.Addr // IPv4
	Backends string     // "10.1.0.2 02:…", sorted by address, separated by commas; at most MaxBackends
}

// MaxBackends is how many tasks of a service the program knows.
const MaxBackends = 512

func (Program) object() {}
func (Service) object() {}
func (Dest) object()    {}

// Key implements Object.
func (o Program) Key() Key { return Key{Kind: KindProgram} }

// Key implements Object.
func (o Dest) Key() Key {
	if o.IP.IsValid() {
		return Key{Kind: KindDest, IP: o.IP}
	}
	return Key{Kind: KindDest, MAC: o.MAC}
}

// Key implements Object.
func (o Service) Key() Key { return Key{Kind: KindService, IP: o.VIP} }

func (o Service) String() string {
	return fmt.Sprintf("service %s {%s} vni %d", o.VIP, o.Backends, o.VNI)
}

func (o Program) String() string {
	s := "program"
	if o.Underlay != "" {
		s += fmt.Sprintf(" dev %s address %s dstport %d peers {%s}", o.Underlay, o.Address, o.Port, o.Peers)
	}
	if o.Routed {
		s += " routed"
	}
	if o.Flows {
		s += " flows"
	}
	if o.Stray > 0 {
		s += fmt.Sprintf(" (%d of its endpoints are gone)", o.Stray)
	}
	return s
}

func (o Port) String() string {
	var s []string
	for _, f := range []struct {
		on   bool
		name string
	}{{o.Guard, "guard"}, {o.Other, "ethertypes"}, {o.Fast, "fast"}, {o.Routed, "routed"}, {o.Services, "services"}} {
		if f.on {
			s = append(s, f.name)
		}
	}
	for _, a := range []netip.Addr{o.IPv4, o.IPv6} {
		if a.IsValid() {
			s = append(s, a.String())
		}
	}
	if o.MTU != 0 {
		s = append(s, fmt.Sprintf("mtu %d", o.MTU))
	}
	return "program [" + strings.Join(s, " ") + "]"
}

func (o Dest) String() string {
	s := "dest "
	if o.IP.IsValid() {
		s += o.IP.String() + " "
	}
	s = strings.TrimSpace(s + o.MAC.String())
	if o.Link != "" {
		s += " dev " + o.Link
	} else {
		s += " host " + o.Peer.String()
	}
	if o.Direct {
		s += " direct"
	}
	if o.Tunnel {
		s += " tunnel"
	}
	if o.Stack {
		s += " stack"
	}
	if o.Services {
		s += " services"
	}
	return s + fmt.Sprintf(" vni %d", o.VNI)
}

// planProgram adds the port program for the host.
func planProgram(p Plan, s store.HostSnapshot, u Underlay) {
	if !u.Program {
		return
	}
	o := Program{Flows: u.Flows, Routed: slices.ContainsFunc(s.Networks, func(n store.Network) bool { return n.Mode == store.ModeRouted && !n.Encrypted })}
	if u.Address.Is4() && u.Ethernet && slices.ContainsFunc(s.Networks, fast) {
		var peers []string
		for _, peer := range s.Peers {
			if peer.Address.Is4() {
				peers = append(peers, peer.Address.String())
			}
		}
		o.Underlay, o.Address, o.Port, o.Peers = u.Link, u.Address, s.Self.DataPort, joinMembers(peers)
	}
	p.Add(o)
}

func fast(n store.Network) bool { return !n.SlowPath }

// portOf returns what the port program must know of an endpoint, on a network with the
// MTU.
func portOf(s store.Snapshot, e store.Endpoint, u Underlay, mtu int) Port {
	n := *s.Network
	if !u.Program || n.Unguarded && n.SlowPath {
		return Port{}
	}
	if n.MTU != 0 { // what the user chose is not looked after
		mtu = 0
	}
	return Port{MTU: mtu, VNI: n.VNI, MAC: e.MAC, IPv4: e.IPv4.Addr(), IPv6: e.IPv6.Addr(), Guard: !n.Unguarded, Other: n.AnyEthertype,
		// The answers of a published port may have to be translated back.
		Fast: !n.SlowPath && !(n.Routed() && len(e.Ports) > 0), Routed: n.Routed(), Services: s.Served && !n.SlowPath}
}

// planLocalDests makes an endpoint of this host known to the program.
func planLocalDests(p Plan, s store.Snapshot, e store.Endpoint, u Underlay) {
	n := *s.Network
	if !u.Program || n.SlowPath {
		return
	}
	o := Dest{VNI: n.VNI, MAC: e.MAC, Link: VethName(e.ID), Stack: n.Routed() && len(e.Ports) > 0, Services: s.Served}
	if !n.Routed() {
		p.Add(o)
		return
	}
	for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
		if o.IP = a; a.IsValid() {
			p.Add(o)
		}
	}
}

// planDest makes an endpoint of a peer known to the program. Where the underlay's link gets
// checksums inside of VXLAN wrong, the VXLAN device computes them; the program, which puts
// packets of a bridged network into VXLAN without it, cannot.
func planDest(p Plan, o Dest, n store.Network, u Underlay) {
	if !u.Program || n.SlowPath {
		return
	}
	plain := o.IP.IsValid() || !u.NoChecksum
	if o.Tunnel || plain && u.Ethernet && u.Address.Is4() && o.Peer.Is4() {
		p.Add(o)
	}
}

// planServices makes the program answer the virtual addresses of services, each for the
// tasks of which this host knows the endpoint, on a host that is not silent; on any, if it
// is this host that hears nobody.
func planServices(p Plan, s store.Snapshot, u Underlay) {
	if !u.Program || s.Network.SlowPath || len(s.Services) == 0 {
		return
	}
	macs, silent := map[netip.Addr]store.MAC{}, map[store.HostID]bool{}
	deaf := store.Deaf(s.Peers)
	for _, peer := range s.Peers {
		silent[peer.ID] = !peer.DeadSince.IsZero() && !deaf
	}
	for _, e := range s.Remote {
		if !silent[e.Owner] {
			macs[e.IPv4] = e.MAC
		}
	}
	for _, e := range s.Endpoints {
		if !e.Left {
			macs[e.IPv4.Addr()] = e.MAC
		}
	}
	for _, service := range s.Services {
		var all []string
		for _, a := range service.Backends {
			if mac, ok := macs[a]; ok && a.Is4() && len(all) < MaxBackends {
				all = append(all, a.String()+" "+mac.String())
			}
		}
		if service.VIP.Is4() {
			p.Add(Service{VNI: s.VNI, VIP: service.VIP, Backends: strings.Join(all, ",")})
		}
	}
}
