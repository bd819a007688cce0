package dataplane_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// The id is lower than that of every other peer.
const (
	thief        = store.HostID("0thief")
	thiefAddress = "192.0.2.99"
)

// claim makes the thief tell that it has the endpoints in a network, and no others.
func (h *host) claim(n store.Network, seq uint64, all ...store.SharedEndpoint) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		if _, err := tx.Peer(thief); err != nil {
			p := store.Peer{Host: store.Host{ID: thief, Name: "thief", Address: netip.MustParseAddr(thiefAddress), Public: h.public, Epoch: 1, Tunnel: kerneltest.TunnelOf(thief, 1)}}
			if err := errors.Join(tx.PutPeer(p), tx.MergeNetworks(thief, 1, 1, []store.SharedNetwork{n.Shared()})); err != nil {
				return err
			}
		}
		_, err := tx.MergeEndpoints(thief, 0, store.Delta{VNI: n.VNI, Epoch: 1, Seq: seq, Full: true, Endpoints: all})
		return err
	})
}

// led returns the peer to whom the kernel leads for endpoint i of network 1.
func (h *host) led(i int) (to []store.HostID) {
	h.t.Helper()
	e := endpoint(1, i)
	for _, o := range h.holds()[1].Sorted() {
		text := o.String()
		fdb, onBridge := o.(dataplane.FDB)
		route, routed := o.(dataplane.Route)
		if !(onBridge && fdb.MAC == e.MAC && !fdb.Master) && !(routed && route.Prefix.Addr() == e.IPv4.Addr()) {
			continue
		}
		for id, address := range map[store.HostID]string{thief: thiefAddress, "peer000": "192.0.2.10", "peer001": "192.0.2.11", "peer002": "192.0.2.12"} {
			if strings.Contains(text, address+" ") || strings.Contains(text, kerneltest.TunnelOf(id, 1).Keys[0].String()) {
				to = append(to, id)
			}
		}
	}
	return to
}

// contests waits until the status tells of as many as there are words, and each is in it.
func (h *host) contests(when string, words ...string) {
	h.t.Helper()
	h.within(5*time.Second, when+": the status tells", func() error {
		var all []string
		for _, s := range h.loop.Status() {
			for _, c := range s.Contests {
				all = append(all, fmt.Sprintf("%s: %s before %s", c.What, c.Used.Host, c.Other.Host))
			}
		}
		for _, w := range words {
			if !strings.Contains(strings.Join(all, "\n"), w) {
				return fmt.Errorf("%q is not in %q", w, all)
			}
		}
		if len(all) != len(words) {
			return fmt.Errorf("it tells of %q", all)
		}
		return nil
	})
}

// TestAPeerKeepsItsAddresses: what a living peer has, another cannot have by saying so,
// also not across a restart. It can once the first has given it up or is silent, and
// then keeps it in turn. A disputed address is told of.
func TestAPeerKeepsItsAddresses(t *testing.T) {
	for name, way := range ways() {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			n := way(h)
			h.peersOf(n, 3)
			h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
			h.settled()
			before := h.holds()[1]
			expect := func(when string, want ...store.HostID) {
				t.Helper()
				h.settled()
				for i, id := range want {
					i += 3 - len(want)
					if to := h.led(100 + i); len(to) != 1 || to[0] != id {
						t.Errorf("%s: the kernel leads to %v for endpoint %d, want %s", when, to, i, id)
					}
				}
			}
			expect("before", "peer000", "peer001", "peer002")
			var stolen []store.SharedEndpoint
			for i := range 3 {
				e := endpoint(1, 100+i).Shared()
				e.ID = store.EndpointID(fmt.Sprint("stolen", i))
				stolen = append(stolen, e)
			}
			stolen[2].MAC = store.DeriveMAC("another")
			h.claim(n, 1, stolen...)
			expect("claimed", "peer000", "peer001", "peer002")
			for k, o := range before {
				if h.holds()[1][k] != o {
					t.Errorf("%v became %v", o, h.holds()[1][k])
				}
			}
			if text := h.holds()[1].String(); strings.Contains(text, stolen[2].MAC.String()) {
				t.Errorf("something is programmed for the thief: %s", text)
			}
			var told []string
			for i, e := range stolen {
				told = append(told, fmt.Sprintf("%s: peer%03d before %s", e.IPv4, i, thief))
			}
			h.contests("claimed", told...)
			tell := func(t store.Tunnel) {
				h.update(func(tx *store.Tx) error {
					p, err := tx.Peer(thief)
					p.Tunnel = t
					return errors.Join(err, tx.PutPeer(p))
				})
			}
			own, theirs := kerneltest.TunnelOf(thief, 1), kerneltest.TunnelOf("peer002", 1)
			tell(store.Tunnel{Keys: []store.WGKey{theirs.Keys[0], own.Keys[0]}, Port: own.Port, Last: true})
			expect("the thief tells another's key beside its own", "peer000", "peer001", "peer002")
			tell(own)
			h.restart()
			<-h.loop.Ready()
			expect("after a restart", "peer000", "peer001", "peer002")
			h.stop()
			h.update(func(tx *store.Tx) error {
				return errors.Join(tx.ForgetPeer("peer000"), tx.ForgetPeer("peer001"), tx.ForgetPeer("peer002"))
			})
			var heard atomic.Bool
			h.inSync = heard.Load
			h.start()
			<-h.loop.Ready()
			for i, id := range []store.HostID{"peer000", "peer001", "peer002"} {
				if to := h.led(100 + i); len(to) != 1 || to[0] != id {
					t.Errorf("the database was lost, and the thief is heard first: the kernel leads to %v, want %s", to, id)
				}
			}
			h.peersOf(n, 3)
			expect("the others are heard too", "peer000", "peer001", "peer002")
			heard.Store(true)
			if err := h.loop.Sync(t.Context(), 1, ""); err != nil {
				t.Error(err)
			}
			expect("all are heard", "peer000", "peer001", "peer002")
			h.update(func(tx *store.Tx) error {
				_, err := tx.MergeEndpoints("peer000", 1, store.Delta{VNI: 1, Epoch: 1, Seq: 2, Endpoints: []store.SharedEndpoint{{ID: endpoint(1, 100).ID, Gone: true}}})
				return err
			})
			expect("one is given up", thief, "peer001", "peer002")
			silent := func(since time.Time) {
				h.update(func(tx *store.Tx) error {
					p, err := tx.Peer("peer001")
					p.DeadSince = since
					return errors.Join(err, tx.PutPeer(p))
				})
			}
			silent(time.Unix(1, 0))
			expect("a peer is silent", thief, thief, "peer002")
			h.contests("a peer is silent", "peer002 before 0thief")
			silent(time.Time{})
			expect("it is back", thief, thief, "peer002")
			h.update(func(tx *store.Tx) error { return tx.Revoke(thief, true) })
			h.settled()
			if to := h.led(100); len(to) != 0 {
				t.Errorf("the thief is revoked: the kernel leads to %v", to)
			}
			expect("the thief is revoked", "peer001", "peer002")
			h.contests("the thief is revoked")
		})
	}
}

// TestNoPartOfAPeersIsDrawn: on a bridge a MAC, an IPv4 address in either field, or an
// IPv6 address alone take nothing from who has them, also if they come with something
// that is the thief's own.
func TestNoPartOfAPeersIsDrawn(t *testing.T) {
	h := newHost(t)
	n := network(1)
	n.Subnets = append(n.Subnets, store.Subnet{Pool: netip.MustParsePrefix("fd00:1::/64")})
	h.peersOf(n, 1)
	six := netip.MustParseAddr("fd00:1::100")
	victim, own := endpoint(1, 100).Shared(), endpoint(1, 200).Shared()
	victim.IPv6 = six
	h.update(func(tx *store.Tx) error {
		_, err := tx.MergeEndpoints("peer000", 1, store.Delta{VNI: 1, Epoch: 1, Seq: 2, Endpoints: []store.SharedEndpoint{victim}})
		return errors.Join(err, tx.PutNetwork(n))
	})
	h.claim(n, 1, own)
	h.settled()
	before := h.holds()[1]
	for i, change := range []func(*store.SharedEndpoint){
		func(e *store.SharedEndpoint) { e.MAC = victim.MAC },
		func(e *store.SharedEndpoint) { e.IPv4 = victim.IPv4 },
		func(e *store.SharedEndpoint) { e.IPv4, e.IPv6 = netip.Addr{}, victim.IPv4 },
		func(e *store.SharedEndpoint) { e.IPv6 = victim.IPv4 },
		func(e *store.SharedEndpoint) { e.IPv6 = six },
		func(e *store.SharedEndpoint) { e.IPv4, e.IPv6 = netip.Addr{}, six },
		func(e *store.SharedEndpoint) { e.MAC, e.IPv6 = victim.MAC, six },
	} {
		claimed := own
		change(&claimed)
		h.claim(n, uint64(2+2*i), claimed)
		h.settled()
		for k, o := range before {
			text := o.String()
			theirs := strings.Contains(text, victim.MAC.String()) || strings.Contains(text, victim.IPv4.String()+" ")
			if have := h.holds()[1][k]; theirs && have != o {
				t.Errorf("change %d: %v became %v", i, o, have)
			}
		}
		want := "peer000 before " + string(thief)
		if !claimed.IPv6.Is4() && claimed.IPv6.IsValid() {
			want = six.String() // it is nobody's, unless the MAC is
		}
		h.contests(fmt.Sprint("change ", i), want)
		h.claim(n, uint64(3+2*i), own)
		h.settled()
	}
}

// A host that claims every address of a network does not fill the status.
func TestContestsAreCounted(t *testing.T) {
	h := newHost(t)
	h.peers(1, 1)
	var all []store.SharedEndpoint
	for i := range 150 {
		all = append(all, endpoint(1, 300+i).Shared())
	}
	h.update(func(tx *store.Tx) error {
		_, err := tx.MergeEndpoints("peer000", 1, store.Delta{VNI: 1, Epoch: 1, Seq: 2, Endpoints: all})
		return errors.Join(err, tx.PutNetwork(network(1)))
	})
	h.claim(network(1), 1, all...)
	h.within(5*time.Second, "the status counts", func() error {
		for _, s := range h.loop.Status() {
			if s.Contested == 150 && len(s.Contests) == 100 {
				return nil
			}
		}
		return fmt.Errorf("%+v", h.loop.Status())
	})
}

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestTheLogTellsOnceOfTwoHosts: not for each address, not again, and not of what is over
// in a moment.
func TestTheLogTellsOnceOfTwoHosts(t *testing.T) {
	h := newHost(t)
	h.stop()
	log := &syncBuffer{}
	h.log = slog.New(slog.NewTextHandler(log, nil))
	h.start()
	h.peers(1, 3)
	n := network(1)
	h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
	h.settled()
	stolen := func(i int) store.SharedEndpoint {
		e := endpoint(1, 100+i).Shared()
		e.ID = store.EndpointID(fmt.Sprint("stolen", i))
		return e
	}
	again := stolen(0)
	again.ID, again.MAC = "again", store.DeriveMAC("another")
	h.claim(n, 1, stolen(0), again, stolen(1), stolen(2))
	h.settled()
	h.claim(n, 2, stolen(0), again, stolen(1)) // a moment later the third has moved
	h.settled()
	h.within(30*time.Second, "the log tells", func() error {
		if !strings.Contains(log.String(), "two hosts have one address") {
			return errors.New(log.String())
		}
		return nil
	})
	if err := h.loop.Sync(t.Context(), 1, ""); err != nil {
		t.Fatal(err)
	}
	if text := log.String(); strings.Count(text, "two hosts") != 2 || strings.Count(text, "host=peer000") != 1 || strings.Count(text, "otherHost=0thief") != 2 || strings.Contains(text, "peer002") {
		t.Errorf("want one line of peer000 and the thief, and one of peer001 and it:\n%s", text)
	}
}
