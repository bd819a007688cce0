package gossip

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"
)

// TestSilentPeersDoNotDelayOthers: news of a peer that answers waits for none of many that
// are members and whose record streams go nowhere.
func TestSilentPeersDoNotDelayOthers(t *testing.T) {
	t.Parallel()
	const silent, hang = 64, time.Second
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start(func(c *Cluster) {
		c.reach = func(at netip.Addr) error {
			if at.As4()[3] < 100 {
				return nil
			}
			time.Sleep(hang)
			return errors.New("dropped by the test")
		}
	})
	for _, h := range []*host{a, b} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	b.waitPeer(a, soon, "in sync", inSync)
	for i := range silent {
		id := simIdentity(i)
		r := testRecord(id)
		r.PublicKey, r.Address = id.Key.Public().(ed25519.PublicKey), s.addr(100+i)
		b.c.table.joined(r)
	}
	waitFor(t, 4*soon, func() error {
		n := 0
		for _, p := range b.c.Peers() {
			if p.LastErr != "" {
				n++
			}
		}
		if n != silent {
			return fmt.Errorf("%d of %d peers did not answer", n, silent)
		}
		return nil
	})
	for i := range 3 {
		before := len(b.sees(5000))
		a.addEndpoint(5000, fmt.Sprint("ep", i), fmt.Sprintf("10.50.0.%d", i+1))
		if took := waitFor(t, soon, func() error {
			if n := len(b.sees(5000)); n == before {
				return fmt.Errorf("%d endpoints", n)
			}
			return nil
		}); took > 2*hang {
			t.Errorf("an endpoint of a peer that answers is known after %v", took)
		}
	}
}
