package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// keyed is a host that hears what others tell of their keys, without them.
type keyed struct {
	*host
	log     bytes.Buffer
	now     time.Time
	counter uint64
}

func newKeyed(t *testing.T, own ...store.WGKey) *keyed {
	k := &keyed{host: newHost(t, newSegment().addr(1)), now: time.Now()}
	k.cfg.Log = slog.New(slog.NewTextHandler(&k.log, nil))
	k.open()
	t.Cleanup(func() { _ = k.db.Close() })
	k.c.table.now = func() time.Time { return k.now }
	k.tunnel(own...)
	return k
}

func (k *keyed) tunnel(own ...store.WGKey) {
	k.t.Helper()
	if err := k.db.SetTunnel(store.Tunnel{Keys: own, Port: 4798}); err != nil {
		k.t.Fatal(err)
	}
}

// tell makes a peer tell its keys in a new record.
func (k *keyed) tell(id store.HostID, keys ...store.WGKey) {
	k.counter++
	k.c.table.joined(record{Port: testPort, Boot: 1, Counter: k.counter, Host: store.Host{ID: id, Name: "name of " + string(id), Epoch: 1,
		Address: netip.AddrFrom4([4]byte{192, 0, 2, id[0]}), DataPort: testDataPort, Tunnel: store.Tunnel{Keys: keys, Port: 4798}}})
}

func (k *keyed) die(id store.HostID) {
	see, _ := k.c.table.sight(id)
	k.c.table.left(id, see.rec.memberName())
}

// save is a pass over the news, or over all.
func (k *keyed) save(all bool) {
	k.t.Helper()
	if _, err := k.c.savePeers(context.Background(), all); err != nil {
		k.t.Fatal(err)
	}
}

func (k *keyed) revoke(id store.HostID, out bool) {
	k.t.Helper()
	k.update(func(tx *store.Tx) error { return tx.Revoke(id, out) })
}

// want compares what was taken over of the peers: "c of b", or "c with" keys.
func (k *keyed) want(when string, want ...string) {
	k.t.Helper()
	var got []string
	if err := k.db.View(func(tx *store.Tx) error {
		peers, err := tx.Peers()
		for _, p := range peers {
			text := fmt.Sprintf("%s of %s", p.ID, p.KeyOf)
			if p.KeyOf == "" {
				text = fmt.Sprintf("%s with", p.ID)
			}
			for _, key := range p.Tunnel.Keys {
				text += fmt.Sprintf(" %d", key[0])
			}
			got = append(got, text)
		}
		return err
	}); err != nil {
		k.t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		k.t.Errorf("%s: %q, want %q", when, got, want)
	}
}

// TestKeyIsOneHosts: a peer that tells another's key, or this host's, has no tunnel until
// it tells others or the other host gives the key up. The host that told it first keeps
// it, also while it is dead.
func TestKeyIsOneHosts(t *testing.T) {
	k := newKeyed(t, store.WGKey{1})
	k.tell("b", store.WGKey{2})
	k.tell("d", store.WGKey{4})
	k.save(false)
	k.want("each its own", "b with 2", "d with 4")
	k.tell("a", store.WGKey{2})
	k.tell("c", store.WGKey{3}, store.WGKey{1})
	k.save(false)
	k.want("another's, and this host's beside its own", "a of b", "b with 2", "c of "+string(k.id.ID), "d with 4")
	for _, words := range []string{
		fmt.Sprintf("peer=\"name of a\" host=a key=%q of=\"name of b\" ofHost=b", store.WGKey{2}),
		fmt.Sprintf("peer=\"name of c\" host=c key=%q of=host-%s ofHost=%s", store.WGKey{1}, k.addr, k.id.ID),
	} {
		if !strings.Contains(k.log.String(), words) {
			t.Errorf("the log does not say %s: %s", words, k.log.String())
		}
	}
	k.tell("a", store.WGKey{2}) // again, in another record
	k.save(false)
	k.save(true)
	k.want("told again", "a of b", "b with 2", "c of "+string(k.id.ID), "d with 4")
	if n := strings.Count(k.log.String(), "WireGuard key of another host"); n != 2 {
		t.Errorf("it is said %d times, want once of each: %s", n, k.log.String())
	}

	k.die("b")
	k.save(true)
	k.want("the one that has it is dead", "a of b", "b with 2", "c of "+string(k.id.ID), "d with 4")
	k.tell("c", store.WGKey{3})
	k.tell("a", store.WGKey{7})
	k.save(false)
	k.want("they tell others", "a with 7", "b with 2", "c with 3", "d with 4")
	k.tell("a", store.WGKey{2})
	k.save(false)
	k.want("that of a dead one", "a of b", "b with 2", "c with 3", "d with 4")
	k.now = k.now.Add(DefaultForgetAfter + time.Second)
	k.save(true)
	k.save(true)
	k.want("the dead one is forgotten", "a with 2", "c with 3", "d with 4")
	k.tell("b", store.WGKey{2})
	k.save(false)
	k.want("it is back", "a with 2", "b of a", "c with 3", "d with 4")

	k.revoke("a", true)
	k.save(true)
	k.want("who has it is revoked", "a with 2", "b with 2", "c with 3", "d with 4")
	k.save(true)
	k.want("after another look", "a of b", "b with 2", "c with 3", "d with 4")
	k.revoke("a", false)
	k.save(true)
	k.want("and taken back", "a of b", "b with 2", "c with 3", "d with 4")

	// A change of keys.
	k.tell("d", store.WGKey{4}, store.WGKey{5})
	k.save(false)
	k.tell("d", store.WGKey{5}, store.WGKey{5})
	k.save(false)
	k.want("a change of keys", "a of b", "b with 2", "c with 3", "d with 5 5")
	k.tell("c", store.WGKey{4})
	k.save(false)
	k.want("a key that was given up", "a of b", "b with 2", "c with 4", "d with 5 5")
	k.tell("d", store.WGKey{5}, store.WGKey{4})
	k.save(false)
	k.want("a change to another's key", "a of b", "b with 2", "c with 4", "d of c")
	k.tunnel(store.WGKey{1}, store.WGKey{4})
	k.save(true)
	k.want("this host has one now", "a of b", "b with 2", "c of "+string(k.id.ID), "d of "+string(k.id.ID))
	k.tunnel(store.WGKey{6})
	k.save(true)
	k.want("and no more", "a of b", "b with 2", "c with 4", "d of c")
}

// TestKeyOfTwoAtOnce: without anybody who had it the lower id has a key, also one that a
// former version took over from both.
func TestKeyOfTwoAtOnce(t *testing.T) {
	k := newKeyed(t)
	for _, id := range []store.HostID{"c", "a", "b"} {
		k.tell(id, store.WGKey{2})
	}
	k.save(false)
	k.want("three at once", "a with 2", "b of a", "c of a")
	k.update(func(tx *store.Tx) error {
		p, err := tx.Peer("c")
		if err != nil {
			return err
		}
		p.Tunnel, p.KeyOf = store.Tunnel{Keys: []store.WGKey{{2}}, Port: 4798}, ""
		return tx.PutPeer(p)
	})
	k.save(true)
	k.want("of a former version", "a with 2", "b of a", "c of a")
}

// TestKeyOfAnotherOutlivesTheProcess: a new process knows who had a key, and takes it from
// nobody before it has heard the hosts.
func TestKeyOfAnotherOutlivesTheProcess(t *testing.T) {
	k := newKeyed(t)
	k.tell("b", store.WGKey{2})
	k.save(false)
	k.tell("a", store.WGKey{2})
	k.save(false)
	k.want("before", "a of b", "b with 2")
	again, err := New(k.cfg)
	if err != nil {
		t.Fatal(err)
	}
	k.c = again
	if err := k.c.remember(); err != nil {
		t.Fatal(err)
	}
	k.log.Reset()
	k.save(true)
	k.want("nobody was heard", "a of b", "b with 2")
	k.tell("a", store.WGKey{2})
	k.save(false)
	k.save(true)
	k.want("the other one is heard first", "a of b", "b with 2")
	if text := k.log.String(); strings.Contains(text, "WireGuard") {
		t.Errorf("it is said again: %s", text)
	}
}

// TestKeyOfAnotherInTheCluster has a host that signs another's key into its record.
func TestKeyOfAnotherInTheCluster(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	tell := func(h *host, key byte) {
		t.Helper()
		if err := h.db.SetTunnel(store.Tunnel{Keys: []store.WGKey{{key}}, Port: 4798}); err != nil {
			t.Fatal(err)
		}
	}
	has := func(key byte) func(PeerStatus) bool {
		return func(p PeerStatus) bool {
			return p.KeyOf == "" && len(p.Tunnel.Keys) == 1 && p.Tunnel.Keys[0] == store.WGKey{key}
		}
	}
	of := func(o *host) func(PeerStatus) bool {
		return func(p PeerStatus) bool { return p.KeyOf == o.id.ID && len(p.Tunnel.Keys) == 0 }
	}
	tell(a, 1)
	tell(b, 2)
	a.waitPeer(b, soon, "its key", has(2))
	c := newHost(t, s.addr(3), s.addr(1)).start()
	tell(c, 2)
	a.waitPeer(c, soon, "told to have another's key", of(b))
	b.waitPeer(c, soon, "told to have this host's key", of(b))
	c.waitPeer(b, soon, "told to have this host's key", of(c))
	c.waitPeer(a, soon, "its key", has(1))
	a.waitPeer(b, soon, "its key still", has(2))
	tell(c, 3)
	a.waitPeer(c, soon, "its own key", has(3))
	b.waitPeer(c, soon, "its own key", has(3))
	c.waitPeer(b, soon, "its key", has(2))
}
