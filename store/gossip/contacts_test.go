package gossip

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// TestContacts: hosts that are gone, however many, do not keep this host from those that
// answer, and are tried too.
func TestContacts(t *testing.T) {
	c := unrunCluster(t)
	c.cfg.Port, c.join = testPort, []target{{host: "192.0.2.1", port: testPort}}
	addr := func(kind, i byte) netip.Addr { return netip.AddrFrom4([4]byte{198, 51, kind, i}) }
	if err := c.db.Update(t.Context(), func(tx *store.Tx) error {
		for i := range byte(100) {
			p := store.Peer{Host: store.Host{ID: store.HostID([]byte{'p', i}), Address: addr(1, i)}, DeadSince: time.Now(), Hidden: i > 0}
			if err := tx.PutPeer(p); err != nil {
				return err
			}
			if err := tx.PutNode(store.Node{Address: addr(2, i), Gone: i > 0}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	all, err := c.missing(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tried := map[netip.AddrPort]bool{}
	for range 1000 {
		got := all.pick()
		for _, a := range []netip.Addr{netip.MustParseAddr("192.0.2.1"), addr(1, 0), addr(2, 0)} {
			if !slices.Contains(got, netip.AddrPortFrom(a, testPort)) {
				t.Fatalf("%v is not among those that are tried: %v", a, got)
			}
		}
		if len(got) > maxJoins {
			t.Fatalf("%d are tried at once", len(got))
		}
		for _, a := range got {
			tried[a] = true
		}
	}
	if len(tried) != 201 {
		t.Errorf("%d addresses were tried, want all 201", len(tried))
	}
}
