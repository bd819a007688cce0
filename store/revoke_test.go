package store_test

import (
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestRevocation: what a peer says counts once it runs an encrypted network of this
// host's, stays when the peer is gone, and can be taken back.
func TestRevocation(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	crypt := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Encrypted: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	update := func(fn func(tx *store.Tx) error) {
		t.Helper()
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	revoked := func() (out bool) {
		t.Helper()
		if err := db.View(func(tx *store.Tx) (err error) { out, err = tx.Revoked("c"); return err }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, id := range []store.HostID{"b", "c"} {
		update(func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: store.Host{ID: id, Epoch: 1}}) })
		update(func(tx *store.Tx) error { return tx.MergeNetworks(id, 1, 1, []store.SharedNetwork{crypt.Shared()}) })
	}
	told := func(n uint64) {
		update(func(tx *store.Tx) error {
			if err := tx.MergeRevocations("b", []store.Revocation{{Host: "c", N: n}}); err != nil {
				return err
			}
			return tx.AdoptRevocationsOf("b")
		})
	}
	told(1)
	if revoked() {
		t.Error("a peer that shares no encrypted network has a say")
	}
	update(func(tx *store.Tx) error { return tx.PutNetwork(crypt) })
	if !revoked() {
		t.Error("the peer shares an encrypted network now, and has no say")
	}
	if s, err := db.Snapshot(7); err != nil || len(s.Peers) != 1 || s.Peers[0].ID != "b" {
		t.Errorf("peers of the network: %+v, %v", s.Peers, err)
	}
	update(func(tx *store.Tx) error { return tx.ForgetPeer("b") })
	if !revoked() {
		t.Error("the word went with its author")
	}
	update(func(tx *store.Tx) error { return tx.Revoke("c", true) })
	update(func(tx *store.Tx) error { return tx.Revoke("c", false) })
	if revoked() {
		t.Error("it was taken back, and counts")
	}
	update(func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: store.Host{ID: "b", Epoch: 1}}) })
	update(func(tx *store.Tx) error { return tx.MergeNetworks("b", 1, 1, []store.SharedNetwork{crypt.Shared()}) })
	told(1)
	if revoked() {
		t.Error("an older word replaces the newer one")
	}
	told(3)
	if !revoked() {
		t.Error("a newer word does not count")
	}
}

// TestRevocationTakenBack: the word of a host that is revoked does not count, and does once
// that is taken back.
func TestRevocationTakenBack(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	crypt := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Encrypted: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	out := false
	for _, fn := range []func(tx *store.Tx) error{
		func(tx *store.Tx) error { return tx.PutNetwork(crypt) },
		func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: store.Host{ID: "b", Epoch: 1}}) },
		func(tx *store.Tx) error { return tx.MergeNetworks("b", 1, 1, []store.SharedNetwork{crypt.Shared()}) },
		func(tx *store.Tx) error { return tx.Revoke("b", true) },
		func(tx *store.Tx) error { return tx.MergeRevocations("b", []store.Revocation{{Host: "c", N: 1}}) },
		func(tx *store.Tx) error { return tx.AdoptRevocationsOf("b") },
		func(tx *store.Tx) (err error) { out, err = tx.Revoked("c"); return err },
	} {
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	if out {
		t.Error("a revoked host has a say")
	}
	if err := db.Update(t.Context(), func(tx *store.Tx) error { return tx.Revoke("b", false) }); err != nil {
		t.Fatal(err)
	}
	if err := db.View(func(tx *store.Tx) (err error) { out, err = tx.Revoked("c"); return err }); err != nil || !out {
		t.Errorf("the host was taken back, and has no say (%v)", err)
	}
}
