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
	peers   listCache[Peer]
	own     listCache[Network] // this host's networks
}

// listCache keeps a whole list.
type listCache[T any] struct {
	all     []T // nil: not read yet
	changed int // as peerCache.changed, of anything in the list
}

// listed is list by way of the cache; written: this transaction changed the list.
func listed[T any](tx *Tx, c *listCache[T], written bool, bucket []byte) ([]T, error) {
	mu := &tx.peers.mu
	mu.Lock()
	all, current := c.all, tx.tx.ID() >= c.changed && !written
	mu.Unlock()
	if all != nil && current {
		return all, nil
	}
	all, err := list[T](tx, bucket, nil)
	if err != nil {
		return nil, err
	}
	mu.Lock()
	defer mu.Unlock()
	if tx.tx.ID() >= c.changed && !written {
		c.all = all
	}
	return all, nil
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
	return listed(tx, &tx.peers.peers, tx.peersWritten, bucketPeers)
}

// Networks returns this host's networks, sorted by id: each question of a peer and each
// answer begins with them. Readers share the list: do not change it.
func (tx *Tx) Networks() ([]Network, error) {
	return listed(tx, &tx.peers.own, tx.networksWritten, bucketNetworks)
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
		c.peers = listCache[Peer]{changed: tx.tx.ID()}
	}
	if tx.networksWritten {
		c.own = listCache[Network]{changed: tx.tx.ID()}
	}
}
