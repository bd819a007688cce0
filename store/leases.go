package store

import "net/netip"

// Pool returns an address pool, or ErrNotFound.
func (tx *Tx) Pool(id string) (Pool, error) {
	return get[Pool](tx, bucketPools, []byte(id), "pool "+id)
}

// Pools returns all pools, sorted by id.
func (tx *Tx) Pools() ([]Pool, error) { return list[Pool](tx, bucketPools, nil) }

// PutPool writes a pool.
func (tx *Tx) PutPool(p Pool) error { return put(tx, bucketPools, []byte(p.ID), p) }

// DeletePool removes a pool with its leases; an unknown one is no error.
func (tx *Tx) DeletePool(id string) error {
	if err := removePrefix(tx, bucketLeases, leaseKey(id, netip.Addr{})); err != nil {
		return err
	}
	return tx.tx.Bucket(bucketPools).Delete([]byte(id))
}

// leaseKey orders the leases of a pool by address: the 16-byte form, so that
// numeric order is key order in both families. No address gives the prefix.
func leaseKey(pool string, a netip.Addr) []byte {
	key := append([]byte(pool), 0)
	if !a.IsValid() {
		return key
	}
	b := a.As16()
	return append(key, b[:]...)
}

// Lease returns the lease of an address, or ErrNotFound. A freed one that still
// cools is returned with Freed set.
func (tx *Tx) Lease(pool string, a netip.Addr) (Lease, error) {
	return get[Lease](tx, bucketLeases, leaseKey(pool, a), "lease of "+a.String())
}

// Leases returns the leases of a pool in order of address.
func (tx *Tx) Leases(pool string) ([]Lease, error) {
	return list[Lease](tx, bucketLeases, leaseKey(pool, netip.Addr{}))
}

// PutLease writes a lease.
func (tx *Tx) PutLease(l Lease) error {
	return put(tx, bucketLeases, leaseKey(l.Pool, l.Address), l)
}

// DeleteLease removes a lease; an unknown one is no error.
func (tx *Tx) DeleteLease(pool string, a netip.Addr) error {
	return tx.tx.Bucket(bucketLeases).Delete(leaseKey(pool, a))
}
