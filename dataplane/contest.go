package dataplane

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/store"
)

// Contest is an address, or a MAC, that two endpoints of a network have: containers that
// were started on two hosts that did not hear each other, or a host that draws another's
// traffic to itself.
type Contest struct {
	What  string    `json:"what"`
	Used  Claimant  `json:"used"` // by this host
	Other Claimant  `json:"other"`
	Open  bool      `json:"open,omitempty"` // nothing is programmed by it: containers ask, and either may answer
	Since time.Time `json:"since"`          // first pass that saw it; the loop says so
	told  bool
}

// Claimant is one of two endpoints that have an address.
type Claimant struct {
	Host     store.HostID     `json:"host"`
	Name     string           `json:"name"` // of the host
	Endpoint store.EndpointID `json:"endpoint"`
	Here     bool             `json:"here,omitempty"` // it is this host's
	silent   bool
}

const (
	// What moves to another host with its address is on both for a moment: the log tells
	// of a contest after this.
	tellAfter = 5 * time.Second
	// mostContests are kept of a network: a host may claim all of its addresses.
	mostContests = 100
)

// firstContests returns the first contests, with what is known of them from before.
func firstContests(all, old []Contest, now time.Time) []Contest {
	all = all[:min(len(all), mostContests)]
	for i, c := range all {
		all[i].Since = now
		if j := slices.IndexFunc(old, func(o Contest) bool { return o.What == c.What && o.Used == c.Used && o.Other == c.Other }); j >= 0 {
			all[i].Since, all[i].told = old[j].Since, old[j].told
		}
	}
	return all
}

// ripe returns the contests that the log has yet to tell, the first between two hosts, and
// whether there are more to tell later.
func ripe(all []Contest, now time.Time) (tell []Contest, later bool) {
	hosts := map[[2]store.HostID]bool{}
	for _, c := range all {
		if c.told {
			hosts[[2]store.HostID{c.Used.Host, c.Other.Host}] = true
		}
	}
	for i, c := range all {
		pair := [2]store.HostID{c.Used.Host, c.Other.Host}
		switch {
		case c.told:
		case now.Sub(c.Since) < tellAfter:
			later = true
		default:
			all[i].told = true
			if !hosts[pair] {
				tell = append(tell, c)
			}
			hosts[pair] = true
		}
	}
	return tell, later
}

// claim is what a peer's endpoint claims that others claim too: on a bridge with all it
// has, where hosts route with each address for itself.
type claim struct {
	of int // in Snapshot.Remote
	store.SharedEndpoint
	by   Claimant
	rank int // the lowest wins
}

// settle leaves one endpoint of those that have the same address or, on a bridge, the
// same MAC, and says which had to yield to which. A local one wins. Then, since what a
// host has must not become another's because that says so: a peer to which there is a
// way, a living one, the one to which the kernel leads already (have), and at last the
// lower host id.
func settle(s store.Snapshot, u Underlay, have Plan) ([]store.RemoteEndpoint, []Contest) {
	several := severalHave(s)
	if len(several) == 0 {
		return s.Remote, nil
	}
	holders := map[any]Claimant{}
	for _, e := range s.Endpoints {
		if !e.Left {
			by := Claimant{Host: s.Self.ID, Name: s.Self.Name, Endpoint: e.ID, Here: true}
			for _, k := range claimed(s.Network, e.Shared()) {
				holders[k] = by
			}
		}
	}
	var contests []Contest
	remote := slices.Clone(s.Remote)
	for _, c := range claims(s, u, have, several) {
		var what any
		var used Claimant
		yields := false
		for _, k := range claimed(s.Network, c.SharedEndpoint) {
			by, taken := holders[k]
			if taken && what == nil {
				what, used = k, by
			}
			yields = yields || taken && programmedBy(s.Network, k)
		}
		if what != nil && !used.silent && !c.by.silent && used.Host != c.by.Host {
			contests = append(contests, Contest{What: fmt.Sprint(what), Used: used, Other: c.by, Open: !yields})
		}
		if yields {
			c.drop(&remote[c.of].SharedEndpoint)
			continue
		}
		for _, k := range claimed(s.Network, c.SharedEndpoint) {
			if _, taken := holders[k]; !taken {
				holders[k] = c.by
			}
		}
	}
	slices.SortStableFunc(contests, func(a, b Contest) int { return cmp.Compare(a.What, b.What) })
	return remote, contests
}

// drop takes the claim out of what is planned.
func (c claim) drop(e *store.SharedEndpoint) {
	if e.IPv4 == c.IPv4 {
		e.IPv4 = netip.Addr{}
	}
	if e.IPv6 == c.IPv6 {
		e.IPv6 = netip.Addr{}
	}
	if e.MAC == c.MAC {
		e.MAC = store.MAC{}
	}
}

// claimed returns what of an endpoint no other may have, its addresses first.
func claimed(n *store.Network, e store.SharedEndpoint) (keys []any) {
	for _, a := range addresses(e) {
		keys = append(keys, a)
	}
	if !n.Routed() {
		keys = append(keys, e.MAC)
	}
	return keys
}

// programmedBy reports whether the kernel holds anything by an address or MAC. On a bridge
// it holds nothing by an IPv6 address, so who has the same takes nothing from another.
func programmedBy(n *store.Network, key any) bool {
	a, ok := key.(netip.Addr)
	return n.Routed() || !ok || a.Is4()
}

// addresses returns those that the endpoint has. A peer may tell any in either field.
func addresses(e store.SharedEndpoint) []netip.Addr {
	all := []netip.Addr{e.IPv4, e.IPv6}
	return slices.DeleteFunc(all, func(a netip.Addr) bool { return !a.IsValid() })
}

// severalHave returns which of the peers' endpoints have something that another endpoint
// has too.
func severalHave(s store.Snapshot) map[int]bool {
	out := map[int]bool{}
	first, firstMAC := make(map[netip.Addr]int, len(s.Remote)), make(map[store.MAC]int, len(s.Remote))
	look := func(i int, e store.SharedEndpoint) {
		for _, a := range [2]netip.Addr{e.IPv4, e.IPv6} {
			if !a.IsValid() {
				continue
			}
			if o, ok := first[a]; !ok {
				first[a] = i
			} else if o != i {
				out[o], out[i] = true, true
			}
		}
		if s.Network.Routed() {
			return
		}
		if o, ok := firstMAC[e.MAC]; !ok {
			firstMAC[e.MAC] = i
		} else {
			out[o], out[i] = true, true
		}
	}
	const here = -1
	for _, e := range s.Endpoints {
		if !e.Left {
			look(here, e.Shared())
		}
	}
	for i, e := range s.Remote {
		if s.Network.Routed() || !e.MAC.IsZero() {
			look(i, e.SharedEndpoint)
		}
	}
	delete(out, here)
	return out
}

// claims returns what some endpoints claim, who wins first.
func claims(s store.Snapshot, u Underlay, have Plan, some map[int]bool) (out []claim) {
	peers, ways := map[store.HostID]store.Peer{}, reached(s, u)
	for _, p := range s.Peers {
		peers[p.ID] = p
	}
	for i := range some {
		e := s.Remote[i]
		peer := peers[e.Owner]
		by := Claimant{Host: e.Owner, Name: peer.Name, Endpoint: e.ID, silent: !peer.DeadSince.IsZero()}
		parts := []store.SharedEndpoint{e.SharedEndpoint}
		if s.Network.Routed() {
			parts = []store.SharedEndpoint{{IPv4: e.IPv4}, {IPv6: e.IPv6}}
		}
		_, way := ways[e.Owner]
		for _, part := range parts {
			out = append(out, claim{i, part, by, 8*bit(!way) + 4*bit(by.silent) + away(have, s, part, peer)})
		}
	}
	slices.SortFunc(out, func(a, b claim) int { return cmp.Or(a.rank-b.rank, a.of-b.of) })
	return out
}

// away returns 0 if the kernel leads to a peer for all that its endpoint claims, 2 if not.
// In between is a route to one of the peer's keys of WireGuard with another beside it: one
// of the two hosts changes its key, or the peer tells that of another host as its own.
func away(have Plan, s store.Snapshot, c store.SharedEndpoint, peer store.Peer) (far int) {
	n, vx := s.Network, VXLANName(s.VNI)
	if !n.Routed() {
		fdb, _ := have[FDB{Link: vx, MAC: c.MAC}.Key()].(FDB)
		if !fdb.Dst.IsValid() || fdb.Dst != peer.Address {
			return 2
		}
	}
	for _, a := range addresses(c) {
		if !n.Routed() {
			neigh, _ := have[Neigh{Link: BridgeName(n.VNI), IP: a}.Key()].(Neigh)
			far = max(far, 2*bit(programmedBy(n, a) && neigh.MAC != c.MAC))
			continue
		}
		r, _ := have[Route{Link: vx, Prefix: netip.PrefixFrom(a, a.BitLen())}.Key()].(Route)
		theirs := func(k store.WGKey) bool { return !k.IsZero() && slices.Contains(r.Peers[:], k) }
		switch {
		case r.Link == vx && r.Via.IsValid():
			far = max(far, 2*bit(!leadsTo(peer, r.Via, vx, have)))
		case r.Via.IsValid() && r.Via == peer.Address:
		case !slices.ContainsFunc(peer.Tunnel.Keys, theirs):
			far = 2
		case r.Peers != tunnelRoute(s.Self, peer.Host).Peers:
			far = max(far, 1)
		}
	}
	return far
}

// unheardOf leaves out what peers claim of that for which the kernel leads to somebody who
// is not known: a host that lost its database has yet to hear who has it.
func unheardOf(s store.Snapshot, have Plan) []store.RemoteEndpoint {
	n, vx, known := s.Network, VXLANName(s.VNI), map[any]bool{netip.Addr{}: true}
	for _, p := range s.Peers {
		known[p.Address], known[linkLocal(tunnelMAC(p.ID, vx))] = true, true
		for _, k := range p.Tunnel.Keys {
			known[k] = !k.IsZero()
		}
	}
	strange := func(m store.MAC) bool {
		fdb, _ := have[FDB{Link: vx, MAC: m}.Key()].(FDB)
		return !known[fdb.Dst]
	}
	return slices.DeleteFunc(slices.Clone(s.Remote), func(e store.RemoteEndpoint) bool {
		if !n.Routed() && strange(e.MAC) {
			return true
		}
		return slices.ContainsFunc(addresses(e.SharedEndpoint), func(a netip.Addr) bool {
			if !n.Routed() {
				neigh, _ := have[Neigh{Link: BridgeName(n.VNI), IP: a}.Key()].(Neigh)
				return strange(neigh.MAC)
			}
			r, _ := have[Route{Link: vx, Prefix: netip.PrefixFrom(a, a.BitLen())}.Key()].(Route)
			return !known[r.Via] || r.Peers != [2]store.WGKey{} && !known[r.Peers[0]] && !known[r.Peers[1]]
		})
	})
}

// reached returns the peers to which there is a way for the network's packets.
func reached(s store.Snapshot, u Underlay) map[store.HostID]store.Peer {
	out := map[store.HostID]store.Peer{}
	if !u.Address.IsValid() {
		return out
	}
	for _, peer := range s.Peers {
		if tunnelled(s.Self, peer.Host) && (s.Network.Encrypted || s.Network.Routed() && across(s.Self, peer, u)) {
			out[peer.ID] = peer
		}
	}
	if !s.Network.Encrypted {
		for _, peer := range reachable(s, u) {
			out[peer.ID] = peer
		}
	}
	return out
}
