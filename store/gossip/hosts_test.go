package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// Ports of all test hosts; each host has a loopback address of its own.
const (
	testPort     = 14796
	testDataPort = 14797
)

// segment hands out loopback addresses of one random 127.a.b.0/24.
type segment struct{ a, b byte }

func newSegment() segment { return segment{byte(1 + rand.IntN(254)), byte(rand.IntN(256))} }

func (s segment) addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, s.a, s.b, byte(i)}) }

func (s segment) prefix() netip.Prefix { return netip.PrefixFrom(s.addr(0), 24) }

// host is one cluster member in this process, with a real database and sockets.
type host struct {
	t    *testing.T
	dir  string
	id   store.Identity
	addr netip.Addr
	cfg  Config
	db   *store.DB
	c    *Cluster
	stop context.CancelFunc
	done chan error
}

// newPair makes two hosts that are started and run network 5000; the second joins the
// first.
func newPair(t *testing.T) (a, b *host) {
	s := newSegment()
	a = newHost(t, s.addr(1)).start()
	b = newHost(t, s.addr(2), s.addr(1)).start()
	for _, h := range []*host{a, b} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	return a, b
}

// newHost makes a host that is not started. Join may be empty.
func newHost(t *testing.T, addr netip.Addr, join ...netip.Addr) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir(), addr: addr}
	var err error
	if h.id, err = store.LoadIdentity(h.dir); err != nil {
		t.Fatal(err)
	}
	h.cfg = Config{Identity: h.id, Port: testPort, DataPort: testDataPort}
	for _, a := range join {
		h.cfg.Join = append(h.cfg.Join, a.String())
	}
	if os.Getenv("WEFT_TEST_LOG") != "" {
		h.cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", addr)
	}
	t.Cleanup(func() { h.halt() })
	return h
}

// start runs the host; change may set up the cluster before.
func (h *host) start(change ...func(*Cluster)) *host {
	h.t.Helper()
	h.open()
	for _, f := range change {
		f(h.c)
	}
	ctx, stop := context.WithCancel(context.Background())
	h.stop, h.done = stop, make(chan error, 1)
	go func() { h.done <- h.c.Run(ctx) }()
	return h
}

// open makes the host's cluster, and leaves it at that.
func (h *host) open() *host {
	h.t.Helper()
	db, err := store.Open(filepath.Join(h.dir, "weft.db"), store.Host{ID: h.id.ID, Name: "host-" + h.addr.String(),
		Address: h.addr, DataPort: testDataPort, Version: "test"})
	if err != nil {
		h.t.Fatal(err)
	}
	h.db, h.cfg.DB = db, db
	if h.c, err = New(h.cfg); err != nil {
		h.t.Fatal(err)
	}
	return h
}

// halt stops the host without a word to the others, as the plugin does.
func (h *host) halt() {
	if h.stop == nil {
		return
	}
	h.stop()
	select {
	case err := <-h.done:
		if err != nil {
			h.t.Errorf("Run of %s: %v", h.addr, err)
		}
	case <-time.After(10 * time.Second):
		h.t.Errorf("Run of %s has not ended", h.addr)
	}
	_ = h.db.Close()
	h.stop = nil
}

func (h *host) update(fn func(*store.Tx) error) {
	h.t.Helper()
	if err := h.db.Update(context.Background(), fn); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) addNetwork(v store.VNI, prefix string) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: networkID(v), VNI: v, Mode: "vxlan",
			Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(prefix)}}})
	})
}

func networkID(v store.VNI) store.NetworkID { return store.NetworkID(fmt.Sprintf("net%d", v)) }

func (h *host) addEndpoint(v store.VNI, name string, ip string) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(name), Network: networkID(v), VNI: v,
			MAC: store.DeriveMAC(name), IPv4: netip.PrefixFrom(netip.MustParseAddr(ip), 16)})
		return err
	})
}

func (h *host) removeEndpoint(v store.VNI, name string) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error { return tx.DeleteEndpoint(networkID(v), store.EndpointID(name)) })
}

// sees returns the ids of peers' endpoints that count on this host.
func (h *host) sees(v store.VNI) []string {
	s, err := h.db.Snapshot(v)
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for _, e := range s.Remote {
		out = append(out, string(e.ID))
	}
	slices.Sort(out)
	return out
}

func (h *host) waitSees(v store.VNI, d time.Duration, want ...string) time.Duration {
	h.t.Helper()
	return waitFor(h.t, d, func() error {
		if got := h.sees(v); !slices.Equal(got, want) {
			return fmt.Errorf("%s sees %v in vni %d, want %v", h.addr, got, v, want)
		}
		return nil
	})
}

func (h *host) peer(o *host) (PeerStatus, bool) {
	for _, p := range h.c.Peers() {
		if p.ID == o.id.ID {
			return p, true
		}
	}
	return PeerStatus{}, false
}

func (h *host) waitPeer(o *host, d time.Duration, what string, ok func(PeerStatus) bool) time.Duration {
	h.t.Helper()
	return waitFor(h.t, d, func() error {
		p, known := h.peer(o)
		if !known {
			return fmt.Errorf("%s does not know %s", h.addr, o.addr)
		}
		if !ok(p) {
			return fmt.Errorf("peer %s on %s: want %s, have %+v", o.addr, h.addr, what, p)
		}
		return nil
	})
}

func alive(p PeerStatus) bool  { return p.Alive && p.DeadSince.IsZero() && !p.Hidden }
func inSync(p PeerStatus) bool { return alive(p) && p.InSync }

// waitFor polls until ok returns nil, and returns how long that took.
func waitFor(t *testing.T, d time.Duration, ok func() error) time.Duration {
	t.Helper()
	start := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return time.Since(start)
		}
		if time.Since(start) > d {
			t.Fatalf("not after %v: %v", d, err)
		}
		<-tick.C
	}
}

var errCut = errors.New("cut off by the test")
