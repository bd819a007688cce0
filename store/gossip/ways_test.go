package gossip

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// mapped is an underlay where an address may lead to another host, or nowhere.
type mapped struct {
	sockets
	leads map[netip.Addr]netip.Addr
	tried []netip.Addr
}

func (m *mapped) dial(ctx context.Context, from netip.Addr, to string, limit time.Duration) (net.Conn, error) {
	ap := netip.MustParseAddrPort(to)
	m.tried = append(m.tried, ap.Addr())
	at, ok := m.leads[ap.Addr()]
	if !ok {
		return nil, errors.New("no way there")
	}
	return m.sockets.dial(ctx, from, netip.AddrPortFrom(at, ap.Port()).String(), limit)
}

// TestWaysOfDoubt has a peer whose address is one of this host's subnet, and that may be
// behind another NAT with the same addresses.
func TestWaysOfDoubt(t *testing.T) {
	seg := newSegment()
	here, there, other := newHost(t, seg.addr(1)).open(), newHost(t, seg.addr(2)).open(), newHost(t, seg.addr(3)).open()
	for _, h := range []*host{here, there, other} {
		l, err := net.Listen("tcp", netip.AddrPortFrom(h.addr, testDataPort).String())
		if err != nil {
			t.Fatal(err)
		}
		var serving sync.WaitGroup
		serving.Go(func() { _ = h.c.newServer().serve(t.Context(), l) })
		t.Cleanup(func() { _ = l.Close(); serving.Wait(); _ = h.db.Close() })
	}
	there.c.table.joined(record{Host: here.db.Self()})
	inside, public := netip.MustParseAddr("192.168.1.2"), netip.MustParseAddr("198.51.100.2")
	here.c.cfg.Near = netip.MustParsePrefix("192.168.1.0/24").Contains
	now := time.Now()
	here.c.table.now = func() time.Time { return now }
	r := record{Host: store.Host{ID: there.id.ID, Address: inside, Public: public, DataPort: testDataPort}}
	here.update(func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: r.Host}) })
	for _, step := range []struct {
		name  string
		leads map[netip.Addr]netip.Addr
		later time.Duration
		tried []netip.Addr
		away  bool
		fails bool
	}{
		{name: "on the link", leads: map[netip.Addr]netip.Addr{inside: there.addr}, tried: []netip.Addr{inside}},
		{name: "nowhere", tried: []netip.Addr{inside, public}, fails: true},
		{name: "another host has the address", leads: map[netip.Addr]netip.Addr{inside: other.addr, public: there.addr}, tried: []netip.Addr{inside, public}, away: true},
		{name: "known to be away", leads: map[netip.Addr]netip.Addr{inside: there.addr, public: there.addr}, later: lookAgain - time.Second, tried: []netip.Addr{public}, away: true},
		{name: "away and nowhere", tried: []netip.Addr{public}, away: true, fails: true},
		{name: "looked for again", leads: map[netip.Addr]netip.Addr{public: there.addr}, later: time.Second, tried: []netip.Addr{inside, public}, away: true},
		{name: "found again", leads: map[netip.Addr]netip.Addr{inside: there.addr, public: there.addr}, later: lookAgain, tried: []netip.Addr{inside}},
	} {
		under := &mapped{leads: step.leads}
		here.c.under = under
		now = now.Add(step.later)
		s, err := here.c.dial(t.Context(), r, there.id.ID)
		if (err != nil) != step.fails {
			t.Errorf("%s: dial: %v", step.name, err)
		}
		if s != nil {
			s.close()
		}
		var p store.Peer
		if err := here.db.View(func(tx *store.Tx) (err error) { p, err = tx.Peer(there.id.ID); return err }); err != nil {
			t.Fatal(err)
		}
		want := inside
		if step.away {
			want = public
		}
		if got := here.c.wayTo(r.Host); p.Away != step.away || got != want || !slices.Equal(under.tried, step.tried) {
			t.Errorf("%s: away %v, reached by %s, tried %s; want %v, %s, %s", step.name, p.Away, got, under.tried, step.away, want, step.tried)
		}
	}
	// What the database says is known to the next process, but not of another address.
	here.update(func(tx *store.Tx) error { return tx.PutPeer(store.Peer{Host: r.Host, Away: true}) })
	if err := here.c.remember(); err != nil || here.c.wayTo(r.Host) != public {
		t.Errorf("read from the database: %v, %s", err, here.c.wayTo(r.Host))
	}
	r.Address = inside.Next()
	if got := here.c.wayTo(r.Host); got != r.Address {
		t.Errorf("at a new address: %s", got)
	}
	// A peer may even have this host's own address.
	here.c.cfg.Near = seg.prefix().Contains
	r.Address = here.addr
	under := &mapped{leads: map[netip.Addr]netip.Addr{public: there.addr}}
	here.c.under = under
	s, err := here.c.dial(t.Context(), r, there.id.ID)
	if err != nil || !slices.Equal(under.tried, []netip.Addr{public}) || here.c.wayTo(r.Host) != public {
		t.Fatalf("peer with the own address: %v, tried %s", err, under.tried)
	}
	s.close()
}
