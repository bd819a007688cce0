package store

import (
	"encoding/json"
	"errors"
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

// Bounds of what a peer can make this host remember. The last number is odd: whatever
// peers tell, a host can be revoked.
const (
	maxRevocations = 1024
	lastRevocation = 1<<32 - 1
)

// valid reports whether Revoke can have made it.
func (r Revocation) valid() bool { return r.N > 0 && r.N <= lastRevocation }

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
	return slices.DeleteFunc(all, func(r Revocation) bool { return !r.valid() }), nil
}

// Revoked reports whether a host is revoked.
func (tx *Tx) Revoked(id HostID) (bool, error) {
	all, err := tx.Revocations()
	return outOf(all, id), err
}

// RevokedPeers returns the known peers that are revoked.
func (tx *Tx) RevokedPeers() ([]Peer, error) {
	out, err := tx.Revocations()
	if err != nil || len(out) == 0 {
		return nil, err
	}
	all, err := tx.Peers()
	return slices.DeleteFunc(slices.Clone(all), func(p Peer) bool { return !outOf(out, p.ID) }), err
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
	if r.N == lastRevocation {
		return fmt.Errorf("host %s is revoked for good, with the highest number there is (%d); remove its state folder, so that it gets another id", id, r.N)
	}
	r.N++
	if err := tx.takeRevocations([]Revocation{r}, true); err != nil {
		return err
	}
	if now, err := tx.Revoked(id); err != nil || now != out {
		return errors.Join(err, fmt.Errorf("host %s: what other hosts have told goes before it, so nothing changed", id))
	}
	return nil
}

// takeRevocations raises what counts on this host. If that changes anything, all networks
// are touched, and what was told by a host that was taken back counts. The list is limited
// for what peers tell, not for this host's own command.
func (tx *Tx) takeRevocations(more []Revocation, own bool) error {
	all, err := tx.Revocations()
	if err != nil {
		return err
	}
	peers, err := tx.Peers()
	if err != nil {
		return err
	}
	peer := func(id HostID) bool { return slices.ContainsFunc(peers, func(p Peer) bool { return p.ID == id }) }
	changed := false
	for _, r := range more {
		i, there := slices.BinarySearchFunc(all, r, byHost)
		switch {
		case there && all[i].N < r.N:
			all[i].N, changed = r.N, true
		case !there:
			if len(all) >= maxRevocations && (own || peer(r.Host)) {
				all = makeRoom(all, peer)
			}
			if len(all) < maxRevocations || own {
				i, _ = slices.BinarySearchFunc(all, r, byHost)
				all, changed = slices.Insert(all, i, r), true
			}
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

func byHost(a, b Revocation) int { return strings.Compare(string(a.Host), string(b.Host)) }

// makeRoom takes one entry about a host that is no peer out of a full list, one that was
// taken back if there is one: a peer may have made the hosts up. Without any it takes none.
func makeRoom(all []Revocation, peer func(HostID) bool) []Revocation {
	least := -1
	for i, r := range all {
		if (least < 0 || all[least].Out() && !r.Out()) && !peer(r.Host) {
			least = i
		}
	}
	if least < 0 {
		return all
	}
	return slices.Delete(all, least, least+1)
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

// AdoptRevocations takes over what counts of what peers have told: of themselves they have
// no say, or a revoked host would take that back.
func (tx *Tx) AdoptRevocations() error {
	nets, err := tx.Networks()
	if err != nil {
		return err
	}
	var more []Revocation
	err = tx.ofPeers(func(p Peer, r *peerRecords) {
		if len(p.Revoked) > 0 && slices.ContainsFunc(r.nets, func(o PeerNetwork) bool { return o.Encrypted && runsOne(nets, o) }) {
			for _, r := range p.Revoked {
				if r.Host != p.ID && r.valid() {
					more = append(more, r)
				}
			}
		}
	})
	if err != nil {
		return err
	}
	return tx.takeRevocations(more, false)
}
