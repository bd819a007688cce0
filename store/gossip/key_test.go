package gossip

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// addKeyed makes a network with a key of one repeated byte.
func (h *host) addKeyed(v store.VNI, prefix string, key byte) {
	h.t.Helper()
	h.update(func(tx *store.Tx) error {
		return tx.PutNetwork(store.Network{ID: networkID(v), VNI: v, Mode: "vxlan", Key: bytes.Repeat([]byte{key}, 32),
			Subnets: []store.Subnet{{Pool: netip.MustParsePrefix(prefix)}}})
	})
}

// A host that does not hold a network's key claims to run it: it learns no endpoint
// of it, and its own are believed by nobody.
func TestStrangerWithoutTheNetworksKey(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	stranger := newHost(t, s.addr(3), s.addr(1)).start()
	other := newHost(t, s.addr(4), s.addr(1)).start()
	for _, h := range []*host{a, b} {
		h.addKeyed(5000, "10.50.0.0/16", 1)
	}
	stranger.addNetwork(5000, "10.50.0.0/16")
	other.addKeyed(5000, "10.50.0.0/16", 2)
	for i, h := range []*host{a, b, stranger, other} {
		h.addEndpoint(5000, fmt.Sprintf("ep%d", i), fmt.Sprintf("10.50.0.%d", i+1))
	}
	a.waitSees(5000, soon, "ep1")
	b.waitSees(5000, soon, "ep0")
	for _, h := range []*host{stranger, other} {
		h.waitPeer(a, soon, "in sync", inSync)
		if got := h.sees(5000); len(got) > 0 {
			t.Errorf("%s sees %v", h.addr, got)
		}
		// It asks all the same, as a forged plugin would.
		p, _ := h.peer(a)
		str, err := h.c.dial(t.Context(), record{Host: p.Host}, a.id.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer str.close()
		if got, err := str.ask(request{VNI: 5000}, time.Now().Add(soon)); err == nil {
			t.Errorf("%s is told %+v", h.addr, got)
		}
	}
	if n := a.c.Stats().Dropped["no-network-key"]; n != 2 {
		t.Errorf("%d questions without the key are counted, want 2", n)
	}
	if got := a.sees(5000); len(got) != 1 {
		t.Errorf("a sees %v, want ep1 alone", got)
	}
	if s, err := a.db.HostSnapshot(); err != nil || len(s.Peers) != 1 || s.Peers[0].ID != b.id.ID {
		t.Errorf("a takes packets from %+v, %v; want b alone", s.Peers, err)
	}
}

// Docker has told of the other hosts; none is named to join.
func TestNodesOfTheSwarmMeet(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a, b := newHost(t, s.addr(1)).start(), newHost(t, s.addr(2)).start()
	a.update(func(tx *store.Tx) error {
		for i := range 3 { // the third is not there
			if err := tx.PutNode(store.Node{Address: s.addr(i + 1), Self: i == 0, Heard: time.Now()}); err != nil {
				return err
			}
		}
		return nil
	})
	a.waitPeer(b, soon, "alive", alive)
	b.waitPeer(a, soon, "alive", alive)
}
