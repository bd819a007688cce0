package store

import (
	"errors"
	"slices"
)

// Snapshot is one consistent copy of all that decides what the kernel must hold
// for a network on this host. The slices are shared: do not change them.
type Snapshot struct {
	VNI       VNI
	Self      Host
	Network   *Network // nil when this host does not run the network
	Endpoints []Endpoint
	Peers     []Peer           // that run the network (Tx.Around), sorted by id
	Remote    []RemoteEndpoint // of those peers, sorted by owner and id
	// Around is Peers, also where those are left out: packets must fit the ways to all.
	Around []Peer
	// Services are the virtual addresses of the network, sorted; left out where endpoints
	// are. Served: there are some.
	Services []Service
	Served   bool
}

// HostSnapshot is one consistent copy of all that decides what the kernel must
// hold for the host as a whole.
type HostSnapshot struct {
	Self     Host
	Networks []Network
	Peers    []Peer // that run one of the networks, as each network has them
	Tunnels  []Peer // of those, that run an encrypted one
	Routed   []Peer // of those, that run a routed one
	// Tunnel: WireGuard stays, whoever is known. The loop says so.
	Tunnel bool
	// Published are this host's endpoints with published ports, sorted by id, but for
	// those that have left.
	Published []Endpoint
}

// Snapshot returns the copy for one network.
func (db *DB) Snapshot(v VNI) (Snapshot, error) {
	s := Snapshot{VNI: v, Self: db.Self()}
	err := db.View(func(tx *Tx) error {
		n, err := tx.NetworkByVNI(v)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		s.Network = &n
		if s.Endpoints, err = tx.Endpoints(n.ID); err != nil {
			return err
		}
		if s.Services, err = tx.Services(n); err != nil {
			return err
		}
		if s.Peers, err = tx.Around(n); err != nil {
			return err
		}
		for _, p := range s.Peers {
			r, err := tx.recordsOf(p.ID)
			if err != nil {
				return err
			}
			s.Remote = append(s.Remote, r.remote[v]...)
		}
		return nil
	})
	s.Around, s.Served = s.Peers, len(s.Services) > 0
	return s, err
}

// EndpointSnapshot returns the copy for one endpoint of this host: its network, and
// neither other endpoints nor peers. An unknown one gives an empty list.
func (db *DB) EndpointSnapshot(v VNI, id EndpointID) (Snapshot, error) {
	s := Snapshot{VNI: v, Self: db.Self()}
	err := db.View(func(tx *Tx) error {
		n, err := tx.NetworkByVNI(v)
		if err != nil {
			return err
		}
		s.Network = &n
		e, err := tx.Endpoint(n.ID, id)
		s.Endpoints = []Endpoint{e}
		if err != nil {
			return err
		}
		services, err := tx.Services(n)
		if err != nil {
			return err
		}
		s.Served = len(services) > 0
		s.Around, err = tx.Around(n)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		s.Endpoints, err = nil, nil
	}
	return s, err
}

// Around returns the peers that run the network, sorted by id: without those that are
// hidden, unless this host is deaf.
func (tx *Tx) Around(n Network) (out []Peer, err error) {
	shared := n.Shared()
	err = tx.ofPeers(func(p Peer, r *peerRecords) {
		// A network of that VNI may be another: status says so.
		if o, ok := r.network(n.VNI); ok && n.isRun(shared, o) {
			out = append(out, p)
		}
	})
	if !Deaf(out) {
		out = slices.DeleteFunc(out, func(p Peer) bool { return p.Hidden })
	}
	return out, err
}

// guardPeers is how many peers may fall silent at once and be believed to be gone.
const guardPeers = 10

// Deaf reports whether so many of a network's peers are silent at once that it will be
// this host that hears nobody: more than guardPeers, and more than half. Those that are
// not hidden yet count too, or the first that are would go before there are enough.
func Deaf(peers []Peer) bool {
	n := silent(peers)
	return n > guardPeers && n > len(peers)-n
}

func silent(peers []Peer) (n int) {
	for _, p := range peers {
		if p.Hidden || !p.DeadSince.IsZero() {
			n++
		}
	}
	return n
}

// kept returns the hidden peers that a network keeps.
func (tx *Tx) kept(networks []Network) (map[HostID]bool, error) {
	all, err := tx.Peers()
	if err != nil || silent(all) <= guardPeers { // to prove networks costs a hash each
		return nil, err
	}
	out := map[HostID]bool{}
	for _, n := range networks {
		around, err := tx.Around(n)
		if err != nil {
			return nil, err
		}
		for _, p := range around {
			if p.Hidden {
				out[p.ID] = true
			}
		}
	}
	return out, nil
}

// HostSnapshot returns the copy for the host.
func (db *DB) HostSnapshot() (HostSnapshot, error) {
	s := HostSnapshot{Self: db.Self()}
	err := db.View(func(tx *Tx) (err error) {
		if s.Networks, err = tx.Networks(); err != nil {
			return err
		}
		if slices.ContainsFunc(s.Networks, func(n Network) bool { return n.OwnGateway() }) {
			all, err := tx.AllEndpoints()
			if err != nil {
				return err
			}
			s.Published = slices.DeleteFunc(all, func(e Endpoint) bool { return e.Left || len(e.Ports) == 0 })
		}
		kept, err := tx.kept(s.Networks)
		if err != nil {
			return err
		}
		return tx.ofPeers(func(p Peer, r *peerRecords) {
			if !p.Hidden || kept[p.ID] {
				s.place(p, r.nets)
			}
		})
	})
	return s, err
}

// place puts a peer into the lists where its networks belong.
func (s *HostSnapshot) place(p Peer, nets []PeerNetwork) {
	runs, crypt, routed := false, false, false
	for _, o := range nets {
		if runs && (crypt || !o.Encrypted) && (routed || o.Mode != ModeRouted) {
			continue // nothing new; to prove a network costs a hash
		}
		if runsOne(s.Networks, o) {
			runs, crypt, routed = true, crypt || o.Encrypted, routed || o.Mode == ModeRouted
		}
	}
	if runs {
		s.Peers = append(s.Peers, p)
	}
	if crypt {
		s.Tunnels = append(s.Tunnels, p)
	}
	if routed {
		s.Routed = append(s.Routed, p)
	}
}

// runsOne reports whether a peer's network is one of ours.
func runsOne(own []Network, o PeerNetwork) bool {
	return slices.ContainsFunc(own, func(n Network) bool { return n.Runs(o) })
}
