package gossip

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/weftnet/weft/store"
)

// Times of joining. A round tries at most maxJoins hosts at once, so that a half
// of the cluster that is cut off costs little, and finds back soon: one contact is
// enough, for it brings all others.
const (
	joinFirst = 250 * time.Millisecond
	joinMost  = 3 * time.Second
	maxJoins  = 8
	lookupMax = 2 * time.Second
)

// rejoin contacts, for ever, the hosts to join, those of the Swarm and the remembered
// peers that are not members.
func (c *Cluster) rejoin(ctx context.Context, list *memberlist.Memberlist) error {
	wait := joinFirst
	lonely := false
	for {
		addrs, lookupErr := c.missing(ctx)
		err := errors.Join(lookupErr, joinSome(addrs, list))
		if ctx.Err() != nil {
			return nil
		}
		alone := len(c.join) > 0 && c.table.size() == 1 && err != nil
		if alone && !lonely && wait >= joinMost {
			c.log.Warn("no host of the cluster can be joined; trying on (is the cluster key the same?)", "err", err)
			lonely = true
		}
		lonely = lonely && alone
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(jitter(wait)):
		}
		wait = min(2*wait, joinMost)
	}
}

// joinSome joins up to maxJoins addresses in parallel.
func joinSome(addrs []netip.AddrPort, list *memberlist.Memberlist) error {
	if len(addrs) > maxJoins {
		rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
		addrs = addrs[:maxJoins]
	}
	errs := make([]error, len(addrs))
	var wg sync.WaitGroup
	for i, a := range addrs {
		wg.Go(func() { _, errs[i] = list.Join([]string{a.String()}) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// missing returns the addresses of hosts that should be members and are not.
func (c *Cluster) missing(ctx context.Context) ([]netip.AddrPort, error) {
	skip := map[netip.AddrPort]bool{}
	var lost []netip.AddrPort
	sights := c.table.sights()
	for _, s := range sights {
		if s.alive {
			skip[s.rec.gossipAddr()] = true
			skip[netip.AddrPortFrom(s.rec.Public, s.rec.Port)] = true
		} else if s.rec.Port != 0 {
			lost = append(lost, withPort(c.waysTo(s.rec.Host), s.rec.Port)...)
		}
	}
	var peers []store.Peer
	var nodes []store.Node
	err := c.db.View(func(tx *store.Tx) (err error) {
		if peers, err = tx.Peers(); err != nil {
			return err
		}
		nodes, err = tx.Nodes()
		return err
	})
	for _, n := range nodes {
		if !n.Self && n.Address.Is4() == c.db.Self().Address.Is4() {
			lost = append(lost, netip.AddrPortFrom(n.Address, c.cfg.Port))
		}
	}
	for _, p := range peers {
		// Seen in this process: its record says the port. Else it is ours, likely.
		if sights[p.ID].rec.Port == 0 && p.Address.IsValid() {
			lost = append(lost, withPort(c.waysTo(p.Host), c.cfg.Port)...)
		}
	}
	joins, joinErr := c.resolve(ctx)
	self := c.db.Self()
	skip[netip.AddrPortFrom(self.Address, c.cfg.Port)], skip[netip.AddrPortFrom(self.Public, c.cfg.Port)] = true, true
	var out []netip.AddrPort
	for _, a := range append(joins, lost...) {
		if !skip[a] {
			skip[a] = true
			out = append(out, a)
		}
	}
	return out, errors.Join(err, joinErr)
}

// resolve returns the addresses of the hosts to join, of the own family alone.
func (c *Cluster) resolve(ctx context.Context) ([]netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupMax)
	defer cancel()
	family := "ip4"
	if c.db.Self().Address.Is6() {
		family = "ip6"
	}
	found := make([][]netip.AddrPort, len(c.join))
	errs := make([]error, len(c.join))
	var wg sync.WaitGroup
	for i, t := range c.join {
		if a, err := netip.ParseAddr(t.host); err == nil {
			found[i] = []netip.AddrPort{netip.AddrPortFrom(a, t.port)}
			continue
		}
		wg.Go(func() {
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, family, t.host)
			if err != nil {
				errs[i] = fmt.Errorf("host to join: %w", err)
			}
			for _, a := range addrs {
				found[i] = append(found[i], netip.AddrPortFrom(a.Unmap(), t.port))
			}
		})
	}
	wg.Wait()
	return slices.Concat(found...), errors.Join(errs...)
}

// transport is memberlist's own, with dials that are short, come from the host's
// own address and end with the instance.
type transport struct {
	memberlist.NodeAwareTransport
	c     *Cluster
	ctx   context.Context // of the instance; memberlist's calls have none
	local netip.Addr
}

// translate returns where a member is reached from here.
func (t *transport) translate(a memberlist.Address) string {
	t.c.mu.Lock()
	v, ok := t.c.verified[a.Name]
	t.c.mu.Unlock()
	if !ok || !v.rec.Public.IsValid() {
		return a.Addr
	}
	return netip.AddrPortFrom(t.c.wayTo(v.rec.Host), v.rec.Port).String()
}

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	if err := t.c.reachable(ap.Addr()); err != nil {
		return nil, err
	}
	conn, err := t.c.under.dial(t.ctx, t.local, addr, min(d, gossipDial))
	if err != nil {
		return nil, err
	}
	return &boundConn{Conn: conn, stop: context.AfterFunc(t.ctx, func() { _ = conn.Close() })}, nil
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.DialTimeout(t.translate(a), d)
}

// WriteTo implements memberlist.Transport.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	a.Addr = t.translate(a)
	ap, err := netip.ParseAddrPort(a.Addr)
	if err != nil {
		return time.Time{}, err
	}
	if t.c.reachable(ap.Addr()) != nil {
		return time.Now(), nil // a lost packet is no error
	}
	return t.NodeAwareTransport.WriteToAddress(b, a)
}

// boundConn ends with its instance.
type boundConn struct {
	net.Conn
	stop func() bool
}

// Close implements net.Conn.
func (b *boundConn) Close() error {
	b.stop()
	return b.Conn.Close()
}

// reachable asks the hook with which tests cut hosts off.
func (c *Cluster) reachable(a netip.Addr) error {
	if c.reach == nil {
		return nil
	}
	return c.reach(a.Unmap())
}
