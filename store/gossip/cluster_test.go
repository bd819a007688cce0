package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

const soon = 15 * time.Second // longer than memberlist needs to find a host dead

func TestRecordsAppearAndDisappear(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1), s.addr(2)).start()
	c := newHost(t, s.addr(3), s.addr(2)).start()
	for _, h := range []*host{a, b, c} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	a.waitPeer(c, soon, "in sync", inSync)
	c.waitPeer(a, soon, "in sync", inSync)

	a.addEndpoint(5000, "ep1", "10.50.0.1")
	t.Logf("figure: one endpoint seen by two peers after %v", max(b.waitSees(5000, soon, "ep1"), c.waitSees(5000, soon, "ep1")))

	before := b.c.Stats().Fetches
	var names []string
	for i := range 300 {
		name := fmt.Sprintf("burst%03d", i)
		names = append(names, name)
		a.addEndpoint(5000, name, fmt.Sprintf("10.50.1.%d", i%250+1))
	}
	took := c.waitSees(5000, soon, append(names, "ep1")...)
	b.waitSees(5000, soon, append(names, "ep1")...)
	t.Logf("figure: burst of 300 endpoints seen %v after the last one, with %d fetches by one peer", took, b.c.Stats().Fetches-before)

	for _, n := range names {
		a.removeEndpoint(5000, n)
	}
	b.waitSees(5000, soon, "ep1")
	c.waitSees(5000, soon, "ep1")
	b.waitPeer(a, soon, "in sync", inSync)
	if st := b.c.Stats(); st.Members != 3 || st.Records != 1 || st.Dead != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestRecordsOfNetworkCreatedLaterAreFetched(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.waitPeer(a, soon, "in sync", inSync)
	if n := b.held(5000); n != 0 {
		t.Errorf("b holds %d records of a network that it does not run", n)
	}
	b.addNetwork(5000, "10.50.0.0/16")
	t.Logf("figure: records of a network created here seen after %v", b.waitSees(5000, soon, "ep1"))
	a.update(func(tx *store.Tx) error { return tx.DeleteNetwork(networkID(5000)) })
	b.waitSees(5000, soon)
}

// A host that starts again holds what it held. Who has nothing new is not asked for
// endpoints, by a thousand hosts at once perhaps.
func TestStartAsksForNothingThatIsHeld(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.waitSees(5000, soon, "ep1")
	b.waitPeer(a, soon, "in sync", inSync)
	b.halt()
	b.start()
	b.waitPeer(a, soon, "in sync", inSync)
	if n := b.c.Stats().Fetches; n > 1 {
		t.Errorf("%d questions after a start, want none, or one for the list of networks", n)
	}
	a.waitPeer(b, soon, "in sync", inSync)
	a.addEndpoint(5000, "ep2", "10.50.0.2")
	b.waitSees(5000, soon, "ep1", "ep2")
}

func (h *host) held(v store.VNI) (n int) {
	if err := h.db.View(func(tx *store.Tx) error {
		all, err := tx.RemoteEndpoints(v)
		n = len(all)
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	return n
}

func TestOtherSubnetIsNotTheSameNetwork(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.addNetwork(5000, "10.51.0.0/16")
	b.waitPeer(a, soon, "in sync", inSync)
	if got := b.sees(5000); len(got) != 0 {
		t.Errorf("b sees %v of a network that differs", got)
	}
	if err := b.db.View(func(tx *store.Tx) error {
		own, err := tx.NetworkByVNI(5000)
		if err != nil {
			return err
		}
		other, err := tx.PeerNetwork(a.id.ID, 5000)
		if err == nil && other.Agrees(own.Shared()) {
			t.Error("the networks agree")
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

func TestClusterKey(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a, b := newHost(t, s.addr(1)), newHost(t, s.addr(2), s.addr(1))
	wrong, none := newHost(t, s.addr(3), s.addr(1)), newHost(t, s.addr(4), s.addr(1))
	a.cfg.Key = bytes.Repeat([]byte{1}, KeyBytes)
	b.cfg.Key = a.cfg.Key
	wrong.cfg.Key = bytes.Repeat([]byte{2}, KeyBytes)
	for _, h := range []*host{a, b, wrong, none} {
		h.start().addNetwork(5000, "10.50.0.0/16")
	}
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.waitSees(5000, soon, "ep1")
	waitFor(t, soon, func() error {
		if d := a.c.Stats().Dropped; d["other-key"] < 2 {
			return fmt.Errorf("no refusal was counted: %v", d)
		}
		return nil
	})
	for _, h := range []*host{wrong, none} {
		if n := h.c.Stats().Members; n != 1 {
			t.Errorf("host without the right key is in a cluster of %d", n)
		}
	}
	if n := a.c.Stats().Members; n != 2 {
		t.Errorf("a has %d members, want 2", n)
	}
}

func TestTakenPortIsTold(t *testing.T) {
	t.Parallel()
	s := newSegment()
	taken, err := net.Listen("tcp", netip.AddrPortFrom(s.addr(1), testDataPort).String())
	if err != nil {
		t.Fatal(err)
	}
	a := newHost(t, s.addr(1)).start()
	waitFor(t, soon, func() error {
		if text := a.c.Stats().Err; !strings.Contains(text, "address already in use") {
			return fmt.Errorf("it tells %q", text)
		}
		return nil
	})
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, soon, func() error {
		if text := a.c.Stats().Err; text != "" {
			return errors.New(text)
		}
		return nil
	})
}

func TestRestartedHostKeepsRecords(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	b.addNetwork(5000, "10.50.0.0/16")
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.addEndpoint(5000, "ep2", "10.50.0.2")
	b.waitSees(5000, soon, "ep1")
	a.waitSees(5000, soon, "ep2")
	b.halt()
	a.removeEndpoint(5000, "ep1")
	a.addEndpoint(5000, "ep3", "10.50.0.3")
	b.cfg.Join = nil // the peers in its database are enough
	b.start()
	if got := b.sees(5000); !slices.Equal(got, []string{"ep1"}) {
		t.Errorf("restarted host sees %v before it met anybody, want ep1", got)
	}
	t.Logf("figure: restarted host caught up after %v", b.waitSees(5000, soon, "ep3"))
	a.waitPeer(b, soon, "in sync", inSync)
	if got := a.sees(5000); !slices.Equal(got, []string{"ep2"}) {
		t.Errorf("the other host sees %v, want ep2", got)
	}
}

func TestLostDatabaseIsFetchedAnew(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	for i := range 20 {
		a.addEndpoint(5000, fmt.Sprintf("old%02d", i), fmt.Sprintf("10.50.0.%d", i+1))
	}
	b.addEndpoint(5000, "ep2", "10.50.0.200")
	a.waitSees(5000, soon, "ep2")
	waitFor(t, soon, func() error {
		if n := len(b.sees(5000)); n != 20 {
			return fmt.Errorf("b sees %d", n)
		}
		return nil
	})
	a.halt()
	if err := os.Remove(filepath.Join(a.dir, "weft.db")); err != nil {
		t.Fatal(err)
	}
	a.cfg.Join = []string{b.addr.String()}
	a.start()
	a.addNetwork(5000, "10.50.0.0/16")
	a.addEndpoint(5000, "new", "10.50.0.100")
	t.Logf("figure: new database of a peer taken over after %v", b.waitSees(5000, soon, "new"))
	a.waitSees(5000, soon, "ep2")
}

func TestDatabaseOfYesterdayIsBelieved(t *testing.T) {
	t.Parallel()
	a, b := newPair(t)
	a.addEndpoint(5000, "kept", "10.50.0.1")
	b.waitSees(5000, soon, "kept")
	path := filepath.Join(a.dir, "weft.db")
	a.halt()
	copied, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a.start()
	for i := range 5 {
		a.addEndpoint(5000, fmt.Sprintf("lost%d", i), fmt.Sprintf("10.50.0.%d", i+10))
	}
	a.addNetwork(5001, "10.51.0.0/16")
	b.waitSees(5000, soon, "kept", "lost0", "lost1", "lost2", "lost3", "lost4")
	a.halt()
	if err := os.WriteFile(path, copied, 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	b.waitSees(5000, soon, "kept")
	b.waitPeer(a, soon, "in sync", inSync)
}

func TestNewAddressIsAccepted(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	c := newHost(t, s.addr(3), s.addr(1)).start()
	for _, h := range []*host{a, b, c} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	c.waitPeer(b, soon, "in sync", inSync)
	a.waitPeer(b, soon, "in sync", inSync)
	b.addEndpoint(5000, "ep1", "10.50.0.1")
	a.waitSees(5000, soon, "ep1")
	c.waitSees(5000, soon, "ep1")

	moved := s.addr(22)
	b.db.SetAddress(moved, 1500)
	there := func(p PeerStatus) bool { return p.Address == moved && inSync(p) }
	t.Logf("figure: new address of a running host known after %v and %v",
		a.waitPeer(b, soon, "new address", there), c.waitPeer(b, soon, "new address", there))
	b.waitPeer(a, soon, "in sync", inSync)

	// With a restart in between, and back to the first address. The clock went back
	// too, so its record looks old.
	b.halt()
	b.start(func(c *Cluster) { c.boot = 1 })
	back := func(p PeerStatus) bool { return p.Address == b.addr && inSync(p) }
	t.Logf("figure: new address of a restarted host known after %v and %v",
		a.waitPeer(b, soon, "old address", back), c.waitPeer(b, soon, "old address", back))
	b.addEndpoint(5000, "ep2", "10.50.0.2")
	a.waitSees(5000, soon, "ep1", "ep2")
	c.waitSees(5000, soon, "ep1", "ep2")
}

func TestDeadPeerIsHiddenThenForgotten(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1))
	a.cfg.HideAfter, a.cfg.ForgetAfter = 2*time.Second, 5*time.Second
	a.start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	for _, h := range []*host{a, b} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	b.addEndpoint(5000, "ep1", "10.50.0.1")
	a.waitSees(5000, soon, "ep1")
	b.halt()
	t.Logf("figure: stopped host found dead after %v", a.waitPeer(b, 3*soon, "dead", func(p PeerStatus) bool { return !p.Alive && !p.DeadSince.IsZero() }))
	if got := a.sees(5000); !slices.Equal(got, []string{"ep1"}) {
		t.Errorf("records of a peer just found dead: %v, want ep1", got)
	}
	a.waitPeer(b, soon, "hidden", func(p PeerStatus) bool { return p.Hidden })
	a.waitSees(5000, soon)
	if n := a.held(5000); n != 1 {
		t.Errorf("%d records of a hidden peer are held, want 1", n)
	}
	waitFor(t, soon, func() error {
		if _, ok := a.peer(b); ok || a.held(5000) != 0 {
			return fmt.Errorf("peer is still known")
		}
		return nil
	})
	b.start()
	a.waitSees(5000, soon, "ep1")
}

func TestUnseenPeerIsHiddenAfterStart(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	b.addNetwork(5000, "10.50.0.0/16")
	b.addEndpoint(5000, "ep1", "10.50.0.1")
	a.waitSees(5000, soon, "ep1")
	a.halt()
	b.halt()
	a.cfg.HideAfter = 3 * time.Second
	a.start()
	if p, _ := a.peer(b); p.Hidden || !p.DeadSince.IsZero() {
		t.Errorf("remembered peer is dead at the start: %+v", p)
	}
	a.waitSees(5000, soon, "ep1")
	a.waitPeer(b, soon, "hidden", func(p PeerStatus) bool { return p.Hidden && !p.DeadSince.IsZero() })
}

func TestPartitionHeals(t *testing.T) {
	t.Parallel()
	s := newSegment()
	var cut atomic.Bool
	half := func(a netip.Addr) bool { return a.As4()[3] > 2 }
	var hosts []*host
	for i := 1; i <= 4; i++ {
		addr := s.addr(i)
		h := newHost(t, addr)
		if i > 1 {
			h.cfg.Join = []string{s.addr(1).String()}
		}
		h.start(func(c *Cluster) {
			c.reach = func(to netip.Addr) error {
				if cut.Load() && half(to) != half(addr) {
					return errCut
				}
				return nil
			}
		})
		h.addNetwork(5000, "10.50.0.0/16")
		hosts = append(hosts, h)
	}
	for _, h := range hosts {
		for _, o := range hosts {
			if h != o {
				h.waitPeer(o, soon, "in sync", inSync)
			}
		}
	}
	cut.Store(true)
	dead := func(p PeerStatus) bool { return !p.Alive && !p.DeadSince.IsZero() }
	hosts[0].waitPeer(hosts[2], 4*soon, "dead", dead)
	hosts[0].waitPeer(hosts[3], 4*soon, "dead", dead)
	hosts[3].waitPeer(hosts[0], 4*soon, "dead", dead)
	hosts[3].waitPeer(hosts[1], 4*soon, "dead", dead)
	hosts[0].addEndpoint(5000, "left", "10.50.0.1")
	hosts[3].addEndpoint(5000, "right", "10.50.0.2")
	hosts[1].waitSees(5000, soon, "left")
	hosts[2].waitSees(5000, soon, "right")
	if p, _ := hosts[1].peer(hosts[0]); !alive(p) {
		t.Errorf("peer in the same half: %+v", p)
	}
	cut.Store(false)
	start := time.Now()
	hosts[0].waitSees(5000, 2*soon, "right")
	hosts[1].waitSees(5000, 2*soon, "left", "right")
	hosts[2].waitSees(5000, 2*soon, "left", "right")
	hosts[3].waitSees(5000, 2*soon, "left")
	for _, h := range hosts {
		for _, o := range hosts {
			if h != o {
				h.waitPeer(o, 2*soon, "in sync", inSync)
			}
		}
	}
	t.Logf("figure: all agree %v after the heal", time.Since(start))
}

func TestCopiedHostStandsBack(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	for _, h := range []*host{a, b} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	b.addEndpoint(5000, "ep1", "10.50.0.1")
	a.waitSees(5000, soon, "ep1")
	b.waitPeer(a, soon, "in sync", inSync)
	twin := newHost(t, s.addr(3), s.addr(1))
	key, err := os.ReadFile(filepath.Join(b.dir, "host.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(twin.dir, "host.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	twin.id, twin.cfg.Identity = b.id, b.id
	twin.start()
	t.Logf("figure: copied identity found after %v", waitFor(t, soon, func() error {
		if at := twin.c.Stats().Twin; at != b.addr.String() || twin.c.Copied() == nil {
			return fmt.Errorf("copy knows of twin %q", at)
		}
		return nil
	}))
	if err := twin.c.Copied(); err == nil || !strings.Contains(err.Error(), "host.key") || b.c.Copied() != nil {
		t.Errorf("the copy says %v, the original %v", err, b.c.Copied())
	}
	right := func(p PeerStatus) bool { return p.Address == b.addr && inSync(p) }
	a.waitPeer(b, soon, "at its own address", right)
	b.addEndpoint(5000, "ep2", "10.50.0.2")
	a.waitSees(5000, soon, "ep1", "ep2")
}
