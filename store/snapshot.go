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
	Peers     []Peer           // that run the network and are not hidden, sorted by id
	Remote    []RemoteEndpoint // of those peers, sorted by owner and id
	Hidden    []Peer           // that run the network as far as we know, but are hidden
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
	Peers    []Peer // that run one of the networks and are not hidden
	Tunnels  []Peer // of those, that run an encrypted one
	Routed   []Peer // of those, that run a routed one
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
		shared := n.Shared()
		return tx.ofPeers(func(p Peer, r *peerRecords) {
			switch o, ok := r.network(v); {
			case !ok || !n.isRun(shared, o): // not part of our network: status says so
			case p.Hidden:
				s.Hidden = append(s.Hidden, p)
			default:
				s.Peers = append(s.Peers, p)
				s.Remote = append(s.Remote, r.remote[v]...)
			}
		})
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

// Around returns the peers that run the network and are not hidden, sorted by id.
func (tx *Tx) Around(n Network) (out []Peer, err error) {
	shared := n.Shared()
	err = tx.ofPeers(func(p Peer, r *peerRecords) {
		if o, ok := r.network(n.VNI); ok && !p.Hidden && n.isRun(shared, o) {
			out = append(out, p)
		}
	})
	return out, err
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
		return tx.ofPeers(func(p Peer, r *peerRecords) {
			if !p.Hidden {
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
