package gossip

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// lookAgain is how long a peer that was not found on this host's link is sought by its
// public address alone.
const lookAgain = time.Minute

// ways is what this host found out of peers that may be on its link, or behind another
// NAT in a network with the same private addresses: only who answers there tells.
type ways struct {
	mu    sync.Mutex // guards peers
	peers map[store.HostID]found
}

// found is whether a peer is at an address, its own, when that was last looked for.
type found struct {
	at   netip.Addr
	away bool
	when time.Time
}

// away reports whether the peer is known not to be where its address leads.
func (w *ways) away(h store.Host) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.peers[h.ID]
	return f.away && f.at == h.Address
}

// due reports whether the peer should be looked for at its address.
func (w *ways) due(h store.Host, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.peers[h.ID]
	return !f.away || f.at != h.Address || now.Sub(f.when) >= lookAgain
}

func (w *ways) set(h store.Host, away bool, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.peers[h.ID] = found{at: h.Address, away: away, when: now}
}

// doubtful reports whether a host's address may be one on this host's link or one in a
// network behind another NAT.
func (c *Cluster) doubtful(h store.Host) bool {
	return h.Public.IsValid() && h.Public != c.db.Self().Public && c.cfg.Near != nil && c.cfg.Near(h.Address)
}

// wayTo returns the address by which a host is reached from here: inside its network
// or behind the same NAT its own, else the public one.
func (c *Cluster) wayTo(h store.Host) netip.Addr {
	self := c.db.Self()
	near := c.doubtful(h) && h.Address != self.Address && !c.ways.away(h)
	return self.AddressOf(h, near)
}

// waysTo returns all addresses by which a host that was lost may be found.
func (c *Cluster) waysTo(h store.Host) []netip.Addr {
	if c.doubtful(h) && h.Address != c.db.Self().Address {
		return []netip.Addr{h.Address, h.Public}
	}
	return []netip.Addr{c.wayTo(h)}
}

func withPort(addrs []netip.Addr, port uint16) (out []netip.AddrPort) {
	for _, a := range addrs {
		out = append(out, netip.AddrPortFrom(a, port))
	}
	return out
}

// dial opens a stream to the host, which must prove to be id. Where it is in doubt by
// which address the host is reached, that is found out.
func (c *Cluster) dial(ctx context.Context, r record, id store.HostID) (*stream, error) {
	if !c.doubtful(r.Host) {
		if c.ways.away(r.Host) { // of the time before a setting was changed
			c.noteWay(ctx, r.Host, false, c.table.now())
		}
		return c.dialAt(ctx, r, id, c.wayTo(r.Host))
	}
	now := c.table.now()
	var inside error
	if r.Address == c.db.Self().Address {
		inside = errors.New("this host has its address")
	} else if c.ways.due(r.Host, now) {
		s, err := c.dialAt(ctx, r, id, r.Address)
		if err == nil {
			c.noteWay(ctx, r.Host, false, now)
			return s, nil
		}
		inside = err
	}
	s, err := c.dialAt(ctx, r, id, r.Public)
	if err != nil {
		return nil, errors.Join(inside, err)
	}
	if inside != nil {
		c.noteWay(ctx, r.Host, true, now)
	}
	return s, nil
}

// noteWay remembers whether a peer was found at its address. The database, and so the
// kernel, are told of a change.
func (c *Cluster) noteWay(ctx context.Context, h store.Host, away bool, now time.Time) {
	if c.ways.away(h) != away {
		err := c.db.Update(ctx, func(tx *store.Tx) error {
			p, err := tx.Peer(h.ID)
			if err != nil {
				return err
			}
			p.Away = away
			return tx.PutPeer(p)
		})
		who := []any{"peer", h.Name, "host", h.ID, "address", h.Address, "public", h.Public}
		if err != nil { // found out again with the next stream
			c.log.Error("cannot note the way to a peer", append(who, "err", err)...)
			return
		}
		if away {
			c.log.Info("peer is not on this host's link, though its address is one of it; it is reached by its public address", who...)
		} else {
			c.log.Info("peer is on this host's link", who...)
		}
	}
	c.ways.set(h, away, now)
}
