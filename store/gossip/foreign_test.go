package gossip

import (
	"fmt"
	"testing"
)

// A peer that tells addresses that are not of the network is noticed.
func TestForeignAddressIsNoticed(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.waitSees(5000, soon, "ep1")
	if n := b.c.Stats().Dropped["foreign-address"]; n != 0 {
		t.Errorf("%d addresses of the network were refused", n)
	}
	a.addEndpoint(5000, "ep2", "8.8.8.8")
	waitFor(t, soon, func() error {
		if n := b.c.Stats().Dropped["foreign-address"]; n != 1 {
			return fmt.Errorf("%d addresses were refused, want 1", n)
		}
		return nil
	})
}
