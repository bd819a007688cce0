package store

import (
	"encoding/json"
	"slices"
	"sync"
)

// peerCache keeps the decoded records of each peer, for decoding is what makes
// reading slow (measured: 5 µs a record), and every change of one peer makes
// somebody look at all. A write drops what that peer had and nothing else.
type peerCache struct {
	mu      sync.Mutex // guards what follows
	owners  map[HostID]*peerRecords
	changed map[HostID]int // by the transaction with this number, or it tried to
	list    []Peer         // all peers, nil: not read yet
	listed  int            // as changed, of any peer itself
	own     []Network      // as list and listed, of this host's networks
	ownAt   int
}

// peerRecords is what one peer has. Readers share it: nobody changes it.
type peerRecords struct {
	nets   []PeerNetwork            // sorted by VNI
	remote map[VNI][]RemoteEndpoint // sorted by id
}

// network returns the peer's network with the VNI.
func (r *peerRecords) network(v VNI) (PeerNetwork, bool) {
	i, ok := slices.BinarySearchFunc(r.nets, v, func(n PeerNetwork, v VNI) int { return int(n.VNI) - int(v) })
	if !ok {
		return PeerNetwork{}, false
	}
	return r.nets[i], true
}

// recordsOf returns what the peer has, as this transaction sees it.
func (tx *Tx) recordsOf(id HostID) (*peerRecords, error) {
	if r, ok := tx.remembered(id); ok {
		return r, nil
	}
	r, err := tx.readRecords(id)
	if err != nil || tx.owners[id] {
		return r, err
	}
	c := tx.peers
	c.mu.Lock()
	defer c.mu.Unlock()
	if tx.tx.ID() >= c.changed[id] {
		c.owners[id] = r
	}
	return r, nil
}

// remembered returns what the peer has if it need not be read.
func (tx *Tx) remembered(id HostID) (*peerRecords, bool) {
	if tx.owners[id] { // written in this very transaction
		return nil, false
	}
	c := tx.peers
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.owners[id]
	// A reader that began before the last change sees what was before it.
	return r, ok && tx.tx.ID() >= c.changed[id]
}

func (tx *Tx) readRecords(id HostID) (*peerRecords, error) {
	nets, err := readAll[PeerNetwork](tx, bucketPeerNets, []byte(string(id)+"/"))
	if err != nil {
		return nil, err
	}
	r := &peerRecords{nets: nets, remote: make(map[VNI][]RemoteEndpoint, len(nets))}
	for _, n := range nets {
		all, err := readAll[RemoteEndpoint](tx, bucketRemote, remoteKey(n.VNI, id, ""))
		if err != nil {
			return nil, err
		}
		for i := range all {
			all[i].Owner = id // one string for all
		}
		r.remote[n.VNI] = all
	}
	return r, nil
}

// Peers returns all known peers, sorted by id. Readers share the list: do not change
// it.
func (tx *Tx) Peers() ([]Peer, error) {
	c := tx.peers
	c.mu.Lock()
	all, current := c.list, tx.tx.ID() >= c.listed && !tx.peersWritten
	c.mu.Unlock()
	if all != nil && current {
		return all, nil
	}
	all, err := list[Peer](tx, bucketPeers, nil)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if tx.tx.ID() >= c.listed && !tx.peersWritten {
		c.list = all
	}
	return all, nil
}

// Networks returns this host's networks, sorted by id: each question of a peer and each
// answer begins with them. Readers share the list: do not change it.
func (tx *Tx) Networks() ([]Network, error) {
	c := tx.peers
	c.mu.Lock()
	all, current := c.own, tx.tx.ID() >= c.ownAt && !tx.networksWritten
	c.mu.Unlock()
	if all != nil && current {
		return all, nil
	}
	all, err := list[Network](tx, bucketNetworks, nil)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if tx.tx.ID() >= c.ownAt && !tx.networksWritten {
		c.own = all
	}
	return all, nil
}

// readAll is list for records that are remembered by peer.
func readAll[T any](tx *Tx, bucket, prefix []byte) ([]T, error) {
	return collect(tx, bucket, prefix, func(_, raw []byte) (v T, err error) {
		err = json.Unmarshal(raw, &v)
		return v, err
	})
}

// drop forgets what was changed before the transaction commits.
func (c *peerCache) drop(tx *Tx) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range tx.owners {
		delete(c.owners, id)
		c.changed[id] = tx.tx.ID()
	}
	if tx.peersWritten {
		c.list, c.listed = nil, tx.tx.ID()
	}
	if tx.networksWritten {
		c.own, c.ownAt = nil, tx.tx.ID()
	}
}
