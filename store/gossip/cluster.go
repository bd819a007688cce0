// Package gossip shares the records of store among hosts.
//
// Cluster is one host's part in it. memberlist carries who is a member (each with
// its signed record) and digests: which version of a network a host has. The
// records themselves are fetched from the host that owns them, over a TLS stream
// on which both sides prove their identity, by every host that runs the network;
// the list of networks is fetched by everybody.
//
//	owner's store changes ─► publish ─► digest ─gossip─► claim ─► follow ─┐
//	owner's store ◄─ read ◄─ serve ◄────── TLS stream ◄───────────────────┘
//	                                            └─► Merge… into the peer's store
//
// What is lost on the way is found by push/pull of all digests between random
// members, and by comparing with each owner now and then (see compareEvery). A host
// that dies keeps its records: they are hidden after Config.HideAfter and forgotten
// after Config.ForgetAfter. Stopping is not leaving: a plugin that is replaced keeps
// its traffic.
//
// The package does not decide what records mean, and touches no kernel object.
package gossip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/store"
)

// Defaults of Config.
const (
	DefaultPort        = 4796
	DefaultDataPort    = 4797
	DefaultHideAfter   = 2 * time.Minute
	DefaultForgetAfter = 30 * time.Minute
)

// Times in which changes of the local store become one digest.
const (
	quietTime = 50 * time.Millisecond
	mostTime  = 200 * time.Millisecond
)

// Config says how a host takes part. DB and Identity are required.
type Config struct {
	DB       *store.DB
	Identity store.Identity
	// Join are addresses of other hosts, as host or host:port. The own address may
	// be among them. They are tried for ever.
	Join []string
	// Key is the cluster key of KeyBytes, or nil: then gossip is not encrypted and
	// everybody who reaches the ports can join.
	Key []byte
	// Port is that of gossip, UDP and TCP; DataPort that of the record stream, TCP.
	Port, DataPort uint16
	// Near reports whether an address is one of this host's own link, by which a host
	// that is found there is reached. nil: none is.
	Near func(netip.Addr) bool
	// Settled returns nil once the kernel does what the database says of peers, or an
	// error when ctx ends before. nil: it is not asked.
	Settled func(context.Context) error
	Log     *slog.Logger
	// HideAfter is how long a dead peer's records stay in use, ForgetAfter how long
	// they are kept.
	HideAfter, ForgetAfter time.Duration
}

// Cluster is this host's part in the cluster. Its methods may be called from any
// goroutine.
type Cluster struct {
	cfg   Config
	db    *store.DB
	id    store.HostID
	log   *slog.Logger
	keys  keys
	cert  tls.Certificate
	join  []target
	boot  uint64
	table *table
	queue *memberlist.TransmitLimitedQueue

	running atomic.Bool
	moved   chan struct{} // cap 1: the own address may have changed
	outbid  chan struct{} // cap 1: somebody holds a newer record of this host
	fetches chan struct{} // semaphore
	retries chan struct{} // semaphore, of peers that did not answer
	stats   counters
	drops   drops
	reach   func(netip.Addr) error // nil: everybody; tests cut hosts off with it
	clock   func() time.Time       // of the day; only numbers that should rise come from it
	under   underlay               // sockets; simulations have a network in memory
	ways    ways

	mu       sync.Mutex // guards what follows
	self     record
	meta     []byte // self in wire form
	verified map[string]verified
	twin     record     // another living process with this identity, or zero
	absent   string     // why this host is no member, or ""
	copy     netip.Addr // from where a process with this identity last asked
	copyAt   time.Time
}

// verified is a record that was checked, by member name.
type verified struct {
	meta []byte
	rec  record
}

// New checks the configuration. Nothing is opened before Run.
func New(cfg Config) (*Cluster, error) {
	if cfg.DB == nil || cfg.Identity.ID == "" {
		return nil, errors.New("gossip needs a database and an identity")
	}
	k, err := deriveKeys(cfg.Key)
	if err != nil {
		return nil, err
	}
	cert, err := certificate(cfg.Identity)
	if err != nil {
		return nil, fmt.Errorf("certificate of this host: %w", err)
	}
	if cfg.Port == 0 {
		cfg.Port = DefaultPort
	}
	if cfg.DataPort == 0 {
		cfg.DataPort = DefaultDataPort
	}
	if cfg.Port == cfg.DataPort {
		return nil, fmt.Errorf("gossip and records both have port %d; choose two", cfg.Port)
	}
	if cfg.HideAfter <= 0 {
		cfg.HideAfter = DefaultHideAfter
	}
	if cfg.ForgetAfter <= 0 {
		cfg.ForgetAfter = DefaultForgetAfter
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cluster{cfg: cfg, db: cfg.DB, id: cfg.Identity.ID, log: cfg.Log, keys: k, cert: cert,
		boot: uint64(time.Now().UnixNano()), table: newTable(time.Now, cfg.DB.Self().Epoch),
		moved: make(chan struct{}, 1), outbid: make(chan struct{}, 1), fetches: make(chan struct{}, maxFetches), retries: make(chan struct{}, maxRetries),
		verified: map[string]verified{}}
	c.under, c.clock = sockets{}, time.Now
	c.ways.peers = map[store.HostID]found{}
	c.drops.init()
	for _, j := range cfg.Join {
		t, err := parseTarget(j, cfg.Port)
		if err != nil {
			return nil, err
		}
		c.join = append(c.join, t)
	}
	c.queue = newQueue(c.table.size)
	return c, nil
}

// target is a host to join.
type target struct {
	host string
	port uint16
}

// parseTarget reads host, host:port, an address, or [v6]:port.
func parseTarget(s string, port uint16) (target, error) {
	if a, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return target{a.Unmap().String(), port}, nil
	}
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		host, p = s, strconv.Itoa(int(port))
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, "/ []") {
		return target{}, fmt.Errorf("%q is not a host to join; write address, name, or either with :port", s)
	}
	return target{host, uint16(n)}, nil
}

// Run takes part in the cluster until ctx ends, and returns nil then. It may be
// called once. All that it starts is over when it returns, but for memberlist's
// own tasks, which end by themselves within seconds.
func (c *Cluster) Run(ctx context.Context) error {
	if !c.running.CompareAndSwap(false, true) {
		return errors.New("cluster runs already")
	}
	if c.keys.gossip == nil {
		c.log.Warn("no cluster key is set: gossip is not encrypted and any host that reaches this one can join; set WEFT_KEY on all hosts")
	}
	watch := c.db.Watch()
	if err := c.publish(); err != nil {
		return fmt.Errorf("read own networks: %w", err)
	}
	if err := c.remember(); err != nil {
		return fmt.Errorf("read peers: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.announce(ctx, watch) })
	g.Go(func() error { return c.life(ctx) })
	g.Go(func() error { return c.attendAlways(ctx) })
	return g.Wait()
}

// remember puts the peers of the database into the table, and the ways to them that were
// found.
func (c *Cluster) remember() error {
	return c.db.View(func(tx *store.Tx) error {
		peers, err := tx.Peers()
		for _, p := range peers {
			c.table.remember(p.ID)
			if p.Away {
				c.ways.set(p.Host, true, time.Time{})
			}
		}
		return err
	})
}

// announce turns changes of the store into digests, a burst into one.
func (c *Cluster) announce(ctx context.Context, w *store.Watch) error {
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.C:
		}
		if !settle(ctx, w) {
			return nil
		}
		w.Take() // which networks it was shows in their versions
		poke(c.moved)
		err := c.publish()
		if err != nil && !failing {
			c.log.Error("cannot read own networks; peers do not hear of changes", "err", err)
		}
		failing = err != nil
	}
}

// settle waits until the store has been quiet for quietTime, at most mostTime. It
// reports false when ctx ended.
func settle(ctx context.Context, w *store.Watch) bool {
	most, quiet := time.NewTimer(mostTime), time.NewTimer(quietTime)
	defer most.Stop()
	defer quiet.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-most.C:
			return true
		case <-quiet.C:
			return true
		case <-w.C:
			quiet.Reset(quietTime)
		}
	}
}

// publish reads the own versions and gossips those that changed.
func (c *Cluster) publish() error {
	seq := map[store.VNI]uint64{}
	err := c.db.View(func(tx *store.Tx) error {
		seq[store.HostVNI] = tx.Version(store.HostVNI)
		nets, err := tx.Networks()
		for _, n := range nets {
			seq[n.VNI] = tx.Version(n.VNI)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range c.table.publish(c.id, seq) {
		c.queue.QueueBroadcast(newBroadcast(d))
	}
	return nil
}
