package gossip

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// A host hears from a peer whether that has acted on what the host tells of its tunnel:
// not before the peer has heard it, nor before its kernel has followed, and at once where
// there is nothing to follow. A peer of a version that does not say counts as one that has.
func TestTakenAsksThePeersKernel(t *testing.T) {
	t.Parallel()
	s := newSegment()
	var slow atomic.Bool
	b := newHost(t, s.addr(1))
	b.cfg.Settled = func(ctx context.Context) error {
		if slow.Load() {
			<-ctx.Done()
		}
		return ctx.Err()
	}
	b.start()
	a, old := newHost(t, s.addr(2), s.addr(1)).start(), newHost(t, s.addr(3), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	b.addNetwork(5000, "10.50.0.0/16")
	a.waitPeer(b, soon, "in sync", inSync)
	a.waitPeer(old, soon, "in sync", inSync)
	one, other := store.Tunnel{Port: 4798, Keys: []store.WGKey{{1}}}, store.Tunnel{Port: 4798, Keys: []store.WGKey{{1}, {2}}}
	if err := a.db.SetTunnel(one); err != nil {
		t.Fatal(err)
	}
	taken := func(by *host, tell store.Tunnel, want bool) {
		t.Helper()
		if got, err := a.c.Taken(t.Context(), by.id.ID, tell); got != want || err != nil {
			t.Errorf("taken: %t, %v; want %t", got, err, want)
		}
	}
	waitFor(t, soon, func() error {
		if got, err := a.c.Taken(t.Context(), b.id.ID, one); !got || err != nil {
			return fmt.Errorf("taken: %t (%w)", got, err)
		}
		return nil
	})
	taken(b, other, false) // it was never told
	taken(old, other, true)
	slow.Store(true)
	begun := time.Now()
	taken(b, one, false)
	if took := time.Since(begun); took < takenTime {
		t.Errorf("the peer was not waited for: %v", took)
	}
	slow.Store(false)
	taken(b, one, true)
	b.update(func(tx *store.Tx) error {
		p, err := tx.Peer(a.id.ID)
		p.Tunnel, p.KeyOf = store.Tunnel{}, "other"
		return errors.Join(err, tx.PutPeer(p))
	})
	taken(b, one, true) // it encrypts nothing to this host
	b.halt()
	if got, err := a.c.Taken(t.Context(), b.id.ID, one); got || err == nil {
		t.Errorf("of a peer that is gone: %t, %v", got, err)
	}
}
