package gossip

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/store"
)

// TestEmptyDatabaseIsBelieved: a host whose database was lost has no networks and services
// until it makes one, and peers keep none of the old.
func TestEmptyDatabaseIsBelieved(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	a.update(func(tx *store.Tx) error {
		return tx.PutServices(a.id.ID, true, []store.Service{{VNI: 5000, VIP: netip.MustParseAddr("10.50.1.1"), Name: "web"}})
	})
	holds := func(peers, services int) {
		t.Helper()
		waitFor(t, soon, func() error {
			snap, err := b.db.Snapshot(5000)
			if err == nil && (len(snap.Peers) != peers || len(snap.Services) != services) {
				err = fmt.Errorf("%d peers and %d services, want %d and %d", len(snap.Peers), len(snap.Services), peers, services)
			}
			return err
		})
	}
	holds(1, 1)
	a.halt()
	if err := os.Remove(filepath.Join(a.dir, "weft.db")); err != nil {
		t.Fatal(err)
	}
	a.cfg.Join = []string{b.addr.String()}
	a.start()
	holds(0, 0)
	b.waitPeer(a, soon, "in sync", inSync)
}

// TestOvertakenCopyIsNoticed: a host goes on from an older copy of its database while a
// peer is down, and passes the version that the peer holds.
func TestOvertakenCopyIsNoticed(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.addEndpoint(5000, "kept", "10.50.0.1")
	b.waitSees(5000, soon, "kept")
	path := filepath.Join(a.dir, "weft.db")
	a.halt()
	copied, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a.start()
	a.addEndpoint(5000, "lost", "10.50.0.2")
	b.waitSees(5000, soon, "kept", "lost")
	b.halt()
	a.halt()
	if err := os.WriteFile(path, copied, 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	for i := range 3 {
		a.addEndpoint(5000, fmt.Sprint("new", i), fmt.Sprintf("10.50.0.%d", i+10))
	}
	b.start()
	b.waitSees(5000, soon, "kept", "new0", "new1", "new2")
}
