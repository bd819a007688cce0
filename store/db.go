package store

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Buckets of the database. A key that holds a VNI holds it as four big-endian
// bytes, so that the records of one network lie together.
var (
	bucketMeta      = []byte("meta")      // "schema", "epoch", "founded" → uint64
	bucketNetworks  = []byte("networks")  // NetworkID → Network
	bucketEndpoints = []byte("endpoints") // NetworkID "/" EndpointID → Endpoint
	bucketSeq       = []byte("seq")       // VNI → uint64, version of what we own
	bucketGone      = []byte("gone")      // VNI seq → EndpointID, deletions that peers may not know
	bucketPeers     = []byte("peers")     // HostID → Peer
	bucketPeerNets  = []byte("peernets")  // HostID "/" VNI → PeerNetwork
	bucketRemote    = []byte("remote")    // VNI HostID "/" EndpointID → RemoteEndpoint
	bucketPools     = []byte("pools")     // Pool.ID → Pool
	bucketLeases    = []byte("leases")    // Pool.ID NUL address → Lease
	bucketAllocs    = []byte("allocs")    // NetworkID → Allocation
	bucketNodes     = []byte("nodes")     // address → Node
	bucketServices  = []byte("services")  // HostID → []Service that it told

	// By the schema that brought them.
	buckets = [Schema + 1][][]byte{
		1: {bucketMeta, bucketNetworks, bucketEndpoints, bucketSeq, bucketGone,
			bucketPeers, bucketPeerNets, bucketRemote, bucketPools, bucketLeases},
		2: {bucketAllocs, bucketNodes},
		3: {bucketServices},
	}
)

// lockTimeout is how long Open waits for another process to let go of the file.
// A plugin that Docker replaces may need a moment to end.
const lockTimeout = 3 * time.Second

// DB is the database of one host. All methods may be called from any goroutine.
type DB struct {
	bolt *bbolt.DB
	self Host

	// SetAside is the path to which a damaged file was moved by Open, or "".
	SetAside string

	mu       sync.Mutex // guards self and what follows
	watchers []*Watch

	memo  memo
	peers peerCache

	began map[VNI]uint64 // versions when the file was opened; not changed
}

// Open opens or makes the database file at path for the host self. A file that
// is empty or cannot be read is moved to path.bad-<unix seconds> and a new
// database takes its place, which SetAside tells; the caller rebuilds what it can
// (Tx.Founded). Errors: ErrNewerSchema (nothing is changed), ErrLocked, and those
// of the file system.
func Open(path string, self Host) (*DB, error) {
	bolt, epoch, err := openChecked(path)
	setAside := ""
	if err != nil && isDamage(err) {
		setAside = fmt.Sprintf("%s.bad-%d", path, time.Now().Unix())
		if err := os.Rename(path, setAside); err != nil {
			return nil, fmt.Errorf("set damaged database aside: %w", err)
		}
		bolt, epoch, err = openChecked(path)
	}
	if err != nil {
		return nil, fmt.Errorf("database %s: %w", path, err)
	}
	self.Epoch = epoch
	began := map[VNI]uint64{}
	if err := bolt.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketSeq).ForEach(func(k, _ []byte) error {
			if len(k) == 4 {
				began[VNI(binary.BigEndian.Uint32(k))] = getUint(tx, bucketSeq, k)
			}
			return nil
		})
	}); err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", path, err), bolt.Close())
	}
	return &DB{began: began, bolt: bolt, self: self, SetAside: setAside,
		peers: peerCache{owners: map[HostID]*peerRecords{}, changed: map[HostID]int{}}}, nil
}

// Began returns Tx.Version as it was when the database was opened. A peer that holds a
// higher one of an earlier process had it from a newer copy of the file than this one.
func (db *DB) Began(v VNI) uint64 { return db.began[v] }

// damageError marks content that cannot be what we wrote.
type damageError struct{ err error }

func (e damageError) Error() string { return "damaged: " + e.err.Error() }
func (e damageError) Unwrap() error { return e.err }

func isDamage(err error) bool {
	var d damageError
	return errors.As(err, &d) || errors.Is(err, bolterrors.ErrInvalid) ||
		errors.Is(err, bolterrors.ErrChecksum) || errors.Is(err, bolterrors.ErrVersionMismatch) ||
		errors.Is(err, bolterrors.ErrIncompatibleValue)
}

// openChecked opens the file, brings it to the current schema and reads every
// record once, so that damage shows now and not in a later call.
func openChecked(path string) (_ *bbolt.DB, epoch uint64, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, 0, err
	}
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("is not a regular file but %s", st.Mode().Type())
	} else if err == nil && st.Size() == 0 {
		// bbolt would make a new database of it, and what was lost be lost silently.
		return nil, 0, damageError{errors.New("the file is empty")}
	}
	// bbolt reads the file through a memory map: a wrong page number in a
	// damaged file is a fault or a panic, not an error.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	var bolt *bbolt.DB
	defer func() {
		if p := recover(); p != nil {
			err = damageError{fmt.Errorf("%v", p)}
		}
		if err != nil && bolt != nil {
			// Closing may fault again on the same page; the file is given up anyway.
			func() { defer func() { _ = recover() }(); _ = bolt.Close() }()
		}
	}()
	bolt, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, 0, ErrLocked
	}
	if st, statErr := os.Stat(path); err != nil && statErr == nil && st.Size() < int64(2*os.Getpagesize()) {
		return nil, 0, damageError{err} // cut off; bbolt has no name for that
	}
	if err != nil {
		return nil, 0, err
	}
	// The lock is held from here on, so nobody writes while the file is read.
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	if err := checkPages(raw, uint64(bolt.Info().PageSize)); err != nil {
		return nil, 0, damageError{err}
	}
	err = bolt.Update(func(tx *bbolt.Tx) error {
		epoch, err = prepareSchema(tx)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	err = bolt.View(checkRecords)
	return bolt, epoch, err
}

// Close ends the database. Calls after it fail.
func (db *DB) Close() error { return db.bolt.Close() }

// Self returns this host's record.
func (db *DB) Self() Host {
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.self
}

// SetAddress changes this host's underlay address and the MTU of its link, and says so to
// watchers of HostVNI when they differ.
func (db *DB) SetAddress(a netip.Addr, mtu int) {
	db.mu.Lock()
	changed := db.self.Address != a || db.self.MTU != mtu
	db.self.Address, db.self.MTU = a, mtu
	db.mu.Unlock()
	if changed {
		db.notify(map[VNI]bool{HostVNI: true})
	}
}

// SetTunnel changes what peers need to encrypt to this host, and tells watchers of
// HostVNI and of the networks that are encrypted, or routed: across a NAT these are, too.
func (db *DB) SetTunnel(t Tunnel) error {
	touched := map[VNI]bool{HostVNI: true}
	err := db.View(func(tx *Tx) error {
		nets, err := tx.Networks()
		for _, n := range nets {
			if n.Routed() {
				touched[n.VNI] = true
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	db.mu.Lock()
	db.self.Tunnel = t
	db.mu.Unlock()
	db.notify(touched)
	return nil
}

// Update runs fn in one read-write transaction: all of it is on disk when Update
// returns nil, nothing of it otherwise. Watchers hear of the networks touched.
func (db *DB) Update(ctx context.Context, fn func(*Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	touched := map[VNI]bool{}
	err := db.bolt.Update(func(b *bbolt.Tx) error {
		tx := &Tx{tx: b, memo: &db.memo, peers: &db.peers, touched: touched, owners: map[HostID]bool{}}
		if err := fn(tx); err != nil {
			return err
		}
		db.peers.drop(tx)
		return nil
	})
	if err != nil {
		return err
	}
	db.notify(touched)
	return nil
}

// View runs fn in a read-only transaction.
func (db *DB) View(fn func(*Tx) error) error {
	return db.bolt.View(func(b *bbolt.Tx) error { return fn(&Tx{tx: b, memo: &db.memo, peers: &db.peers}) })
}

// Watch tells which networks may look different now. Many changes become one.
type Watch struct {
	C <-chan struct{} // receives when Take has something

	c       chan struct{}
	mu      sync.Mutex
	pending map[VNI]bool
}

// Watch returns a new watch; it lives as long as the database.
func (db *DB) Watch() *Watch {
	c := make(chan struct{}, 1)
	w := &Watch{C: c, c: c, pending: map[VNI]bool{}}
	db.mu.Lock()
	db.watchers = append(db.watchers, w)
	db.mu.Unlock()
	return w
}

// Take returns and forgets the networks touched since the last Take.
func (w *Watch) Take() []VNI {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]VNI, 0, len(w.pending))
	for v := range w.pending {
		out = append(out, v)
	}
	clear(w.pending)
	return out
}

func (w *Watch) add(touched map[VNI]bool) {
	w.mu.Lock()
	for v := range touched {
		w.pending[v] = true
	}
	w.mu.Unlock()
	select {
	case w.c <- struct{}{}:
	default:
	}
}

func (db *DB) notify(touched map[VNI]bool) {
	if len(touched) == 0 {
		return
	}
	db.mu.Lock()
	watchers := db.watchers
	db.mu.Unlock()
	for _, w := range watchers {
		w.add(touched)
	}
}

// Tx is a transaction. Values returned may share maps and slices with each other:
// do not change those.
type Tx struct {
	tx      *bbolt.Tx
	memo    *memo
	peers   *peerCache
	touched map[VNI]bool    // networks that look different now; nil in a read-only transaction
	owners  map[HostID]bool // peers whose networks or endpoints were written

	peersWritten    bool // some peer itself
	networksWritten bool // some network of this host
}

func (tx *Tx) touch(v VNI) { tx.touched[v] = true }

func (tx *Tx) touchOwner(id HostID, v VNI) {
	tx.touched[v] = true
	tx.owners[id] = true
}

func get[T any](tx *Tx, bucket []byte, key []byte, what string) (T, error) {
	raw := tx.tx.Bucket(bucket).Get(key)
	if raw == nil {
		var none T
		return none, fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	v, err := decode[T](tx, bucket, key, raw)
	if err != nil {
		return v, fmt.Errorf("%s: %w", what, err)
	}
	return v, nil
}

func put(tx *Tx, bucket []byte, key []byte, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.tx.Bucket(bucket).Put(key, raw)
}

// list returns the records whose key starts with prefix, in key order, and remembers
// them decoded.
func list[T any](tx *Tx, bucket []byte, prefix []byte) ([]T, error) {
	return collect(tx, bucket, prefix, func(key, raw []byte) (T, error) { return decode[T](tx, bucket, key, raw) })
}

func collect[T any](tx *Tx, bucket, prefix []byte, decode func(key, raw []byte) (T, error)) ([]T, error) {
	var out []T
	err := scan(tx, bucket, prefix, func(key, raw []byte) error {
		v, err := decode(key, raw)
		if err != nil {
			return fmt.Errorf("record in %s: %w", bucket, err)
		}
		out = append(out, v)
		return nil
	})
	return out, err
}

func scan(tx *Tx, bucket, prefix []byte, fn func(key, raw []byte) error) error {
	c := tx.tx.Bucket(bucket).Cursor()
	for k, v := c.Seek(prefix); k != nil && hasPrefix(k, prefix); k, v = c.Next() {
		if err := fn(k, v); err != nil {
			return err
		}
	}
	return nil
}

// removePrefix deletes all records whose key starts with prefix. Deleting while
// a cursor walks skips entries, so the keys are collected first.
func removePrefix(tx *Tx, bucket, prefix []byte) error {
	var keys [][]byte
	if err := scan(tx, bucket, prefix, func(k, _ []byte) error {
		keys = append(keys, append([]byte(nil), k...))
		return nil
	}); err != nil {
		return err
	}
	for _, k := range keys {
		if err := tx.tx.Bucket(bucket).Delete(k); err != nil {
			return err
		}
	}
	return nil
}

func hasPrefix(k, p []byte) bool { return len(k) >= len(p) && string(k[:len(p)]) == string(p) }

func vniKey(v VNI) []byte { return binary.BigEndian.AppendUint32(nil, uint32(v)) }

func getUint(tx *bbolt.Tx, bucket, key []byte) uint64 {
	if raw := tx.Bucket(bucket).Get(key); len(raw) == 8 {
		return binary.BigEndian.Uint64(raw)
	}
	return 0
}

func putUint(tx *bbolt.Tx, bucket, key []byte, v uint64) error {
	return tx.Bucket(bucket).Put(key, binary.BigEndian.AppendUint64(nil, v))
}
