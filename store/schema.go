package store

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"go.etcd.io/bbolt"
)

// Schema is the version of the database's layout that this build writes. A newer
// one is refused, an older one is migrated by prepareSchema.
const Schema = 3

var (
	keySchema  = []byte("schema")
	keyEpoch   = []byte("epoch")
	keyFound   = []byte("founded")
	keyAddr    = []byte("address")
	keyCounter = []byte("counter")
	keyRevoked = []byte("revoked")
)

// prepareSchema makes the buckets of a new database or checks the version of an
// old one, and returns its epoch: a random number that peers compare, so that
// they fetch everything again after a database was lost.
func prepareSchema(tx *bbolt.Tx) (epoch uint64, err error) {
	was := uint64(0) // new
	if tx.Bucket(bucketMeta) != nil {
		switch was = getUint(tx, bucketMeta, keySchema); {
		case was > Schema:
			return 0, fmt.Errorf("%w: its schema is %d, this version knows %d; install the newer plugin again", ErrNewerSchema, was, Schema)
		case was == 0:
			return 0, damageError{errors.New("schema version is missing")}
		}
	}
	for since, list := range buckets {
		for _, b := range list {
			// Those of a schema are made at once: one that is missing was lost.
			if (tx.Bucket(b) != nil) != (uint64(since) <= was) {
				return 0, damageError{fmt.Errorf("bucket %s does not fit the others", b)}
			}
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return 0, err
			}
		}
	}
	if err := putUint(tx, bucketMeta, keySchema, Schema); err != nil {
		return 0, err
	}
	epoch = getUint(tx, bucketMeta, keyEpoch)
	if epoch == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails (crypto/rand)
		epoch = binary.BigEndian.Uint64(b[:]) | 1
		if err := putUint(tx, bucketMeta, keyEpoch, epoch); err != nil {
			return 0, err
		}
	}
	return epoch, nil
}

// Founded reports whether SetFounded was called on this database: if not, it is
// new, or its first user was killed before he had put into it what he knew.
func (tx *Tx) Founded() bool { return getUint(tx.tx, bucketMeta, keyFound) != 0 }

// SetFounded says that the database holds what it has to begin with.
func (tx *Tx) SetFounded() error { return putUint(tx.tx, bucketMeta, keyFound, 1) }

// LastAddress returns the underlay address at which this database's host was last a
// member of the cluster, or the zero Addr. Another host may live there, or this one's
// original if the file was copied.
func (tx *Tx) LastAddress() netip.Addr {
	a, _ := netip.ParseAddr(string(tx.tx.Bucket(bucketMeta).Get(keyAddr)))
	return a
}

// PutLastAddress notes the address.
func (tx *Tx) PutLastAddress(a netip.Addr) error {
	return tx.tx.Bucket(bucketMeta).Put(keyAddr, []byte(a.String()))
}

// LastCounter returns the counter of the last host record that was signed with this
// database, or 0. The next one is above it, also if the clock was set back.
func (tx *Tx) LastCounter() uint64 { return getUint(tx.tx, bucketMeta, keyCounter) }

// PutLastCounter notes the counter.
func (tx *Tx) PutLastCounter(n uint64) error { return putUint(tx.tx, bucketMeta, keyCounter, n) }

// checkRecords decodes every record once.
func checkRecords(b *bbolt.Tx) error {
	check := func(bucket []byte, decode func([]byte) error) error {
		return b.Bucket(bucket).ForEach(func(k, v []byte) error {
			if err := decode(v); err != nil {
				return damageError{fmt.Errorf("record %q in %s: %w", k, bucket, err)}
			}
			return nil
		})
	}
	for _, c := range []struct {
		bucket []byte
		decode func([]byte) error
	}{
		{bucketNetworks, decodes[Network]},
		{bucketEndpoints, decodes[Endpoint]},
		{bucketPeers, decodes[Peer]},
		{bucketPeerNets, decodes[PeerNetwork]},
		{bucketRemote, decodes[RemoteEndpoint]},
		{bucketPools, decodes[Pool]},
		{bucketLeases, decodes[Lease]},
		{bucketAllocs, decodes[Allocation]},
		{bucketNodes, decodes[Node]},
		{bucketServices, decodes[[]Service]},
	} {
		if err := check(c.bucket, c.decode); err != nil {
			return err
		}
	}
	return nil
}

func decodes[T any](raw []byte) error {
	var v T
	return json.Unmarshal(raw, &v)
}
