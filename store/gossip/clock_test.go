package gossip

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

const (
	year = 365 * 24 * time.Hour
	// Three addresses within seconds are as many dead members as living ones, and few
	// copies of a message find a living one. Push/pull, every 30 s, finds what was missed.
	healed = 100 * time.Second
)

// wrongBy starts a host whose clock of the day is off.
func wrongBy(off time.Duration) func(*Cluster) {
	return func(c *Cluster) {
		c.clock = func() time.Time { return time.Now().Add(off) }
		c.boot = uint64(c.clock().UnixNano())
	}
}

// The clock of a host is set a year ahead, two back, and right again, with a restart
// each time, at its old address and at a new one. All hosts go on believing it, and
// those with records from the future too.
func TestClockAYearOff(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	c := newHost(t, s.addr(3), s.addr(1)).start(wrongBy(-year))
	for _, h := range []*host{a, b, c} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	var want []string
	for i, off := range []time.Duration{year, -year, 0} {
		b.halt()
		for j := range 2 {
			if j == 0 {
				b.start(wrongBy(off))
			} else { // a new address while it runs
				b.db.SetAddress(s.addr(20+i), 1500)
			}
			name := fmt.Sprintf("ep%d%d", i, j)
			want = append(want, name)
			b.addEndpoint(5000, name, fmt.Sprintf("10.50.%d.%d", i, j+1))
			a.waitSees(5000, healed, want...)
			c.waitSees(5000, healed, want...)
			at := b.db.Self().Address
			there := func(p PeerStatus) bool { return p.Address == at && inSync(p) }
			a.waitPeer(b, healed, "there", there)
			c.waitPeer(b, healed, "there", there)
			b.waitPeer(a, healed, "in sync", inSync)
			b.waitPeer(c, healed, "in sync", inSync)
		}
		if err := b.c.Copied(); err != nil {
			t.Errorf("off by %s: the host takes its former self for another: %v", off, err)
		}
	}
}

// A host comes back with a clock that was set back while the others think it dead: then
// nobody shows it the newer record that it signed before, and it must still be above it.
func TestClockSetBackWhileDead(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start(wrongBy(year))
	a.waitPeer(b, soon, "in sync", inSync)
	b.halt()
	a.waitPeer(b, 2*soon, "dead", func(p PeerStatus) bool { return !p.Alive })
	b.start(wrongBy(-year))
	a.waitPeer(b, soon, "in sync", inSync)
}

// A certificate that has expired, or is not valid yet, is as good as any: its key
// alone counts.
func TestCertificatesHaveNoTimes(t *testing.T) {
	t.Parallel()
	s := newSegment()
	dated := func(h *host, from, to time.Time) *host {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: to}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, h.id.Key.Public(), h.id.Key)
		if err != nil {
			t.Fatal(err)
		}
		return h.start(func(c *Cluster) {
			c.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: h.id.Key}
		})
	}
	past := dated(newHost(t, s.addr(1)), time.Now().Add(-2*year), time.Now().Add(-year))
	future := dated(newHost(t, s.addr(2), s.addr(1)), time.Now().Add(year), time.Now().Add(2*year))
	for _, h := range []*host{past, future} {
		h.addNetwork(5000, "10.50.0.0/16")
	}
	past.addEndpoint(5000, "ep1", "10.50.0.1")
	future.addEndpoint(5000, "ep2", "10.50.0.2")
	future.waitSees(5000, soon, "ep1")
	past.waitSees(5000, soon, "ep2")
}

// Only time that passes hides a peer, not a clock that is set: what the database says
// of when it died is for people.
func TestDeadSinceInAnotherYear(t *testing.T) {
	now := time.Now()
	for _, off := range []time.Duration{-year, year} {
		p := store.Peer{DeadSince: now.Add(off)}
		next, drop := judge(now, sight{lost: now.Add(-time.Second), dead: true}, p, true, DefaultHideAfter, DefaultForgetAfter)
		if drop || next.Hidden {
			t.Errorf("dead since %s: %+v, dropped %t", p.DeadSince, next, drop)
		}
	}
}
