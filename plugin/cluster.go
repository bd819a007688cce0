package main

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/store/gossip"
)

// cluster is the tie to other hosts: nothing without WEFT_JOIN outside a Swarm. It
// may be down (its port is taken, say) while this host's networks work.
type cluster struct {
	p        *process
	db       *store.DB
	identity store.Identity
	near     func(netip.Addr) bool
	settled  func(context.Context) error // see gossip.Config
	others   chan struct{}               // closed when there may be other hosts
	once     sync.Once

	mu      sync.Mutex      // guards what follows
	members *gossip.Cluster // nil while it is down
	err     error           // why it is down
	since   time.Time       // start of members
	synced  bool            // the peers were heard once
}

func newCluster(p *process, db *store.DB, identity store.Identity, near func(netip.Addr) bool, settled func(context.Context) error) *cluster {
	c := &cluster{p: p, db: db, identity: identity, near: near, settled: settled, others: make(chan struct{})}
	if len(p.set.join) > 0 {
		c.expect()
	}
	return c
}

// expect says that there are other hosts to meet.
func (c *cluster) expect() { c.once.Do(func() { close(c.others) }) }

// expects reports whether there are.
func (c *cluster) expects() bool {
	select {
	case <-c.others:
		return true
	default:
		return false
	}
}

// run keeps the cluster up until ctx ends, from when ready is closed: before, the
// host's address is not known.
func (c *cluster) run(ctx context.Context, ready <-chan struct{}) error {
	for _, need := range []<-chan struct{}{ready, c.others} {
		select {
		case <-need:
		case <-ctx.Done():
			return nil
		}
	}
	return c.p.keep(ctx, "gossip", func() error {
		members, err := c.p.gossip(c.db, c.identity, c.near, c.settled)
		if err != nil {
			return err
		}
		c.set(members, nil)
		return members.Run(ctx)
	}, func(err error) { c.set(nil, err) })
}

func (p *process) gossip(db *store.DB, identity store.Identity, near func(netip.Addr) bool, settled func(context.Context) error) (*gossip.Cluster, error) {
	return gossip.New(gossip.Config{DB: db, Identity: identity, Join: p.set.join, Key: p.set.key,
		Port: p.set.port, DataPort: p.set.dataPort, Near: near, Settled: settled, Log: p.log})
}

// original returns an error if this host's state folder is a copy of that of a living
// host. One that is still at the address where it was before does not ask.
func (p *process) original(ctx context.Context, db *store.DB, identity store.Identity) error {
	var last netip.Addr
	if err := db.View(func(tx *store.Tx) error { last = tx.LastAddress(); return nil }); err != nil {
		return err
	}
	if !last.IsValid() || isLocal(last) {
		return nil
	}
	members, err := p.gossip(db, identity, nil, nil)
	if err != nil {
		return err
	}
	return members.Original(ctx, last)
}

func (c *cluster) set(members *gossip.Cluster, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.members, c.err, c.since = members, err, time.Now()
}

// get returns the cluster; both are nil without other hosts and while it starts.
func (c *cluster) get() (*gossip.Cluster, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.members, c.err
}

// settleTime is how long nobody need be heard before a host that has been told of
// others goes by what it knows.
const settleTime = 2 * time.Minute

// inSync reports whether the peers have told what they have since the start, so
// that what nobody told may be deleted. A host alone always is.
func (c *cluster) inSync() bool {
	if !c.expects() {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.synced && c.members != nil {
		c.synced = heardAll(c.members.Peers()) || time.Since(c.since) > settleTime
	}
	return c.synced
}

// heardAll reports whether there are living peers and all have told what they have.
func heardAll(peers []gossip.PeerStatus) bool {
	alive := 0
	for _, p := range peers {
		if p.Alive {
			alive++
			if !p.InSync {
				return false
			}
		}
	}
	return alive > 0
}

// copied returns why this host must build nothing, if it is a copy of another.
func (c *cluster) copied() error {
	if members, _ := c.get(); members != nil {
		return members.Copied()
	}
	return nil
}

// taken reports whether a peer has acted on what this host tells of its tunnel.
func (c *cluster) taken(ctx context.Context, id store.HostID, t store.Tunnel) (bool, error) {
	members, err := c.get()
	if members == nil {
		return false, cmp.Or(err, errors.New("gossip is not up"))
	}
	return members.Taken(ctx, id, t)
}

// stats returns the counters, nothing while it is down.
func (c *cluster) stats() gossip.Stats {
	if members, _ := c.get(); members != nil {
		return members.Stats()
	}
	return gossip.Stats{}
}
