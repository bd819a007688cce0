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
}

// HostSnapshot is one consistent copy of all that decides what the kernel must
// hold for the host as a whole.
type HostSnapshot struct {
	Self     Host
	Networks []Network
	Peers    []Peer // that run one of the networks and are not hidden
}

// remoteView is the decoded part of a Snapshot that peers own. Ten thousand
// records take some 30 ms to decode, too long for each call of Docker.
type remoteView struct {
	peers  []Peer
	hidden []Peer
	remote []RemoteEndpoint
}

// remoteCache keeps the last view of each network. changed holds the transaction
// that last changed one, so that a reader that began earlier cannot leave an old
// view behind.
type remoteCache struct {
	views   map[VNI]remoteView
	changed map[VNI]int
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
		view, err := db.remoteView(tx, v, n)
		s.Peers, s.Hidden, s.Remote = view.peers, view.hidden, view.remote
		return err
	})
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
		return err
	})
	if errors.Is(err, ErrNotFound) {
		s.Endpoints, err = nil, nil
	}
	return s, err
}

// HostSnapshot returns the copy for the host.
func (db *DB) HostSnapshot() (HostSnapshot, error) {
	s := HostSnapshot{Self: db.Self()}
	err := db.View(func(tx *Tx) (err error) {
		if s.Networks, err = tx.Networks(); err != nil {
			return err
		}
		all, err := list[PeerNetwork](tx, bucketPeerNets, nil)
		if err != nil {
			return err
		}
		runs := map[HostID]bool{}
		for _, o := range all {
			runs[o.Owner] = runs[o.Owner] || slices.ContainsFunc(s.Networks, func(n Network) bool { return n.Runs(o) })
		}
		s.Peers, err = tx.Peers()
		s.Peers = slices.DeleteFunc(s.Peers, func(p Peer) bool { return p.Hidden || !runs[p.ID] })
		return err
	})
	return s, err
}

// remoteView reads or reuses the peers' part.
func (db *DB) remoteView(tx *Tx, v VNI, own Network) (remoteView, error) {
	db.mu.Lock()
	view, ok := db.remote.views[v]
	db.mu.Unlock()
	if ok {
		return view, nil
	}
	runs, err := tx.RunBy(v)
	if err != nil {
		return remoteView{}, err
	}
	shown := map[HostID]bool{}
	for _, r := range runs {
		p, err := tx.Peer(r.Owner)
		if err != nil {
			return remoteView{}, err
		}
		switch {
		case !own.Runs(r): // not part of our network: status says so
		case p.Hidden:
			view.hidden = append(view.hidden, p)
		default:
			shown[p.ID] = true
			view.peers = append(view.peers, p)
		}
	}
	all, err := tx.RemoteEndpoints(v)
	if err != nil {
		return remoteView{}, err
	}
	view.remote = slices.DeleteFunc(all, func(e RemoteEndpoint) bool { return !shown[e.Owner] })
	db.mu.Lock()
	defer db.mu.Unlock()
	if tx.tx.ID() >= db.remote.changed[v] {
		db.remote.views[v] = view
	}
	return view, nil
}

func (db *DB) dropViews(txid int, touched map[VNI]bool) {
	db.mu.Lock()
	defer db.mu.Unlock()
	for v := range touched {
		delete(db.remote.views, v)
		db.remote.changed[v] = max(txid, db.remote.changed[v])
	}
}
