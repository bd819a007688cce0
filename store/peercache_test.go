package store_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestPeersRecordsAreThoseOfTheTransaction reads what a peer has from readers that
// began before a change, from the transaction that makes it, from one that fails,
// and from readers that begin after it, while all keep what they decoded.
func TestPeersRecordsAreThoseOfTheTransaction(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	nets := func(vnis ...store.VNI) (out []store.SharedNetwork) {
		for _, v := range vnis {
			out = append(out, store.SharedNetwork{VNI: v, Mode: "vxlan"})
		}
		return out
	}
	has := func(tx *store.Tx, when string, want int) {
		t.Helper()
		all, err := tx.PeerNetworks(owner)
		if err != nil || len(all) != want {
			t.Errorf("%s: the peer has %d networks, want %d (%v)", when, len(all), want, err)
		}
		for _, n := range all {
			if run, err := tx.RunBy(n.VNI); err != nil || len(run) != 1 {
				t.Errorf("%s: network %d is run by %v (%v)", when, n.VNI, run, err)
			}
		}
	}
	grow(t, db)
	update(t, db, func(tx *store.Tx) error {
		if err := tx.PutPeer(store.Peer{Host: store.Host{ID: owner, Epoch: 1}}); err != nil {
			return err
		}
		if err := tx.MergeNetworks(owner, 1, 1, nets(5)); err != nil {
			return err
		}
		has(tx, "in the transaction that writes", 1)
		return nil
	})
	began, changed := make(chan struct{}), make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		view(t, db, func(tx *store.Tx) error {
			has(tx, "reader, before the change", 1)
			close(began)
			<-changed
			has(tx, "reader, after the change that it does not see", 1)
			return nil
		})
	})
	<-began
	failure := errors.New("not today")
	err := db.Update(context.Background(), func(tx *store.Tx) error {
		if err := tx.MergeNetworks(owner, 1, 2, nets(5, 6)); err != nil {
			return err
		}
		has(tx, "in the transaction that fails", 2)
		return failure
	})
	if !errors.Is(err, failure) {
		t.Fatal(err)
	}
	view(t, db, func(tx *store.Tx) error { has(tx, "after the transaction that failed", 1); return nil })
	update(t, db, func(tx *store.Tx) error { return tx.MergeNetworks(owner, 1, 2, nets(5, 6, 7)) })
	close(changed)
	wait.Wait()
	view(t, db, func(tx *store.Tx) error { has(tx, "new reader", 3); return nil })
	update(t, db, func(tx *store.Tx) error { return tx.ForgetPeer(owner) })
	view(t, db, func(tx *store.Tx) error {
		has(tx, "forgotten", 0)
		peers, err := tx.Peers()
		if len(peers) != 0 {
			t.Errorf("peers are %+v", peers)
		}
		return err
	})
}

// grow makes room in the file: one that has to grow waits for its readers.
func grow(t *testing.T, db *store.DB) {
	t.Helper()
	growth := store.Network{ID: "growth", Options: map[string]string{"text": strings.Repeat("x", 1<<20)}}
	update(t, db, func(tx *store.Tx) error { return tx.PutNetwork(growth) })
	update(t, db, func(tx *store.Tx) error { return tx.DeleteNetwork(growth.ID) })
}

// TestNetworksAreThoseOfTheTransaction: the same of this host's own networks.
func TestNetworksAreThoseOfTheTransaction(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	has := func(tx *store.Tx, when string, want int) error {
		t.Helper()
		all, err := tx.Networks()
		if len(all) != want {
			t.Errorf("%s: this host has %d networks, want %d", when, len(all), want)
		}
		return err
	}
	puts := func(when string, want int, v store.VNI) func(tx *store.Tx) error {
		return func(tx *store.Tx) error {
			n := testNetwork(v)
			return errors.Join(has(tx, when+", before it writes", want-1), tx.PutNetwork(n), has(tx, when, want))
		}
	}
	grow(t, db)
	update(t, db, puts("the first transaction", 1, 5000))
	began, changed := make(chan struct{}), make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		view(t, db, func(tx *store.Tx) error {
			close(began)
			<-changed
			return has(tx, "reader that does not see the change", 1)
		})
	})
	<-began
	failure := errors.New("not today")
	err := db.Update(context.Background(), func(tx *store.Tx) error {
		return errors.Join(puts("the transaction that fails", 2, 5001)(tx), failure)
	})
	if !errors.Is(err, failure) {
		t.Fatal(err)
	}
	view(t, db, func(tx *store.Tx) error { return has(tx, "after the transaction that failed", 1) })
	update(t, db, puts("the second transaction", 2, 5001))
	close(changed)
	wait.Wait()
	view(t, db, func(tx *store.Tx) error { return has(tx, "new reader", 2) })
	update(t, db, func(tx *store.Tx) error { return tx.DeleteNetwork(testNetwork(5000).ID) })
	view(t, db, func(tx *store.Tx) error { return has(tx, "after one was removed", 1) })
}
