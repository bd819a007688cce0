package gossip

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/weftnet/weft/store"
)

// copyStays is how long a copy is told after it last asked; it asks every few
// seconds.
const copyStays = time.Minute

// Original returns an error if another process lives under this host's identity at an
// address where the database says that it once was: then the state folder is a copy,
// and nothing should be built from it. It takes dialTime at most. Cluster need not run,
// and should not: a copy that joins takes packets from its original for a moment.
func (c *Cluster) Original(ctx context.Context, at netip.Addr) error {
	if !c.lives(ctx, record{Host: store.Host{Address: at, DataPort: c.cfg.DataPort}}) {
		return nil // nobody, or another host
	}
	return fmt.Errorf("this host's state folder is a copy: the host at %s lives under the same identity; remove host.key here, and weft.db unless Docker's own folder was copied with it", at)
}

// lives reports whether a process with this host's identity answers where the record says.
func (c *Cluster) lives(ctx context.Context, r record) bool {
	s, err := c.dial(ctx, r, c.id)
	if err != nil {
		return false
	}
	s.close()
	return true
}

// noteAddress writes down where this host is a member, for Original.
func (c *Cluster) noteAddress(ctx context.Context, addr netip.Addr) error {
	var last netip.Addr
	if err := c.db.View(func(tx *store.Tx) error { last = tx.LastAddress(); return nil }); err != nil || last == addr {
		return err
	}
	return c.db.Update(ctx, func(tx *store.Tx) error { return tx.PutLastAddress(addr) })
}

// sawCopy notes that a process with this host's identity asked from the address.
func (c *Cluster) sawCopy(from netip.Addr) {
	c.mu.Lock()
	was := c.copy
	c.copy, c.copyAt = from, time.Now()
	c.mu.Unlock()
	if was != from {
		c.log.Error("another host has a copy of this host's identity; remove host.key there", "address", from)
	}
}
