package store_test

import (
	"errors"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weftnet/weft/store"
)

func TestLeasesOfAPoolAreItsOwnAndInOrder(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "self"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	lease := func(pool, a string) store.Lease {
		return store.Lease{Pool: pool, Address: netip.MustParseAddr(a), Kind: "auto", Taken: time.Unix(1, 5).UTC()}
	}
	// One id is the beginning of another, and addresses hold every byte.
	first := []store.Lease{lease("p", "9.255.0.0"), lease("p", "10.0.0.0"), lease("p", "10.0.0.9"), lease("p", "10.0.0.10"), lease("p", "200.0.0.1")}
	second := []store.Lease{lease("p/1", "10.0.0.9"), lease("p/1", "fd00::1"), lease("p/1", "fd00::1:0:0:0")}
	equal := func(what string, got, want any) {
		t.Helper()
		if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
	update := func(fn func(tx *store.Tx) error) {
		t.Helper()
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	pools := []store.Pool{{ID: "p", Prefix: netip.MustParsePrefix("10.0.0.0/8"), Refs: 1}, {ID: "p/1", Sub: netip.MustParsePrefix("fd00::/64"), Opts: map[string]string{"a": "b"}}}
	update(func(tx *store.Tx) error {
		for k := len(pools) - 1; k >= 0; k-- {
			if err := tx.PutPool(pools[k]); err != nil {
				return err
			}
		}
		for _, l := range append(append([]store.Lease(nil), second...), first[4], first[2], first[0], first[3], first[1]) {
			if err := tx.PutLease(l); err != nil {
				return err
			}
		}
		return nil
	})
	update(func(tx *store.Tx) error {
		all, err := tx.Pools()
		equal("pools", all, pools)
		if err != nil {
			return err
		}
		a, err := tx.Leases("p")
		equal("leases of p", a, first)
		if err != nil {
			return err
		}
		b, err := tx.Leases("p/1")
		equal("leases of p/1", b, second)
		return err
	})
	update(func(tx *store.Tx) error {
		if err := tx.DeleteLease("p/1", netip.MustParseAddr("10.0.0.10")); err != nil {
			return err
		}
		if err := tx.DeletePool("unknown"); err != nil {
			return err
		}
		return tx.DeletePool("p")
	})
	update(func(tx *store.Tx) error {
		if _, err := tx.Pool("p"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("pool after its removal: %v", err)
		}
		if _, err := tx.Lease("p", first[0].Address); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("lease after its pool's removal: %v", err)
		}
		l, err := tx.Lease("p/1", second[0].Address)
		equal("the other pool's lease", l, second[0])
		return err
	})
}
