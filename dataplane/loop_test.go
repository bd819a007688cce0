package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

var underlay = dataplane.Underlay{Address: kerneltest.Underlay4, Link: kerneltest.UnderlayLink, MTU: 1500}

// host is a database and a kernel in memory, with a loop that can be replaced as
// a new process would.
type host struct {
	t      testing.TB
	db     *store.DB
	kernel *kerneltest.Memory
	loop   *dataplane.Loop
	stop   func()
	inSync func() bool
	public netip.Addr // of the peers
	log    *slog.Logger
}

func newHost(t testing.TB) *host {
	t.Helper()
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "self", Name: "alpha", DataPort: kerneltest.Port})
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, db: db, kernel: kerneltest.NewMemory(underlay), log: slog.New(slog.DiscardHandler)}
	h.start()
	t.Cleanup(func() { h.stop(); _ = db.Close() })
	return h
}

func (h *host) start() {
	h.loop = dataplane.NewLoop(h.db, h.kernel, func() netip.Addr { return netip.Addr{} }, h.inSync, h.log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = h.loop.Run(ctx) }()
	h.stop = func() { cancel(); <-done }
}

func (h *host) restart() {
	h.stop()
	h.start()
}

func (h *host) update(fn func(*store.Tx) error) {
	h.t.Helper()
	if err := h.db.Update(context.Background(), fn); err != nil {
		h.t.Fatal(err)
	}
}

// settled waits until nothing is left to do for any network or the host.
func (h *host) settled() {
	h.t.Helper()
	h.within(10*time.Second, "kernel matches the records", func() error {
		vnis := map[store.VNI]bool{store.HostVNI: true}
		s, err := h.db.HostSnapshot()
		if err != nil {
			return err
		}
		for _, n := range s.Networks {
			vnis[n.VNI] = true
		}
		there, err := h.kernel.Networks(context.Background())
		if err != nil {
			return err
		}
		for _, v := range there {
			vnis[v] = true
		}
		for v := range vnis {
			_, _, ops, err := h.loop.Explain(context.Background(), v)
			if err != nil {
				return err
			}
			if len(ops) > 0 {
				return fmt.Errorf("vni %d: %d operations are left, first %v", v, len(ops), ops[0])
			}
		}
		return nil
	})
}

func (h *host) within(d time.Duration, what string, ok func() error) {
	h.t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: not within %v: %v", what, d, err)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-h.t.Context().Done():
			h.t.Fatal(h.t.Context().Err())
		}
	}
}

func network(v store.VNI) store.Network {
	return store.Network{ID: store.NetworkID(fmt.Sprintf("network%d", v)), VNI: v, Mode: store.ModeVXLAN,
		Subnets: []store.Subnet{{Pool: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(v), 0, 0}), 16)}}}
}

func endpoint(v store.VNI, i int) store.Endpoint {
	return store.Endpoint{ID: store.EndpointID(fmt.Sprintf("endpoint%d-%d", v, i)), Network: network(v).ID, VNI: v,
		MAC: store.DeriveMAC(fmt.Sprint(v, i)), IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(v), byte(i >> 8), byte(i)}), 16)}
}

// peers writes n peers that run a network, each with one endpoint.
func (h *host) peers(v store.VNI, n int) {
	h.t.Helper()
	h.peersOf(network(v), n)
}

func (h *host) peersOf(net store.Network, n int) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		for i := range n {
			id := store.HostID(fmt.Sprintf("peer%03d", i))
			p := store.Peer{Host: store.Host{ID: id, Name: string(id), Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + i)}), Public: h.public, Epoch: 1, Tunnel: kerneltest.TunnelOf(id, 1)}}
			if i == n-1 {
				p.MTU = 1400 // the link of one is smaller
			}
			if err := tx.PutPeer(p); err != nil {
				return err
			}
			if err := tx.MergeNetworks(id, 1, 1, []store.SharedNetwork{net.Shared()}); err != nil {
				return err
			}
			e := endpoint(net.VNI, 100+i).Shared()
			if _, err := tx.MergeEndpoints(id, 0, store.Delta{VNI: net.VNI, Epoch: 1, Seq: 1, Full: true, Endpoints: []store.SharedEndpoint{e}}); err != nil {
				return err
			}
		}
		return nil
	})
}

// randomWrite changes the records in one random way, as Docker or a peer would.
func (h *host) randomWrite(r *rand.Rand) {
	v := store.VNI(1 + r.IntN(3))
	e := endpoint(v, 2+r.IntN(6))
	h.update(func(tx *store.Tx) error {
		_, err := tx.Network(network(v).ID)
		known := err == nil
		switch k := r.IntN(12); {
		case k == 0:
			return tx.DeleteNetwork(network(v).ID)
		case k == 1 || !known:
			return tx.PutNetwork(network(v))
		case k == 2:
			return tx.ForgetPeer(store.HostID(fmt.Sprintf("peer%03d", r.IntN(3))))
		case k < 5:
			id := store.HostID(fmt.Sprintf("peer%03d", r.IntN(3)))
			seq := r.Uint64N(1 << 40)
			p := store.Peer{Host: store.Host{ID: id, Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + r.IntN(4))}), Epoch: seq}}
			if err := tx.PutPeer(p); err != nil {
				return err
			}
			if err := tx.MergeNetworks(id, seq, 1, []store.SharedNetwork{network(v).Shared()}); err != nil {
				return err
			}
			var list []store.SharedEndpoint
			for range r.IntN(4) {
				list = append(list, endpoint(v, 2+r.IntN(200)).Shared())
			}
			_, err := tx.MergeEndpoints(id, 0, store.Delta{VNI: v, Epoch: seq, Seq: 1, Full: true, Endpoints: list})
			return err
		case k < 7:
			return tx.DeleteEndpoint(e.Network, e.ID)
		default:
			if _, err := tx.Endpoint(e.Network, e.ID); err == nil {
				return nil
			}
			_, err = tx.PutEndpoint(e)
			return err
		}
	})
}

// TestRandomWalkConverges: whatever the records become, the kernel becomes it too,
// across restarts and failures of single operations.
func TestRandomWalkConverges(t *testing.T) {
	h := newHost(t)
	stranger := dataplane.Bridge{Name: "weftb999", MAC: store.MAC{2, 9, 9, 9, 9, 9}, MTU: 1500, Up: true}
	h.kernel.Plant(stranger)
	r := rand.New(rand.NewPCG(3, 4))
	failing := rand.New(rand.NewPCG(5, 6))
	h.kernel.Before = func(int, dataplane.Op) error {
		if failing.IntN(150) == 0 {
			return errors.New("planted failure")
		}
		return nil
	}
	steps := 0
	for range 60 {
		for range 1 + r.IntN(8) {
			h.randomWrite(r)
			steps++
		}
		if r.IntN(10) == 0 {
			h.restart()
		}
		h.settled()
	}
	if !h.kernel.Planted(stranger) {
		t.Error("a stranger's link was changed")
	}
	t.Logf("random walk: %d writes, 60 states, 0 differences", steps)
}

// TestSyncFailsOnlyForItsOwn: a failure of what the endpoint needs reaches the
// call; one of a peer's entry does not.
func TestSyncFailsOnlyForItsOwn(t *testing.T) {
	h := newHost(t)
	h.peers(1, 2)
	h.update(func(tx *store.Tx) error { return tx.PutNetwork(network(1)) })
	bad := errors.New("planted failure")
	ours, other := endpoint(1, 2), endpoint(1, 3)
	h.kernel.Before = func(_ int, op dataplane.Op) error {
		switch o := op.Object.(type) {
		case dataplane.Veth:
			if o.Name == ours.ID.HostLink() {
				return bad
			}
		case dataplane.FDB:
			if o.Dst.IsValid() {
				return bad
			}
		}
		return nil
	}
	h.update(func(tx *store.Tx) error {
		_, err := tx.PutEndpoint(ours)
		_, err2 := tx.PutEndpoint(other)
		return errors.Join(err, err2)
	})
	if err := h.loop.Sync(t.Context(), 1, other.ID); err != nil {
		t.Errorf("a peer's failure reached the call: %v", err)
	}
	if err := h.loop.Sync(t.Context(), 1, ours.ID); !errors.Is(err, bad) {
		t.Errorf("got %v, want the failure of the link", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.loop.Sync(ctx, 1, ours.ID); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v after the call's time", err)
	}
}

// TestSyncFailsForItsOwnBehindTheHosts: what the host's rules can do without does not hide
// that the endpoint's link could not be made.
func TestSyncFailsForItsOwnBehindTheHosts(t *testing.T) {
	h := newHost(t)
	u := underlay
	u.Program = true
	h.kernel.SetUnderlay(u)
	bad := errors.New("planted failure")
	h.kernel.Before = func(_ int, op dataplane.Op) error {
		switch op.Object.(type) {
		case dataplane.Program, dataplane.Veth:
			return bad
		}
		return nil
	}
	e := endpoint(1, 2)
	h.update(func(tx *store.Tx) error {
		if err := tx.PutNetwork(network(1)); err != nil {
			return err
		}
		_, err := tx.PutEndpoint(e)
		return err
	})
	for range 2 { // the second finds the host's pass due again
		if err := h.loop.Sync(t.Context(), 1, e.ID); !errors.Is(err, bad) {
			t.Errorf("got %v, want the failure of the link", err)
		}
	}
}

// TestLostLinkIsSaid: the link of a joined endpoint cannot be made again, so a
// call for it fails and the audit hears of it.
func TestLostLinkIsSaid(t *testing.T) {
	h := newHost(t)
	e := endpoint(1, 2)
	h.update(func(tx *store.Tx) error {
		if err := tx.PutNetwork(network(1)); err != nil {
			return err
		}
		_, err := tx.PutEndpoint(e)
		return err
	})
	if err := h.loop.Sync(t.Context(), 1, e.ID); err != nil {
		t.Fatal(err)
	}
	e.Sandbox = "/sandbox"
	h.update(func(tx *store.Tx) error { _, err := tx.PutEndpoint(e); return err })
	if err := h.loop.Sync(t.Context(), 1, e.ID); err != nil {
		t.Fatal(err)
	}
	s, _ := h.db.Snapshot(1)
	p, _ := dataplane.PlanNetwork(s, underlay)
	veth := p[dataplane.Key{Kind: dataplane.KindVeth, Name: e.ID.HostLink()}].(dataplane.Veth)
	for _, untaken := range []int{1, 0} { // Docker has not taken it yet, and then it has
		there := veth
		there.Waits = untaken == 1
		if err := h.kernel.Break(dataplane.Op{Verb: dataplane.Put, Object: there}); err != nil {
			t.Fatal(err)
		}
		h.within(5*time.Second, "the loop says whether Docker has taken the link", func() error {
			if m := h.loop.Untaken(1); len(m) != untaken {
				return fmt.Errorf("untaken %v", m)
			}
			return nil
		})
	}
	if err := h.kernel.Break(dataplane.Op{Verb: dataplane.Delete, Object: veth}); err != nil {
		t.Fatal(err)
	}
	h.within(5*time.Second, "the loop says that the link is missing", func() error {
		if m := h.loop.Missing(1); len(m) != 1 || m[0] != e.ID {
			return fmt.Errorf("missing %v", m)
		}
		return nil
	})
	if err := h.loop.Sync(t.Context(), 1, e.ID); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("got %v", err)
	}
	h.settled()
}

// TestDriftIsRepairedAndCounted: each object of a network that somebody removes
// comes back without a record having changed.
func TestDriftIsRepairedAndCounted(t *testing.T) {
	h := newHost(t)
	h.peers(1, 2)
	h.update(func(tx *store.Tx) error {
		if err := tx.PutNetwork(network(1)); err != nil {
			return err
		}
		_, err := tx.PutEndpoint(endpoint(1, 2))
		return err
	})
	h.settled()
	broken := 0
	for _, v := range []store.VNI{1, store.HostVNI} {
		want, _, _, err := h.loop.Explain(t.Context(), v)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range want.Sorted() {
			if h.kernel.Break(dataplane.Op{Verb: dataplane.Delete, Object: o}) == nil {
				broken++
			}
			h.settled()
		}
	}
	total := uint64(0)
	for _, n := range h.loop.Stats().Repaired {
		total += n
	}
	if total < uint64(broken) {
		t.Errorf("%d objects broken, %d counted as repaired: %v", broken, total, h.loop.Stats().Repaired)
	}
	t.Logf("drift: %d objects removed one by one, all back", broken)
}
