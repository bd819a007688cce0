package dataplane

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft/store"
)

// scenes calls fn with each scene that has peers.
func scenes(t *testing.T, fn func(t *testing.T, s scene)) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no testdata: ", err)
	}
	for _, path := range files {
		if _, s := readScene(t, path); len(s.Snapshot.Peers) > 0 {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) { fn(t, s) })
		}
	}
}

// with returns the scene with one peer more, that has endpoints of its own and says that it
// has those of another.
func (s scene) with(p store.Peer, of store.HostID, routed, tunnelled bool) scene {
	add := func(to []store.Peer) []store.Peer {
		to = append(slices.Clone(to), p)
		slices.SortFunc(to, func(a, b store.Peer) int { return strings.Compare(string(a.ID), string(b.ID)) })
		return to
	}
	s.Snapshot.Peers, s.Host.Peers = add(s.Snapshot.Peers), add(s.Host.Peers)
	if tunnelled {
		s.Host.Tunnels = add(s.Host.Tunnels)
	}
	if routed {
		s.Host.Routed = add(s.Host.Routed)
	}
	s.Snapshot.Remote = slices.Clone(s.Snapshot.Remote)
	for i, sub := range s.Snapshot.Network.Subnets {
		last := sub.Pool.Addr().AsSlice()
		last[len(last)-1] = 0xe1 + byte(i)
		a, _ := netip.AddrFromSlice(last)
		s.Snapshot.Remote = append(s.Snapshot.Remote, store.RemoteEndpoint{Owner: p.ID, SharedEndpoint: store.SharedEndpoint{
			ID: store.EndpointID(fmt.Sprint("liar", i)), MAC: store.DeriveMAC("liar", fmt.Sprint(i)), IPv4: a}})
	}
	for _, e := range s.Snapshot.Remote {
		if e.Owner == of {
			e.Owner, e.ID = p.ID, "stolen "+e.ID
			s.Snapshot.Remote = append(s.Snapshot.Remote, e)
		}
	}
	slices.SortStableFunc(s.Snapshot.Remote, func(a, b store.RemoteEndpoint) int { return strings.Compare(string(a.Owner), string(b.Owner)) })
	return s
}

// plans returns both plans, for a kernel that holds something already.
func (s scene) plans(t *testing.T, have Plan) (network, host Plan) {
	t.Helper()
	network, _, err := planNetwork(s.Snapshot, s.Underlay, have, true)
	if err != nil {
		t.Fatal(err)
	}
	return network, PlanHost(s.Host, s.Underlay)
}

// leads fails unless routes to a peer's endpoints by the VXLAN device end at the peer's own
// MAC there, whoever else tells its address.
func (p Plan) leads(t *testing.T, s store.Snapshot, peer store.Peer) {
	t.Helper()
	vx := VXLANName(s.VNI)
	for _, e := range s.Remote {
		for _, a := range addresses(e.SharedEndpoint) {
			r, ok := p[Route{Link: vx, Prefix: netip.PrefixFrom(a, a.BitLen())}.Key()].(Route)
			if e.Owner == peer.ID && ok && r.Link == vx && !leadsTo(peer, r.Via, vx, p) {
				t.Errorf("%v does not lead to %s", r, peer.ID)
			}
		}
	}
}

// TestLiarsAddress: a peer that tells the address of another one, or of this host, as its
// own changes nothing of what leads to others, and opens the guard to nobody.
func TestLiarsAddress(t *testing.T) {
	scenes(t, func(t *testing.T, s scene) {
		network, host := s.plans(t, nil)
		encrypted := s.Snapshot.Network.Encrypted
		for _, victim := range append([]store.Peer{{Host: s.Snapshot.Self}}, s.Snapshot.Peers...) {
			for _, id := range []store.HostID{"0liar", "~liar"} { // before and after all others
				for _, public := range []netip.Addr{victim.Public, netip.MustParseAddr("203.0.113.77")} {
					if public != victim.Public && len(s.Snapshot.Self.Tunnel.Keys) == 0 {
						continue // it would be sought through WireGuard
					}
					liar := store.Peer{Host: store.Host{ID: id, Name: "liar", Address: victim.Address, Public: public, DataPort: 4797,
						Tunnel: store.Tunnel{Keys: []store.WGKey{{77}}, Port: 4798}}}
					routed := s.Snapshot.Network.Mode == store.ModeRouted && !encrypted
					with := s.with(liar, victim.ID, routed, encrypted)
					got, gotHost := with.plans(t, network)
					if again, _ := with.plans(t, got); again.String() != got.String() {
						t.Errorf("%s tells the address of %s: the next pass plans something else", id, victim.Name)
					}
					fresh, _ := s.with(liar, "", routed, encrypted).plans(t, nil)
					fresh.leads(t, s.Snapshot, victim)
					for k, o := range network {
						if got[k] != o {
							t.Errorf("%s tells the address %s of %q, public %s:\n%v became\n%v", id, liar.Address, victim.Name, public, o, got[k])
						}
					}
					for k, o := range host {
						if gotHost[k] != o {
							t.Errorf("%s tells the address %s of %q, public %s:\n%v became\n%v", id, liar.Address, victim.Name, public, o, gotHost[k])
						}
					}
				}
			}
		}
	})
}

// TestRefusedTunnel: for a peer whose keys were not taken over nothing is planned on an
// encrypted network, and all else is as it would be without it.
func TestRefusedTunnel(t *testing.T) {
	scenes(t, func(t *testing.T, s scene) {
		if !s.Snapshot.Network.Encrypted {
			return
		}
		network, host := s.plans(t, nil)
		refused := store.Peer{Host: store.Host{ID: "0thief", Name: "thief", Address: netip.MustParseAddr("192.0.2.66"), DataPort: 4797}, KeyOf: s.Snapshot.Peers[0].ID}
		got, gotHost := s.with(refused, s.Snapshot.Peers[0].ID, false, true).plans(t, network)
		if got.String() != network.String() {
			t.Errorf("the plan of the network is\n%v\nwant\n%v", got, network)
		}
		for k, o := range gotHost {
			if _, set := o.(Set); !set && host[k] != o {
				if _, program := o.(Program); !program {
					t.Errorf("%v became\n%v", host[k], o)
				}
			}
		}
	})
}
