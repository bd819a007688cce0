package store

import (
	"net/netip"
	"time"
)

// Allocation returns what was answered for a network, or ErrNotFound.
func (tx *Tx) Allocation(id NetworkID) (Allocation, error) {
	return get[Allocation](tx, bucketAllocs, []byte(id), "allocation of network "+string(id))
}

// Allocations returns all of them, sorted by id.
func (tx *Tx) Allocations() ([]Allocation, error) { return list[Allocation](tx, bucketAllocs, nil) }

// PutAllocation writes an allocation.
func (tx *Tx) PutAllocation(a Allocation) error { return put(tx, bucketAllocs, []byte(a.ID), a) }

// DeleteAllocation removes an allocation; an unknown one is no error.
func (tx *Tx) DeleteAllocation(id NetworkID) error {
	return tx.tx.Bucket(bucketAllocs).Delete([]byte(id))
}

// Nodes returns the hosts of the Swarm, sorted by address as text.
func (tx *Tx) Nodes() ([]Node, error) { return list[Node](tx, bucketNodes, nil) }

// PutNode writes a node, and tells watchers of HostVNI.
func (tx *Tx) PutNode(n Node) error {
	tx.touch(HostVNI)
	return put(tx, bucketNodes, []byte(n.Address.String()), n)
}

// Meet adds nodes that are not known yet.
func (tx *Tx) Meet(addresses []netip.Addr, now time.Time) error {
	for _, a := range addresses {
		if tx.tx.Bucket(bucketNodes).Get([]byte(a.String())) != nil {
			continue
		}
		if err := tx.PutNode(Node{Address: a, Heard: now.UTC()}); err != nil {
			return err
		}
	}
	return nil
}

// DeleteNode removes a node; an unknown one is no error.
func (tx *Tx) DeleteNode(a netip.Addr) error {
	return tx.tx.Bucket(bucketNodes).Delete([]byte(a.String()))
}
