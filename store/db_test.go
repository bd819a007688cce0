package store_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/weftnet/weft/store"
)

func openDB(t testing.TB, path string) *store.DB {
	t.Helper()
	db, err := store.Open(path, store.Host{ID: "self"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func tempDB(t testing.TB) *store.DB {
	t.Helper()
	return openDB(t, filepath.Join(t.TempDir(), "weft.db"))
}

func update(t testing.TB, db *store.DB, fn func(*store.Tx) error) {
	t.Helper()
	if err := db.Update(context.Background(), fn); err != nil {
		t.Fatal(err)
	}
}

func view(t testing.TB, db *store.DB, fn func(*store.Tx) error) {
	t.Helper()
	if err := db.View(fn); err != nil {
		t.Fatal(err)
	}
}

func testNetwork(v store.VNI) store.Network {
	return store.Network{ID: store.NetworkID(fmt.Sprintf("net%d", v)), VNI: v, Mode: "vxlan",
		Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/16"), Gateway: netip.MustParseAddr("10.1.0.1")}}}
}

func testEndpoint(v store.VNI, id string) store.Endpoint {
	return store.Endpoint{ID: store.EndpointID(id), Network: testNetwork(v).ID, VNI: v, MAC: store.DeriveMAC(id),
		IPv4: netip.MustParsePrefix("10.1.0.7/16")}
}

// fill writes some records of every kind.
func fill(t testing.TB, db *store.DB, count int) {
	t.Helper()
	update(t, db, func(tx *store.Tx) error {
		errs := []error{tx.PutNetwork(testNetwork(5000)), tx.PutPool(store.Pool{ID: "p", Prefix: netip.MustParsePrefix("10.1.0.0/16")}),
			tx.PutLease(store.Lease{Pool: "p", Address: netip.MustParseAddr("10.1.0.7")}),
			tx.PutPeer(store.Peer{Host: store.Host{ID: "peer"}}),
			tx.MergeNetworks("peer", 1, 1, []store.SharedNetwork{testNetwork(5000).Shared()})}
		d := store.Delta{VNI: 5000, Epoch: 1, Seq: 1, Full: true}
		for i := range count {
			e := testEndpoint(5000, fmt.Sprint("ep", i))
			d.Endpoints = append(d.Endpoints, e.Shared())
			_, err := tx.PutEndpoint(e)
			errs = append(errs, err)
		}
		_, err := tx.MergeEndpoints("peer", 0, d)
		return errors.Join(append(errs, err)...)
	})
}

func endpointIDs(t testing.TB, db *store.DB, v store.VNI) (out []string) {
	t.Helper()
	view(t, db, func(tx *store.Tx) error {
		eps, err := tx.Endpoints(testNetwork(v).ID)
		for _, e := range eps {
			out = append(out, string(e.ID))
		}
		return err
	})
	return out
}

func TestCommittedRecordsSurviveACrashAndOthersDoNot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "weft.db")
	db := openDB(t, path)
	update(t, db, func(tx *store.Tx) error { return tx.PutNetwork(testNetwork(5000)) })
	// What a crash leaves is the file as it is at that instant.
	crash := func(name string) *store.DB {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(dir, name)
		if err := os.WriteFile(copied, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		return openDB(t, copied)
	}
	var want []string
	for i := range 20 {
		id := fmt.Sprintf("ep%02d", i)
		var during *store.DB
		update(t, db, func(tx *store.Tx) error {
			_, err := tx.PutEndpoint(testEndpoint(5000, id))
			during = crash(fmt.Sprint("during", i))
			return err
		})
		if got := endpointIDs(t, during, 5000); !slices.Equal(got, want) {
			t.Fatalf("crash inside transaction %d left %v, want %v", i, got, want)
		}
		want = append(want, id)
		after := crash(fmt.Sprint("after", i))
		if got := endpointIDs(t, after, 5000); !slices.Equal(got, want) {
			t.Fatalf("crash after transaction %d left %v, want %v", i, got, want)
		}
		if after.SetAside != "" || after.Self().Epoch != db.Self().Epoch {
			t.Fatalf("after a crash: set aside %q, epoch %d, want %d", after.SetAside, after.Self().Epoch, db.Self().Epoch)
		}
	}
	boom := errors.New("refused")
	if err := db.Update(t.Context(), func(tx *store.Tx) error {
		return errors.Join(tx.DeleteNetwork(testNetwork(5000).ID), boom)
	}); !errors.Is(err, boom) {
		t.Errorf("failed transaction: %v", err)
	}
	if got := endpointIDs(t, db, 5000); !slices.Equal(got, want) {
		t.Errorf("failed transaction left %v, want %v", got, want)
	}
}

func TestDamagedFileIsSetAside(t *testing.T) {
	whole := func() []byte {
		path := filepath.Join(t.TempDir(), "weft.db")
		db := openDB(t, path)
		fill(t, db, 300)
		// bbolt has two meta pages; when one is torn, it goes on with the other, that
		// is with the last transaction but one. Let both hold all.
		for i := range 2 {
			update(t, db, func(tx *store.Tx) error { return tx.PutPool(store.Pool{ID: "q", Refs: i}) })
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}()
	page := os.Getpagesize()
	used := len(whole)
	rng := rand.New(rand.NewPCG(1, 2))
	cases := map[string]func([]byte) []byte{
		"text":      func([]byte) []byte { return []byte("this is no database\n") },
		"zeros":     func([]byte) []byte { return make([]byte, 16*page) },
		"both meta": func(b []byte) []byte { clear(b[:2*page]); return b },
		"record":    func(b []byte) []byte { return bytes.ReplaceAll(b, []byte(`"mode":"vxlan"`), []byte(`"mode":"vxla}]`)) },
	}
	for n := 1; n*page < used; n++ {
		cases[fmt.Sprintf("cut after page %d", n)] = func(b []byte) []byte { return b[:n*page] }
		cases[fmt.Sprintf("cut inside page %d", n)] = func(b []byte) []byte { return b[:n*page+page/2] }
		cases[fmt.Sprintf("page %d zero", n)] = func(b []byte) []byte { clear(b[n*page : min((n+1)*page, used)]); return b }
		for i := range 8 {
			cases[fmt.Sprintf("page %d random %d", n, i)] = func(b []byte) []byte {
				// The first bytes of a page hold its number, type and the places of its elements.
				at := n*page + rng.IntN(64)
				binary.LittleEndian.PutUint64(b[at:], rng.Uint64())
				return b
			}
		}
	}
	var aside, intact int
	for name, damage := range cases {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "weft.db")
			bad := damage(bytes.Clone(whole))
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			db := openDB(t, path)
			if db.SetAside == "" { // the damage hit what nothing needs
				intact++
				if got := len(endpointIDs(t, db, 5000)); got != 300 {
					t.Errorf("%d endpoints are left and nobody was told", got)
				}
				return
			}
			aside++
			if got := len(endpointIDs(t, db, 5000)); got != 0 {
				t.Errorf("new database has %d endpoints", got)
			}
			if kept, err := os.ReadFile(db.SetAside); err != nil || len(kept) < len(bad) {
				t.Errorf("file set aside: %d bytes of %d, %v", len(kept), len(bad), err)
			}
			update(t, db, func(tx *store.Tx) error { return tx.PutNetwork(testNetwork(5000)) })
		})
	}
	t.Logf("figure: %d damaged files set aside, %d in which the damage did not matter", aside, intact)
	if aside < intact/4 {
		t.Error("hardly any damage was found")
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	newer := filepath.Join(dir, "newer.db")
	db := openDB(t, newer)
	fill(t, db, 1)
	if _, err := store.Open(newer, store.Host{}); !errors.Is(err, store.ErrLocked) {
		t.Errorf("file in use: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	bolt, err := bbolt.Open(newer, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bolt.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, store.Schema+1))
	}), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(newer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(newer, store.Host{}); !errors.Is(err, store.ErrNewerSchema) {
		t.Errorf("newer schema: %v", err)
	}
	after, err := os.ReadFile(newer)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("file of a newer version was changed (%v)", err)
	}
	if _, err := store.Open(dir, store.Host{}); err == nil {
		t.Error("a folder was opened")
	}
}

func TestReopenKeepsEpochAndNewFileHasAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.db")
	db := openDB(t, path)
	first := db.Self().Epoch
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = openDB(t, path)
	if got := db.Self().Epoch; got != first || first == 0 {
		t.Errorf("epoch %d after reopening, was %d", got, first)
	}
	if other := tempDB(t).Self().Epoch; other == first {
		t.Errorf("two databases have epoch %d", other)
	}
}

func TestWatchTellsTheNetworksOnce(t *testing.T) {
	db := tempDB(t)
	w := db.Watch()
	for i := range 3 {
		update(t, db, func(tx *store.Tx) error {
			if err := tx.PutNetwork(testNetwork(5000)); err != nil {
				return err
			}
			_, err := tx.PutEndpoint(testEndpoint(5000, fmt.Sprint(i)))
			return err
		})
	}
	select {
	case <-w.C:
	case <-time.After(5 * time.Second):
		t.Fatal("no word of a change")
	}
	got := w.Take()
	slices.Sort(got)
	if !slices.Equal(got, []store.VNI{store.HostVNI, 5000}) {
		t.Errorf("changed networks %v", got)
	}
	if again := w.Take(); len(again) != 0 {
		t.Errorf("told again of %v", again)
	}
	db.SetAddress(netip.MustParseAddr("192.0.2.1"), 1500)
	if got := w.Take(); !slices.Equal(got, []store.VNI{store.HostVNI}) {
		t.Errorf("address change: %v", got)
	}
	db.SetAddress(netip.MustParseAddr("192.0.2.1"), 1500)
	if got := w.Take(); len(got) != 0 {
		t.Errorf("same address: %v", got)
	}
}

// FuzzOpen changes bytes of a good file: it is opened, or set aside, never worse.
func FuzzOpen(f *testing.F) {
	path := filepath.Join(f.TempDir(), "weft.db")
	db := openDB(f, path)
	fill(f, db, 5)
	if err := db.Close(); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(0), []byte{1, 2, 3})
	f.Add(uint32(2*os.Getpagesize()+8), []byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, at uint32, patch []byte) {
		raw := bytes.Clone(whole)
		copy(raw[int(at)%len(raw):], patch)
		path := filepath.Join(t.TempDir(), "weft.db")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := store.Open(path, store.Host{})
		if err != nil && !errors.Is(err, store.ErrNewerSchema) {
			t.Fatalf("cannot be opened and was not set aside: %v", err)
		}
		if err == nil {
			_ = db.Close()
		}
	})
}

// A database of schema 1 has no records of Swarm; it gets their buckets.
func TestOlderSchemaIsMigrated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weft.db")
	db, err := store.Open(path, store.Host{})
	if err != nil {
		t.Fatal(err)
	}
	put := func(fn func(*store.Tx) error) {
		t.Helper()
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	put(func(tx *store.Tx) error { return tx.PutNetwork(store.Network{ID: "n", VNI: 4096}) })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	bolt, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bolt.Update(func(tx *bbolt.Tx) error {
		return errors.Join(tx.DeleteBucket([]byte("allocs")), tx.DeleteBucket([]byte("nodes")), tx.DeleteBucket([]byte("services")),
			tx.Bucket([]byte("meta")).Put([]byte("schema"), binary.BigEndian.AppendUint64(nil, 1)))
	}), bolt.Close()); err != nil {
		t.Fatal(err)
	}
	if db, err = store.Open(path, store.Host{}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	put(func(tx *store.Tx) error { return tx.PutAllocation(store.Allocation{ID: "n"}) })
	if err := db.View(func(tx *store.Tx) error {
		_, err := tx.Network("n")
		return err
	}); err != nil {
		t.Error(err)
	}
}
