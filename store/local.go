package store

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// maxGone is how many deletions of a network are kept for peers that ask for the
// difference; one that is further behind gets the whole list.
const maxGone = 1024

// Network returns the network with Docker's id, or ErrNotFound.
func (tx *Tx) Network(id NetworkID) (Network, error) {
	return get[Network](tx, bucketNetworks, []byte(id), "network "+string(id))
}

// NetworkByVNI returns this host's network with the VNI, or ErrNotFound.
func (tx *Tx) NetworkByVNI(v VNI) (Network, error) {
	all, err := tx.Networks()
	if err != nil {
		return Network{}, err
	}
	for _, n := range all {
		if n.VNI == v {
			return n, nil
		}
	}
	return Network{}, fmt.Errorf("network with vni %d: %w", v, ErrNotFound)
}

// PutNetwork writes a network. Its VNI must not change while it exists.
func (tx *Tx) PutNetwork(n Network) error {
	if _, err := tx.bump(HostVNI); err != nil {
		return err
	}
	tx.touch(n.VNI) // which peers agree with it may change
	tx.networksWritten = true
	if err := put(tx, bucketNetworks, []byte(n.ID), n); err != nil || !n.Encrypted {
		return err
	}
	return tx.AdoptRevocations() // of hosts that run it too
}

// DeleteNetwork removes a network and its endpoints; an unknown one is no error.
func (tx *Tx) DeleteNetwork(id NetworkID) error {
	n, err := tx.Network(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	eps, err := tx.Endpoints(id)
	if err != nil {
		return err
	}
	for _, e := range eps {
		if err := tx.DeleteEndpoint(id, e.ID); err != nil {
			return err
		}
	}
	if _, err := tx.bump(HostVNI); err != nil {
		return err
	}
	tx.touch(n.VNI)
	tx.networksWritten = true
	return tx.tx.Bucket(bucketNetworks).Delete([]byte(id))
}

func endpointKey(n NetworkID, e EndpointID) []byte { return []byte(string(n) + "/" + string(e)) }

// Endpoint returns this host's endpoint, or ErrNotFound.
func (tx *Tx) Endpoint(n NetworkID, e EndpointID) (Endpoint, error) {
	return get[Endpoint](tx, bucketEndpoints, endpointKey(n, e), "endpoint "+string(e))
}

// Endpoints returns this host's endpoints of a network, sorted by id.
func (tx *Tx) Endpoints(n NetworkID) ([]Endpoint, error) {
	return list[Endpoint](tx, bucketEndpoints, endpointKey(n, ""))
}

// AllEndpoints returns all endpoints of this host.
func (tx *Tx) AllEndpoints() ([]Endpoint, error) { return list[Endpoint](tx, bucketEndpoints, nil) }

// PutEndpoint writes an endpoint and returns it with its new version.
func (tx *Tx) PutEndpoint(e Endpoint) (Endpoint, error) {
	seq, err := tx.bump(e.VNI)
	if err != nil {
		return e, err
	}
	e.Seq = seq
	if old, err := tx.Endpoint(e.Network, e.ID); len(e.Ports) > 0 || err == nil && len(old.Ports) > 0 {
		tx.touch(HostVNI) // the host's rules tell of them
	}
	return e, put(tx, bucketEndpoints, endpointKey(e.Network, e.ID), e)
}

// DeleteEndpoint removes an endpoint; an unknown one is no error.
func (tx *Tx) DeleteEndpoint(n NetworkID, id EndpointID) error {
	e, err := tx.Endpoint(n, id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	seq, err := tx.bump(e.VNI)
	if err != nil {
		return err
	}
	if len(e.Ports) > 0 {
		tx.touch(HostVNI)
	}
	gone := tx.tx.Bucket(bucketGone)
	if err := gone.Put(goneKey(e.VNI, seq), []byte(id)); err != nil {
		return err
	}
	if err := tx.trimGone(e.VNI); err != nil {
		return err
	}
	return tx.tx.Bucket(bucketEndpoints).Delete(endpointKey(n, id))
}

func goneKey(v VNI, seq uint64) []byte { return binary.BigEndian.AppendUint64(vniKey(v), seq) }

// trimGone forgets the oldest deletions beyond maxGone. The sequence number of
// the last one forgotten is the floor below which Delta answers in full.
func (tx *Tx) trimGone(v VNI) error {
	var keys [][]byte
	if err := scan(tx, bucketGone, vniKey(v), func(k, _ []byte) error {
		if len(k) == 12 {
			keys = append(keys, append([]byte(nil), k...))
		}
		return nil
	}); err != nil {
		return err
	}
	// A quarter at a time, so that a busy network does not pay on each call.
	if len(keys) <= maxGone+maxGone/4 {
		return nil
	}
	old := keys[:len(keys)-maxGone]
	for _, k := range old {
		if err := tx.tx.Bucket(bucketGone).Delete(k); err != nil {
			return err
		}
	}
	floor := binary.BigEndian.Uint64(old[len(old)-1][4:])
	return putUint(tx.tx, bucketSeq, floorKey(v), floor)
}

func floorKey(v VNI) []byte { return append([]byte("floor/"), vniKey(v)...) }

// bump raises and returns the version of what this host owns of a network;
// HostVNI stands for the list of its networks.
func (tx *Tx) bump(v VNI) (uint64, error) {
	tx.touch(v)
	seq := getUint(tx.tx, bucketSeq, vniKey(v)) + 1
	return seq, putUint(tx.tx, bucketSeq, vniKey(v), seq)
}

// Version returns the version of what this host owns of a network, 0 if nothing
// was ever there.
func (tx *Tx) Version(v VNI) uint64 { return getUint(tx.tx, bucketSeq, vniKey(v)) }

// Delta is the difference between two versions of what its owner has in a
// network. Full means that Endpoints is the whole list, not a difference.
type Delta struct {
	VNI       VNI              `json:"vni"`
	Epoch     uint64           `json:"epoch"`
	Seq       uint64           `json:"seq"`
	Boot      uint64           `json:"boot,omitempty"` // of the owner's process; 0: a version that does not tell
	Full      bool             `json:"full,omitempty"`
	Endpoints []SharedEndpoint `json:"endpoints,omitempty"`
}

// Delta returns what changed in this host's endpoints of a network since the
// version; since 0 means everything. Endpoints that have left are not shared.
func (tx *Tx) Delta(v VNI, since uint64) (Delta, error) {
	d := Delta{VNI: v, Seq: tx.Version(v), Full: since == 0 || since < getUint(tx.tx, bucketSeq, floorKey(v)) || since > tx.Version(v)}
	n, err := tx.NetworkByVNI(v)
	if errors.Is(err, ErrNotFound) {
		d.Full = true
		return d, nil
	}
	if err != nil {
		return d, err
	}
	eps, err := tx.Endpoints(n.ID)
	if err != nil {
		return d, err
	}
	there := make(map[EndpointID]bool, len(eps))
	for _, e := range eps {
		there[e.ID] = true
		if !d.Full && e.Seq <= since {
			continue
		}
		s := e.Shared()
		s.Gone = e.Left
		if d.Full && s.Gone {
			continue
		}
		d.Endpoints = append(d.Endpoints, s)
	}
	if d.Full {
		return d, nil
	}
	err = scan(tx, bucketGone, vniKey(v), func(k, id []byte) error {
		if len(k) != 12 {
			return nil
		}
		// One that was made again under its id is in the list above.
		if seq := binary.BigEndian.Uint64(k[4:]); seq > since && !there[EndpointID(id)] {
			d.Endpoints = append(d.Endpoints, SharedEndpoint{ID: EndpointID(id), Seq: seq, Gone: true})
		}
		return nil
	})
	return d, err
}
