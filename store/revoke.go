package store

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Revocation says that hosts want nothing more of a host: its packets, its records, its
// keys. An odd number of N says so, an even one takes it back; the highest counts.
type Revocation struct {
	Host HostID `json:"host"`
	N    uint64 `json:"n"`
}

// Out reports whether the host is revoked.
func (r Revocation) Out() bool { return r.N%2 == 1 }

// maxRevocations bounds what a peer can make this host remember.
const maxRevocations = 1024

// Revocations returns what counts on this host, sorted by host.
func (tx *Tx) Revocations() ([]Revocation, error) {
	raw := tx.tx.Bucket(bucketMeta).Get(keyRevoked)
	if raw == nil {
		return nil, nil
	}
	var all []Revocation
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, damageError{fmt.Errorf("list of revoked hosts: %w", err)}
	}
	return all, nil
}

// Revoked reports whether a host is revoked.
func (tx *Tx) Revoked(id HostID) (bool, error) {
	all, err := tx.Revocations()
	return outOf(all, id), err
}

func outOf(all []Revocation, id HostID) bool {
	return slices.ContainsFunc(all, func(r Revocation) bool { return r.Host == id && r.Out() })
}

// Revoke revokes a host or takes it back. It is no error if that is so already.
func (tx *Tx) Revoke(id HostID, out bool) error {
	r := Revocation{Host: id}
	all, err := tx.Revocations()
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(all, func(r Revocation) bool { return r.Host == id }); i >= 0 {
		r = all[i]
	}
	if r.Out() == out {
		return nil
	}
	r.N++
	return tx.takeRevocations([]Revocation{r})
}

// takeRevocations raises what counts on this host. If that changes anything, all networks
// are touched, and what was told by a host that was taken back counts.
func (tx *Tx) takeRevocations(more []Revocation) error {
	all, err := tx.Revocations()
	if err != nil {
		return err
	}
	changed := false
	for _, r := range more {
		i, there := slices.BinarySearchFunc(all, r, func(a, b Revocation) int { return strings.Compare(string(a.Host), string(b.Host)) })
		switch {
		case there && all[i].N < r.N:
			all[i].N, changed = r.N, true
		case !there && len(all) < maxRevocations:
			all, changed = slices.Insert(all, i, r), true
		}
	}
	if !changed {
		return nil
	}
	raw, err := json.Marshal(all)
	if err != nil {
		return err
	}
	if _, err := tx.bump(HostVNI); err != nil { // peers are told
		return err
	}
	nets, err := tx.Networks()
	for _, n := range nets {
		tx.touch(n.VNI)
	}
	tx.peersWritten = true
	if err != nil {
		return err
	}
	if err := tx.tx.Bucket(bucketMeta).Put(keyRevoked, raw); err != nil {
		return err
	}
	return tx.AdoptRevocations() // ends, for each number only rises
}

// MergeRevocations takes over what a peer has told. It counts once the peer runs an
// encrypted network of this host's: nobody else has a say.
func (tx *Tx) MergeRevocations(owner HostID, all []Revocation) error {
	p, err := tx.Peer(owner)
	if err != nil {
		return err
	}
	all = all[:min(len(all), maxRevocations)]
	if !slices.Equal(p.Revoked, all) {
		p.Revoked = all
		tx.peersWritten = true
		if err := put(tx, bucketPeers, []byte(owner), p); err != nil {
			return err
		}
	}
	return nil
}

// AdoptRevocationsOf takes over what counts of what one peer has told. With the list of a
// peer that told nothing, as nearly all do, it looks at no other: that would be each list
// of each peer times all peers when a host begins from nothing.
func (tx *Tx) AdoptRevocationsOf(id HostID) error {
	p, err := tx.Peer(id)
	if err != nil || len(p.Revoked) == 0 {
		return err
	}
	return tx.AdoptRevocations()
}

// AdoptRevocations takes over what counts of what peers have told.
func (tx *Tx) AdoptRevocations() error {
	nets, err := tx.Networks()
	if err != nil {
		return err
	}
	var more []Revocation
	err = tx.ofPeers(func(p Peer, r *peerRecords) {
		if len(p.Revoked) > 0 && slices.ContainsFunc(r.nets, func(o PeerNetwork) bool { return o.Encrypted && runsOne(nets, o) }) {
			more = append(more, p.Revoked...)
		}
	})
	if err != nil {
		return err
	}
	return tx.takeRevocations(more)
}
