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
		missing, lookupErr := c.missing(ctx)
		err := errors.Join(lookupErr, joinAll(missing.pick(), list))
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

// contacts are addresses of hosts that should be members and are not, by how likely
// somebody answers there.
type contacts [4][]netip.AddrPort

// The kinds of contacts.
const (
	toJoin  = iota // WEFT_JOIN
	missed         // peers that this host held for alive a short while ago
	ofSwarm        // hosts of the Swarm that are not down
	gone           // all others
)

// pick returns up to maxJoins contacts, by chance, so that all have their turn. Each kind
// has its share: those that are gone may be many, and those to join may be wrong.
func (k contacts) pick() (out []netip.AddrPort) {
	for i := range k {
		k[i] = slices.Clone(k[i])
		rand.Shuffle(len(k[i]), func(a, b int) { k[i][a], k[i][b] = k[i][b], k[i][a] })
		n := min(len(k[i]), maxJoins/len(k))
		out, k[i] = append(out, k[i][:n]...), k[i][n:]
	}
	rest := slices.Concat(k[:]...)
	return append(out, rest[:min(len(rest), maxJoins-len(out))]...)
}

// joinAll joins the addresses in parallel.
func joinAll(addrs []netip.AddrPort, list *memberlist.Memberlist) error {
	errs := make([]error, len(addrs))
	var wg sync.WaitGroup
	for i, a := range addrs {
		wg.Go(func() { _, errs[i] = list.Join([]string{a.String()}) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// missing returns the addresses of hosts that should be members and are not.
func (c *Cluster) missing(ctx context.Context) (contacts, error) {
	skip := map[netip.AddrPort]bool{}
	var all contacts
	var peers []store.Peer
	var nodes []store.Node
	err := c.db.View(func(tx *store.Tx) (err error) {
		if peers, err = tx.Peers(); err != nil {
			return err
		}
		nodes, err = tx.Nodes()
		return err
	})
	hidden := map[store.HostID]bool{}
	add := func(id store.HostID, addrs []netip.AddrPort) {
		kind := missed
		if hidden[id] {
			kind = gone
		}
		all[kind] = append(all[kind], addrs...)
	}
	sights := c.table.sights()
	for _, p := range peers {
		hidden[p.ID] = p.Hidden
		// Seen in this process: its record says the port. Else it is ours, likely.
		if sights[p.ID].rec.Port == 0 && p.Address.IsValid() {
			add(p.ID, withPort(c.waysTo(p.Host), c.cfg.Port))
		}
	}
	for id, s := range sights {
		if s.alive {
			skip[s.rec.gossipAddr()] = true
			skip[netip.AddrPortFrom(s.rec.Public, s.rec.Port)] = true
		} else if s.rec.Port != 0 {
			add(id, withPort(c.waysTo(s.rec.Host), s.rec.Port))
		}
	}
	for _, n := range nodes {
		kind := ofSwarm
		if n.Gone {
			kind = gone
		}
		if !n.Self && n.Address.Is4() == c.db.Self().Address.Is4() {
			all[kind] = append(all[kind], netip.AddrPortFrom(n.Address, c.cfg.Port))
		}
	}
	var joinErr error
	all[toJoin], joinErr = c.resolve(ctx)
	self := c.db.Self()
	skip[netip.AddrPortFrom(self.Address, c.cfg.Port)], skip[netip.AddrPortFrom(self.Public, c.cfg.Port)] = true, true
	for i := range all {
		all[i] = slices.DeleteFunc(all[i], func(a netip.AddrPort) bool {
			again := skip[a]
			skip[a] = true
			return again
		})
	}
	return all, errors.Join(err, joinErr)
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
