package gossip

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/store"
)

// replayed is a peer for a plugin under test: a real member with a signed record,
// and a real record stream on a database. But it knows only itself, the plugin and
// the first peer, and fetches nothing, so that a thousand of them fit into one
// process; to the plugin they are a cluster. The first one knows all, and the plugin
// learns of all from it at once, as from any host of a cluster. What a cluster would
// send to one host, probes and push/pull, is spread over all of them; of gossip each
// message comes once instead of some ten times.
type replayed struct {
	meet chan struct{} // cap 1: the plugin has started
	c    *Cluster
	addr netip.Addr
	cfg  replayConfig
	made map[int]int // endpoints by network
	nets []store.VNI
}

// replayConfig is the shape of a replayed cluster.
type replayConfig struct {
	peers, networks, perNetwork int        // perNetwork: endpoints of one peer in each
	first                       netip.Addr // of the peers; the others follow
	plugin                      netip.Addr
	port, dataPort              uint16
}

// Every peer runs every network; network k is 10.(100+k).0.0/16.
const replayVNI store.VNI = 7001

func replayPrefix(k int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(100 + k), 0, 0}), 16)
}

// meetAfter spreads the peers' push/pull with a plugin that started.
const meetAfter = 5 * time.Second

// fewMembers lets only some become members, and tells of the plugin.
type fewMembers struct {
	*delegate
	p    *replayed
	tell chan<- record // nil for all but the first peer
}

// NotifyAlive implements memberlist.AliveDelegate.
func (f fewMembers) NotifyAlive(n *memberlist.Node) error {
	ip, _ := netip.AddrFromSlice(n.Addr)
	if a := ip.Unmap(); f.tell == nil && a != f.p.cfg.plugin && a != f.p.cfg.first && a != f.p.addr {
		return errors.New("another peer")
	}
	return f.delegate.NotifyAlive(n)
}

// NotifyJoin implements memberlist.EventDelegate.
func (f fewMembers) NotifyJoin(n *memberlist.Node) { f.NotifyUpdate(n) }

// NotifyUpdate implements memberlist.EventDelegate.
func (f fewMembers) NotifyUpdate(n *memberlist.Node) {
	f.delegate.NotifyUpdate(n)
	if r, err := f.c.verify(n.Name, n.Meta); err == nil && f.tell != nil && r.Address == f.p.cfg.plugin {
		f.tell <- r
	}
}

func newReplayed(dir string, i int, cfg replayConfig) (*replayed, error) {
	p := &replayed{addr: cfg.first, cfg: cfg, made: map[int]int{}, meet: make(chan struct{}, 1)}
	for range i {
		p.addr = p.addr.Next()
	}
	id := simIdentity(i)
	db, err := store.Open(filepath.Join(dir, fmt.Sprint(i), "weft.db"),
		store.Host{ID: id.ID, Name: fmt.Sprintf("peer%d", i), Address: p.addr, DataPort: cfg.dataPort, Version: "replayed"})
	if err != nil {
		return nil, err
	}
	err = db.Update(context.Background(), func(tx *store.Tx) error {
		for k := range cfg.networks {
			v := replayVNI + store.VNI(k)
			p.nets = append(p.nets, v)
			if err := tx.PutNetwork(store.Network{ID: networkID(v), VNI: v, Mode: "vxlan",
				Subnets: []store.Subnet{{Pool: replayPrefix(k)}}}); err != nil {
				return err
			}
			for range cfg.perNetwork {
				if err := p.put(tx, i, k); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	p.c, err = New(Config{DB: db, Identity: id, Port: cfg.port, DataPort: cfg.dataPort, Join: []string{cfg.first.String()},
		Key: bytes.Repeat([]byte{7}, KeyBytes)})
	return p, err
}

// put makes one more endpoint of peer i in network k.
func (p *replayed) put(tx *store.Tx, i, k int) error {
	n := 256 + i*(p.cfg.perNetwork+20) + p.made[k]
	name := fmt.Sprintf("%08x%08x%048x", i, k, p.made[k])
	p.made[k]++
	a := replayPrefix(k).Addr().As4()
	a[2], a[3] = byte(n>>8), byte(n)
	_, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(name), Network: networkID(p.nets[k]), VNI: p.nets[k],
		MAC: store.DeriveMAC(name), IPv4: netip.PrefixFrom(netip.AddrFrom4(a), 16)})
	return err
}

// run takes part until ctx ends. Joined is called when it has met the first peer.
func (p *replayed) run(ctx context.Context, tell chan<- record, joined func()) error {
	c := p.c
	l, err := c.under.listen(netip.AddrPortFrom(p.addr, p.cfg.dataPort))
	if err != nil {
		return err
	}
	defer l.Close()
	logger := log.New(io.Discard, "", 0)
	port, err := c.under.gossip(netip.AddrPortFrom(p.addr, p.cfg.port), logger)
	if err != nil {
		return err
	}
	c.renew(ctx, p.addr, 0)
	d := fewMembers{&delegate{c: c, name: c.memberName()}, p, tell}
	g, ctx := errgroup.WithContext(ctx)
	conf := c.memberConfig(p.addr, d.delegate, logger, &transport{NodeAwareTransport: port, c: c, ctx: ctx, local: p.addr})
	conf.Alive, conf.Events = d, d
	conf.ProbeInterval *= time.Duration(p.cfg.peers)
	conf.PushPullInterval = 3 * time.Minute * time.Duration(p.cfg.peers)
	watch := c.db.Watch()
	if err := c.publish(); err != nil {
		return err
	}
	list, err := memberlist.Create(conf)
	if err != nil {
		return errors.Join(err, port.Shutdown())
	}
	g.Go(func() error { return c.newServer().serve(ctx, l) })
	g.Go(func() error { return c.announce(ctx, watch) })
	g.Go(func() error {
		for p.addr != p.cfg.first && c.table.size() == 1 && ctx.Err() == nil {
			_, _ = list.Join(c.cfg.Join) // tried again
			idle(ctx, jitter(time.Second))
		}
		joined()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-p.meet:
				idle(ctx, rand.N(meetAfter))
				// The others of a cluster would come with the first one; these are only
				// three members: itself, the first and the plugin.
				for range 30 {
					_, err := list.Join([]string{p.cfg.plugin.String()})
					if err == nil && list.NumMembers() >= 3 || ctx.Err() != nil {
						break
					}
					idle(ctx, jitter(time.Second)) // it may be busy, or gone again
				}
			}
		}
	})
	return errors.Join(g.Wait(), list.Shutdown(), c.db.Close())
}

func idle(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// replay runs peers until ctx ends, and calls ready when they know each other.
func replay(ctx context.Context, dir string, cfg replayConfig, ready func([]*replayed)) error {
	g, ctx := errgroup.WithContext(ctx)
	var peers []*replayed
	for i := range cfg.peers {
		p, err := newReplayed(dir, i, cfg)
		if err != nil {
			return err
		}
		peers = append(peers, p)
	}
	tell := make(chan record, 64)
	var joined sync.WaitGroup
	joined.Add(len(peers))
	for i, p := range peers {
		g.Go(func() error {
			var once sync.Once
			done := func() { once.Do(joined.Done) }
			defer done() // also when it cannot even bind
			if i == 0 {
				return p.run(ctx, tell, done)
			}
			return p.run(ctx, nil, done)
		})
	}
	g.Go(func() error {
		boot := uint64(0)
		for {
			select {
			case <-ctx.Done():
				return nil
			case r := <-tell:
				for _, p := range peers {
					p.c.table.joined(r) // it may ask for records at once
					if r.Boot != boot {
						poke(p.meet)
					}
				}
				boot = r.Boot
			}
		}
	})
	joined.Wait()
	ready(peers)
	return g.Wait()
}

// TestReplay: a host sees replayed peers as it sees others.
//
// With WEFT_REPLAY set it is not a test but the peers of tests/sim: the variable
// says "peers networks perNetwork first plugin port dataPort", and each line of the
// standard input is the number of changes per second and for how many seconds.
// It ends with the input.
func TestReplay(t *testing.T) {
	if text := os.Getenv("WEFT_REPLAY"); text != "" {
		serveReplay(t, text)
		return
	}
	s := newSegment()
	h := newHost(t, s.addr(1), s.addr(2))
	h.cfg.Key = bytes.Repeat([]byte{7}, KeyBytes)
	h.start()
	h.update(func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: "wide", VNI: replayVNI, Mode: "vxlan", Subnets: []store.Subnet{{Pool: replayPrefix(0)}}})
	})
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var peers []*replayed
	ready := make(chan struct{})
	cfg := replayConfig{peers: 5, networks: 2, perNetwork: 3, first: s.addr(2), plugin: s.addr(1), port: testPort, dataPort: testDataPort}
	dir := t.TempDir()
	go func() {
		done <- replay(ctx, dir, cfg, func(p []*replayed) { peers = p; close(ready) })
	}()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	sees := func(want int) {
		t.Helper()
		waitFor(t, soon, func() error {
			if n := len(h.sees(replayVNI)); n != want {
				return fmt.Errorf("host sees %d endpoints, want %d", n, want)
			}
			return nil
		})
	}
	sees(15)
	<-ready
	change(t, peers, rand.New(rand.NewPCG(1, 1)), 0)
	sees(16)
	if n := h.c.Stats().Members; n != 6 {
		t.Errorf("host has %d members, want 6", n)
	}
}

// change makes an endpoint on a random peer, in network k.
func change(t *testing.T, peers []*replayed, rnd *rand.Rand, k int) {
	i := rnd.IntN(len(peers))
	if err := peers[i].c.db.Update(context.Background(), func(tx *store.Tx) error { return peers[i].put(tx, i, k) }); err != nil {
		t.Error(err)
	}
}

func serveReplay(t *testing.T, text string) {
	var cfg replayConfig
	var first, plugin string
	if _, err := fmt.Sscan(text, &cfg.peers, &cfg.networks, &cfg.perNetwork, &first, &plugin, &cfg.port, &cfg.dataPort); err != nil {
		t.Fatalf("WEFT_REPLAY: %v", err)
	}
	cfg.first, cfg.plugin = netip.MustParseAddr(first), netip.MustParseAddr(plugin)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var asked sync.WaitGroup
	ready := func(peers []*replayed) {
		fmt.Println("replay: ready")
		asked.Go(func() {
			defer stop()
			rnd := rand.New(rand.NewPCG(1, 1))
			for in := bufio.NewScanner(os.Stdin); in.Scan(); {
				var rate, seconds int
				if _, err := fmt.Sscan(strings.TrimSpace(in.Text()), &rate, &seconds); err != nil || rate < 1 {
					t.Errorf("%q: %v", in.Text(), err)
					return
				}
				tick := time.NewTicker(time.Second / time.Duration(rate))
				for range rate * seconds {
					change(t, peers, rnd, rnd.IntN(cfg.networks))
					<-tick.C
				}
				tick.Stop()
				fmt.Println("replay: done")
			}
		})
	}
	if err := replay(ctx, t.TempDir(), cfg, ready); err != nil {
		t.Error(err)
	}
	asked.Wait()
}
