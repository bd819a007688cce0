package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// PeerNetwork is a network as a peer runs it, with the version of the peer's
// endpoints that we hold (0: none yet).
type PeerNetwork struct {
	Owner HostID `json:"owner"`
	SharedNetwork
	Epoch uint64 `json:"epoch,omitempty"`
	Seq   uint64 `json:"seq,omitempty"`
	Boot  uint64 `json:"boot,omitempty"` // Delta.Boot of the last one
}

// Peer returns a peer, or ErrNotFound.
func (tx *Tx) Peer(id HostID) (Peer, error) {
	return get[Peer](tx, bucketPeers, []byte(id), "peer "+string(id))
}

// PutPeer writes what is known of a peer. All networks that it runs are touched.
func (tx *Tx) PutPeer(p Peer) error {
	nets, err := tx.PeerNetworks(p.ID)
	if err != nil {
		return err
	}
	for _, n := range nets {
		tx.touch(n.VNI)
	}
	tx.touch(HostVNI)
	tx.peersWritten = true
	return put(tx, bucketPeers, []byte(p.ID), p)
}

// ForgetPeer removes a peer with all its records.
func (tx *Tx) ForgetPeer(id HostID) error {
	nets, err := tx.PeerNetworks(id)
	if err != nil {
		return err
	}
	for _, n := range nets {
		if err := tx.removePeerNetwork(id, n.VNI); err != nil {
			return err
		}
	}
	if err := tx.PutServices(id, false, nil); err != nil {
		return err
	}
	tx.touch(HostVNI)
	tx.peersWritten = true
	return tx.tx.Bucket(bucketPeers).Delete([]byte(id))
}

func peerNetKey(id HostID, v VNI) []byte { return append([]byte(string(id)+"/"), vniKey(v)...) }

func remoteKey(v VNI, id HostID, e EndpointID) []byte {
	return append(vniKey(v), []byte(string(id)+"/"+string(e))...)
}

// PeerNetworks returns the networks that a peer runs, sorted by VNI.
func (tx *Tx) PeerNetworks(id HostID) ([]PeerNetwork, error) {
	if r, ok := tx.remembered(id); ok {
		return r.nets, nil
	}
	// Its endpoints, of which there may be thousands, are not read for this.
	return readAll[PeerNetwork](tx, bucketPeerNets, []byte(string(id)+"/"))
}

// PeerNetwork returns one network of a peer, or ErrNotFound.
func (tx *Tx) PeerNetwork(id HostID, v VNI) (PeerNetwork, error) {
	if r, ok := tx.remembered(id); ok {
		if n, ok := r.network(v); ok {
			return n, nil
		}
		return PeerNetwork{}, fmt.Errorf("network %d of peer %s: %w", v, id, ErrNotFound)
	}
	n, err := get[PeerNetwork](tx, bucketPeerNets, peerNetKey(id, v), "network of peer "+string(id))
	if err != nil {
		return n, fmt.Errorf("vni %d: %w", v, err)
	}
	return n, nil
}

// MergeNetworks takes over a peer's list of networks, as the peer itself told it,
// with its version. Endpoints of networks that are no longer listed are dropped.
// Taking over the same list again changes nothing.
func (tx *Tx) MergeNetworks(owner HostID, epoch, seq uint64, nets []SharedNetwork) error {
	p, err := tx.Peer(owner)
	if err != nil {
		return err
	}
	if p.Epoch == epoch && p.Networks >= seq && seq != 0 {
		return nil
	}
	old, err := tx.PeerNetworks(owner)
	if err != nil {
		return err
	}
	for _, o := range old {
		if !slices.ContainsFunc(nets, func(n SharedNetwork) bool { return n.VNI == o.VNI }) {
			if err := tx.removePeerNetwork(owner, o.VNI); err != nil {
				return err
			}
		}
	}
	for _, n := range nets {
		pn := PeerNetwork{Owner: owner}
		if i := slices.IndexFunc(old, func(o PeerNetwork) bool { return o.VNI == n.VNI }); i >= 0 {
			pn = old[i]
		}
		if pn.SharedNetwork.Agrees(n) && bytes.Equal(pn.Proof, n.Proof) {
			continue
		}
		pn.SharedNetwork = n
		tx.touchOwner(owner, n.VNI)
		tx.touch(HostVNI) // whom the host listens to
		if err := put(tx, bucketPeerNets, peerNetKey(owner, n.VNI), pn); err != nil {
			return err
		}
	}
	p.Epoch, p.Networks = epoch, seq
	tx.peersWritten = true
	return put(tx, bucketPeers, []byte(owner), p)
}

func (tx *Tx) removePeerNetwork(owner HostID, v VNI) error {
	if err := removePrefix(tx, bucketRemote, remoteKey(v, owner, "")); err != nil {
		return err
	}
	tx.touchOwner(owner, v)
	tx.touch(HostVNI)
	return tx.tx.Bucket(bucketPeerNets).Delete(peerNetKey(owner, v))
}

// MergeEndpoints takes over what a peer itself told of its endpoints in a
// network. It reports whether the difference fitted: false means that it starts
// from a version that we do not hold, and the caller must ask for everything.
// Merging is idempotent, and an older difference changes nothing.
func (tx *Tx) MergeEndpoints(owner HostID, since uint64, d Delta) (fits bool, err error) {
	pn, err := tx.PeerNetwork(owner, d.VNI)
	if errors.Is(err, ErrNotFound) {
		return true, nil // the peer dropped the network meanwhile
	}
	if err != nil {
		return false, err
	}
	same := pn.Epoch == d.Epoch
	switch {
	case same && pn.Seq >= d.Seq && pn.Seq != 0:
		return true, nil
	case !d.Full && (!same || pn.Seq < since):
		return false, nil
	}
	if d.Full {
		keep := map[EndpointID]bool{}
		for _, e := range d.Endpoints {
			keep[e.ID] = true
		}
		prefix := remoteKey(d.VNI, owner, "")
		var gone [][]byte // deleting while a cursor walks skips entries
		err := scan(tx, bucketRemote, prefix, func(k, _ []byte) error {
			if !keep[EndpointID(k[len(prefix):])] {
				gone = append(gone, bytes.Clone(k))
			}
			return nil
		})
		if err != nil {
			return false, err
		}
		for _, k := range gone {
			if err := tx.tx.Bucket(bucketRemote).Delete(k); err != nil {
				return false, err
			}
		}
	}
	for _, e := range d.Endpoints {
		key := remoteKey(d.VNI, owner, e.ID)
		if e.Gone {
			err = tx.tx.Bucket(bucketRemote).Delete(key)
		} else {
			err = put(tx, bucketRemote, key, RemoteEndpoint{Owner: owner, SharedEndpoint: e})
		}
		if err != nil {
			return false, err
		}
	}
	tx.touchOwner(owner, d.VNI)
	pn.Epoch, pn.Seq, pn.Boot = d.Epoch, d.Seq, d.Boot
	return true, put(tx, bucketPeerNets, peerNetKey(owner, d.VNI), pn)
}

// ofPeers calls fn with what each peer has, in order of their ids, but for those that
// are revoked.
func (tx *Tx) ofPeers(fn func(Peer, *peerRecords)) error {
	out, err := tx.Revocations()
	if err != nil {
		return err
	}
	peers, err := tx.Peers()
	for _, p := range peers {
		if outOf(out, p.ID) {
			continue
		}
		r, err := tx.recordsOf(p.ID)
		if err != nil {
			return err
		}
		fn(p, r)
	}
	return err
}

// RemoteEndpoints returns the peers' endpoints of a network, hidden ones too, sorted
// by owner and id.
func (tx *Tx) RemoteEndpoints(v VNI) ([]RemoteEndpoint, error) {
	var out []RemoteEndpoint
	err := tx.ofPeers(func(_ Peer, r *peerRecords) { out = append(out, r.remote[v]...) })
	return out, err
}

// RemoteCount returns how many endpoints peers have in a network, hidden ones too.
func (tx *Tx) RemoteCount(v VNI) (n int, err error) {
	err = tx.ofPeers(func(_ Peer, r *peerRecords) { n += len(r.remote[v]) })
	return n, err
}

// RunBy returns the networks with the VNI that peers run, sorted by owner.
func (tx *Tx) RunBy(v VNI) ([]PeerNetwork, error) {
	var out []PeerNetwork
	err := tx.ofPeers(func(_ Peer, r *peerRecords) {
		if n, ok := r.network(v); ok {
			out = append(out, n)
		}
	})
	return out, err
}

// Alike returns the networks of peers that have n's mode, subnets and key, whatever
// their VNI, sorted by it.
func (tx *Tx) Alike(n Network) ([]PeerNetwork, error) {
	var out []PeerNetwork
	shared := n.Shared()
	err := tx.ofPeers(func(_ Peer, r *peerRecords) {
		for _, o := range r.nets {
			n.VNI, shared.VNI = o.VNI, o.VNI
			if n.isRun(shared, o) {
				out = append(out, o)
			}
		}
	})
	slices.SortStableFunc(out, func(a, b PeerNetwork) int { return int(a.VNI) - int(b.VNI) })
	return out, err
}

// ElsewhereError refuses what a peer has, as far as we hold its records.
type ElsewhereError struct{ Reason string }

// Error implements error.
func (e *ElsewhereError) Error() string { return e.Reason }

// Times of AwaitPeers. A change on a peer is known here after some 300 ms.
const (
	awaitPeers = time.Second
	awaitEvery = 100 * time.Millisecond
)

// AwaitPeers calls fn, and again for a second while it fails with an ElsewhereError:
// what a user just moved from another host is free a moment later.
func AwaitPeers(ctx context.Context, fn func() error) error {
	most := time.After(awaitPeers)
	for {
		err := fn()
		if _, elsewhere := errors.AsType[*ElsewhereError](err); !elsewhere {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-most:
			return err
		case <-time.After(awaitEvery):
		}
	}
}
