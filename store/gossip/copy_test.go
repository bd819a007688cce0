package gossip

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft/store"
)

// A copied state folder shows where its original was a member, and a look there tells
// before anything is built or said.
func TestCopyIsFoundBeforeItJoins(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.waitPeer(b, soon, "in sync", inSync)
	b.halt()
	twin := newHost(t, s.addr(3), s.addr(1))
	for _, name := range []string{"host.key", "weft.db"} {
		raw, err := os.ReadFile(filepath.Join(b.dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(twin.dir, name), raw, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b.start()
	b.waitPeer(a, soon, "in sync", inSync) // a may not have noticed that b was away

	db, err := store.Open(filepath.Join(twin.dir, "weft.db"), store.Host{ID: b.id.ID, Address: twin.addr})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var last netip.Addr
	if err := db.View(func(tx *store.Tx) error { last = tx.LastAddress(); return nil }); err != nil || last != b.addr {
		t.Fatalf("the copy was last at %s, %v; want %s", last, err, b.addr)
	}
	cfg := twin.cfg
	cfg.DB, cfg.Identity = db, b.id
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Original(t.Context(), last); err == nil || !strings.Contains(err.Error(), b.addr.String()) {
		t.Errorf("the copy says %v", err)
	}
	waitFor(t, soon, func() error {
		if at := b.c.Stats().Twin; at != twin.addr.String() {
			return fmt.Errorf("the original knows of a copy at %q", at)
		}
		return nil
	})
	if p, _ := a.peer(b); !inSync(p) || p.Address != b.addr {
		t.Errorf("the others see %+v", p)
	}
	for what, at := range map[string]netip.Addr{"another host": a.addr, "nobody": s.addr(9)} {
		if err := c.Original(t.Context(), at); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	b.halt()
	if err := c.Original(t.Context(), last); err != nil {
		t.Errorf("when the original is gone: %v", err)
	}
}
