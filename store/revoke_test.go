package store_test

import (
	"errors"
	"fmt"
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

// TestRevocationAgainstMembers: no member of the cluster keeps this host from revoking it,
// by what it tells of others and of itself.
func TestRevocationAgainstMembers(t *testing.T) {
	crypt := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Encrypted: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	var restored, revoked []store.Revocation
	for i := range 1024 {
		id := store.HostID(fmt.Sprintf("made-up-%04d", i))
		restored, revoked = append(restored, store.Revocation{Host: id, N: 2}), append(revoked, store.Revocation{Host: id, N: 1})
	}
	empty := make([]store.Revocation, len(revoked))
	for i, r := range revoked {
		empty[i].Host = r.Host
	}
	for name, told := range map[string][]store.Revocation{
		"a full list that says nothing": empty,
		"a full list of restored hosts": restored,
		"a full list of revoked hosts":  revoked,
		"the highest number":            {{Host: "c", N: 1<<64 - 2}},
		"the last number that counts":   {{Host: "c", N: 1<<32 - 2}},
	} {
		db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
		update := func(fn func(tx *store.Tx) error) {
			t.Helper()
			if err := db.Update(t.Context(), fn); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		out := func() (out bool) {
			update(func(tx *store.Tx) (err error) { out, err = tx.Revoked("c"); return err })
			return out
		}
		tells := func(id store.HostID, all []store.Revocation) {
			t.Helper()
			update(func(tx *store.Tx) error {
				return errors.Join(tx.MergeRevocations(id, all), tx.AdoptRevocationsOf(id))
			})
		}
		update(func(tx *store.Tx) error { return tx.PutNetwork(crypt) })
		for _, id := range []store.HostID{"b", "c"} {
			update(func(tx *store.Tx) error {
				return errors.Join(tx.PutPeer(store.Peer{Host: store.Host{ID: id, Epoch: 1}}),
					tx.MergeNetworks(id, 1, 1, []store.SharedNetwork{crypt.Shared()}))
			})
		}
		tells("b", told)
		update(func(tx *store.Tx) error { return tx.Revoke("c", true) })
		if !out() {
			t.Errorf("%s keeps a host from being revoked", name)
		}
		var all []store.Revocation
		update(func(tx *store.Tx) (err error) { all, err = tx.Revocations(); return err })
		if len(all) > 1024 {
			t.Errorf("%s: peers are told %d, and listen to 1024", name, len(all))
		}
	}
}

// TestRevocationByOthers: another host's word about a peer counts where the list is full
// of hosts that nobody knows, and the peer's own never.
func TestRevocationByOthers(t *testing.T) {
	db := openDB(t, filepath.Join(t.TempDir(), "weft.db"))
	crypt := store.Network{ID: "n", VNI: 7, Mode: store.ModeVXLAN, Encrypted: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.1.0.0/24")}}}
	var full []store.Revocation
	for i := range 1024 {
		full = append(full, store.Revocation{Host: store.HostID(fmt.Sprintf("made-up-%04d", i)), N: 1})
	}
	out := func() (out bool) {
		if err := db.View(func(tx *store.Tx) (err error) { out, err = tx.Revoked("c"); return err }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	update := func(fn func(tx *store.Tx) error) {
		t.Helper()
		if err := db.Update(t.Context(), fn); err != nil {
			t.Fatal(err)
		}
	}
	tells := func(id store.HostID, all ...store.Revocation) {
		t.Helper()
		update(func(tx *store.Tx) error {
			return errors.Join(tx.MergeRevocations(id, all), tx.AdoptRevocationsOf(id))
		})
	}
	update(func(tx *store.Tx) error { return tx.PutNetwork(crypt) })
	for _, id := range []store.HostID{"b", "c", "d"} {
		update(func(tx *store.Tx) error {
			return errors.Join(tx.PutPeer(store.Peer{Host: store.Host{ID: id, Epoch: 1}}),
				tx.MergeNetworks(id, 1, 1, []store.SharedNetwork{crypt.Shared()}))
		})
	}
	tells("c", append(full, store.Revocation{Host: "c", N: 2})...)
	tells("c", store.Revocation{Host: "c", N: 2})
	tells("b", store.Revocation{Host: "c", N: 1})
	if !out() {
		t.Error("a host that is revoked elsewhere keeps itself in")
	}
	tells("d", store.Revocation{Host: "c", N: 2})
	if out() {
		t.Error("another host took it back, and has no say")
	}
	tells("b", store.Revocation{Host: "c", N: 1<<32 - 1})
	err := db.Update(t.Context(), func(tx *store.Tx) error { return tx.Revoke("c", false) })
	if err == nil || !out() {
		t.Errorf("a host that cannot be taken back: %v", err)
	}
}
