package gossip

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/store"
)

// Times of an instance.
const (
	bindRetry    = time.Second      // after the address or a port could not be bound
	twinRetry    = 30 * time.Second // after another process with this identity was found
	outbidEvery  = time.Second
	twinEvery    = 5 * time.Second
	gossipDial   = 1500 * time.Millisecond
	gossipStream = 5 * time.Second // push/pull and its fallback pings
	// Twice as often as memberlist's own: half the wait for a digest, and twice as many
	// of them while many things change. A round without news sends nothing.
	gossipRound  = 100 * time.Millisecond
	clusterLabel = "weft 1"
)

var (
	errMoved = errors.New("address of this host changed")
	errTwin  = errors.New("another process has the identity of this host")
)

// attendAlways keeps one instance of memberlist and of the record stream on the
// host's own address, and makes a new one when the address changes.
func (c *Cluster) attendAlways(ctx context.Context) error {
	said := ""
	for {
		addr := c.db.Self().Address
		var err error
		if addr.IsValid() {
			err = c.attend(ctx, addr)
		} else {
			err = errors.New("the address of this host is not known yet")
		}
		if ctx.Err() != nil {
			return nil
		}
		wait := bindRetry
		switch {
		case errors.Is(err, errMoved):
			c.log.Info("this host has a new address", "address", c.db.Self().Address, "old", addr)
			said, wait = "", 0
		case errors.Is(err, errTwin):
			wait = twinRetry
			fallthrough
		default:
			c.isAbsent(fmt.Sprint(err))
			if text := fmt.Sprint(err); text != said {
				said = text
				c.log.Error("this host is not part of the cluster; trying on", "address", addr, "err", err)
			}
		}
		pause, end := context.WithTimeout(ctx, wait)
		_ = c.watchAddress(pause, addr) // another address is worth a try at once
		end()
	}
}

// attend takes part with the given address until ctx ends or the address changes.
func (c *Cluster) attend(ctx context.Context, addr netip.Addr) error {
	if err := c.elderLives(ctx); err != nil {
		return err
	}
	l, err := c.under.listen(netip.AddrPortFrom(addr, c.cfg.DataPort))
	if err != nil {
		return fmt.Errorf("record stream: %w", err)
	}
	defer l.Close()
	logger := log.New(logWriter{c}, "", 0)
	port, err := c.under.gossip(netip.AddrPortFrom(addr, c.cfg.Port), logger)
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	c.table.reset()
	c.renew(ctx, addr, 0)
	d := &delegate{c: c, name: c.memberName()}
	defer d.over.Store(true)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx) // open gossip streams end with it too
	list, err := memberlist.Create(c.memberConfig(addr, d, logger, &transport{NodeAwareTransport: port, c: c, ctx: ctx, local: addr}))
	if err != nil {
		return errors.Join(fmt.Errorf("gossip: %w", err), port.Shutdown())
	}
	for ctx.Err() == nil && !bytes.Equal(list.LocalNode().Meta, d.NodeMeta(0)) {
		// memberlist listens before it knows itself, and if it hears of this host's
		// former process in that moment it takes that one's record for its own.
		if err := list.UpdateNode(outbidEvery); err != nil {
			c.log.Debug("host record waits to be sent", "err", err)
		}
	}
	c.isAbsent("")
	if err := c.noteAddress(ctx, addr); err != nil {
		c.log.Error("cannot note this host's address", "err", err)
	}
	g.Go(func() error { return c.newServer().serve(ctx, l) })
	g.Go(func() error { return c.rejoin(ctx, list) })
	g.Go(func() error { return c.guardIdentity(ctx, addr, list) })
	g.Go(func() error { return c.watchAddress(ctx, addr) })
	err = g.Wait()
	return errors.Join(err, list.Shutdown())
}

// isAbsent notes why this host is no member, or with "" that it is one.
func (c *Cluster) isAbsent(why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.absent = why
}

// watchAddress returns errMoved when this host's address is another one. What else
// changed in its record is sent.
func (c *Cluster) watchAddress(ctx context.Context, addr netip.Addr) error {
	for c.db.Self().Address == addr {
		c.mu.Lock()
		self := c.db.Self()
		sent := c.self.Tunnel.Equal(self.Tunnel) && c.self.MTU == self.MTU
		c.mu.Unlock()
		if !sent {
			poke(c.outbid)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.moved:
		}
	}
	return errMoved
}

func (c *Cluster) memberConfig(addr netip.Addr, d *delegate, logger *log.Logger, t memberlist.Transport) *memberlist.Config {
	conf := memberlist.DefaultLANConfig()
	conf.Name = d.name
	conf.Transport = t
	conf.BindAddr, conf.BindPort = addr.String(), int(c.cfg.Port)
	conf.AdvertiseAddr, conf.AdvertisePort = addr.String(), int(c.cfg.Port)
	conf.Label = clusterLabel
	conf.SecretKey = c.keys.gossip
	conf.TCPTimeout = gossipStream
	conf.GossipInterval = gossipRound
	conf.EnableCompression = false // digests, keys and signatures do not shrink
	conf.DeadNodeReclaimTime = 30 * time.Second
	conf.Logger = logger
	conf.Delegate, conf.Events, conf.Alive = d, d, d
	conf.DelegateProtocolVersion, conf.DelegateProtocolMin, conf.DelegateProtocolMax = 1, 1, 1
	return conf
}

// renew signs a new record of this host with a counter above the given one and above
// all that it has signed before. Members that think this host dead do not show it its
// former record, and would refuse an older one, so the counter is in the database first.
func (c *Cluster) renew(ctx context.Context, addr netip.Addr, above uint64) {
	counter := max(above+1, uint64(c.clock().UnixNano()))
	err := c.db.Update(ctx, func(tx *store.Tx) error {
		counter = max(counter, tx.LastCounter()+1)
		return tx.PutLastCounter(counter)
	})
	if err != nil && ctx.Err() == nil {
		c.log.Error("cannot note the number of this host's record", "err", err)
	}
	host := c.db.Self()
	host.Address = addr
	c.mu.Lock()
	defer c.mu.Unlock()
	counter = max(counter, c.self.Counter+1) // should the database not take it
	c.self = record{Host: host, Port: c.cfg.Port, Boot: c.boot, Counter: counter}
	c.self.ID, c.self.DataPort = c.id, c.cfg.DataPort
	c.meta = c.self.sign(c.cfg.Identity)
}

func (c *Cluster) memberName() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.self.memberName()
}

// verify returns the record in a member's meta, or why it is none.
func (c *Cluster) verify(name string, meta []byte) (record, error) {
	c.mu.Lock()
	v, ok := c.verified[name]
	c.mu.Unlock()
	if ok && bytes.Equal(v.meta, meta) {
		return v.rec, nil
	}
	r, err := parseRecord(meta)
	if err != nil {
		return r, err
	}
	if r.memberName() != name {
		return r, errors.New("host record is not that of the member")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.verified) >= 2*maxMembers {
		clear(c.verified) // they are verified again
	}
	c.verified[name] = verified{meta: bytes.Clone(meta), rec: r}
	return r, nil
}

// delegate receives memberlist's calls for one instance. They come with locks of
// memberlist held, so they only write to the table and the queue.
type delegate struct {
	c    *Cluster
	name string
	over atomic.Bool // a late timer of an old instance says nothing any more
}

// NodeMeta implements memberlist.Delegate.
func (d *delegate) NodeMeta(int) []byte {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	return d.c.meta
}

// NotifyMsg implements memberlist.Delegate.
func (d *delegate) NotifyMsg(b []byte) {
	g, err := parseDigest(b)
	if err != nil {
		d.c.drops.count(dropReason(err))
		return
	}
	if !d.over.Load() && d.c.table.claim(g) {
		d.c.queue.QueueBroadcast(newBroadcast(g))
		if d.c.queue.NumQueued() > maxBroadcast {
			d.c.queue.Prune(maxBroadcast)
		}
	}
}

// GetBroadcasts implements memberlist.Delegate.
func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.c.queue.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (d *delegate) LocalState(bool) []byte { return d.c.table.state(d.c.id) }

// MergeRemoteState implements memberlist.Delegate.
func (d *delegate) MergeRemoteState(b []byte, _ bool) {
	err := parseState(b, func(g digest) {
		if !d.over.Load() {
			d.c.table.claim(g)
		}
	})
	if err != nil {
		d.c.drops.count(dropReason(err))
	}
}

func dropReason(err error) string {
	if errors.Is(err, errUnknown) {
		return "unknown-type"
	}
	return "malformed"
}

// NotifyAlive implements memberlist.AliveDelegate: only hosts with a record that
// they signed themselves become members.
func (d *delegate) NotifyAlive(n *memberlist.Node) error {
	r, err := d.c.verify(n.Name, n.Meta)
	reason := "bad-record"
	if err == nil {
		if ip, _ := netip.AddrFromSlice(n.Addr); ip.Unmap() != r.Address || n.Port != r.Port {
			err = errors.New("host record has another address than the member")
		}
	}
	if err == nil && r.ID == d.c.id {
		d.c.mu.Lock()
		newer := r.Boot != d.c.boot && r.Counter >= d.c.self.Counter
		d.c.mu.Unlock()
		if newer {
			poke(d.c.outbid)
		}
		return nil
	}
	if err == nil {
		ok := false
		if ok, reason = d.c.table.admits(r); !ok {
			err = errors.New(reason)
		}
	}
	if err != nil && d.c.drops.first(reason, n.Name) {
		d.c.log.Warn("host ignored", "member", cut(n.Name, 80), "address", n.Address(), "err", err)
	}
	return err
}

// NotifyJoin implements memberlist.EventDelegate.
func (d *delegate) NotifyJoin(n *memberlist.Node) { d.NotifyUpdate(n) }

// NotifyUpdate implements memberlist.EventDelegate.
func (d *delegate) NotifyUpdate(n *memberlist.Node) {
	if d.over.Load() || n.Name == d.name {
		return
	}
	r, err := d.c.verify(n.Name, n.Meta)
	switch {
	case err != nil: // NotifyAlive has said so
	case r.ID == d.c.id:
		d.c.table.twin(r)
	default:
		d.c.table.joined(r)
	}
}

// NotifyLeave implements memberlist.EventDelegate. A host that says that it leaves
// and one that is found dead are the same here.
func (d *delegate) NotifyLeave(n *memberlist.Node) {
	const idLen = 2 * hostIDBytes
	if d.over.Load() || n.Name == d.name || len(n.Name) < idLen {
		return
	}
	d.c.table.left(store.HostID(n.Name[:idLen]), n.Name)
}

// guardIdentity keeps this host's record the newest one of its identity, and looks
// at other members that have the identity too: it may be this host at its former
// address, which is not there any more, or a copy of it, which answers.
func (c *Cluster) guardIdentity(ctx context.Context, addr netip.Addr, list *memberlist.Memberlist) error {
	look := time.NewTicker(twinEvery)
	defer look.Stop()
	quick := time.NewTimer(outbidEvery)
	defer quick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
		case <-quick.C: // soon after the start, when a copy does the least harm
		case <-c.outbid:
			c.outbidOthers(ctx, addr, list)
			quick.Reset(outbidEvery)
		}
		if err := c.findTwin(ctx); err != nil {
			return err
		}
	}
}

// outbidOthers signs a record above all that members show of this identity.
func (c *Cluster) outbidOthers(ctx context.Context, addr netip.Addr, list *memberlist.Memberlist) {
	c.mu.Lock()
	top := c.self.Counter
	for _, v := range c.verified {
		if v.rec.ID == c.id {
			top = max(top, v.rec.Counter)
		}
	}
	c.mu.Unlock()
	c.renew(ctx, addr, top)
	if err := list.UpdateNode(outbidEvery); err != nil {
		c.log.Debug("new host record waits to be sent", "err", err)
	}
}

// findTwin returns errTwin if an older process with this identity lives: then this
// one is the copy, and stays away so that it does no harm to the original.
func (c *Cluster) findTwin(ctx context.Context) error {
	var twin record
	var found error
	for _, r := range c.table.twinList() {
		if r.Boot == c.boot {
			continue // this process at its former address
		}
		if !c.lives(ctx, r) {
			continue
		}
		twin = r
		if r.Boot < c.boot {
			found = twinError(r)
			break
		}
	}
	c.mu.Lock()
	was := c.twin
	c.twin = twin
	c.mu.Unlock()
	if twin.ID != "" && twin.Address != was.Address && found == nil {
		c.log.Error("another host has a copy of this host's identity; remove host.key there", "address", twin.Address, "name", twin.Name)
	}
	return found
}

func twinError(r record) error {
	return fmt.Errorf("%w: the host at %s (%q) was first; remove host.key on this host if it is a copy", errTwin, r.Address, r.Name)
}

// Copied returns an error while another process, which was first, has this host's
// identity: this one has a copied state folder, and should build nothing.
func (c *Cluster) Copied() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.twin.ID == "" || c.twin.Boot > c.boot {
		return nil
	}
	return twinError(c.twin)
}

// elderLives returns errTwin if the older process for which this one stood back
// still answers, so that the other members see nothing of another attempt.
func (c *Cluster) elderLives(ctx context.Context) error {
	c.mu.Lock()
	r := c.twin
	c.mu.Unlock()
	if r.ID == "" || r.Boot > c.boot {
		return nil
	}
	if !c.lives(ctx, r) {
		return nil
	}
	return twinError(r)
}
