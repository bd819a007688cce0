package gossip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// asStranger makes a cluster that is not run, with h's key or another, to speak to
// hosts by hand.
func asStranger(t *testing.T, key []byte) *Cluster {
	t.Helper()
	c := unrunCluster(t)
	var err error
	if c.keys, err = deriveKeys(key); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStreamRefuses(t *testing.T) {
	t.Parallel()
	s := newSegment()
	key := []byte(strings.Repeat("k", KeyBytes))
	a := newHost(t, s.addr(1))
	a.cfg.Key = key
	a.start().addNetwork(5000, "10.50.0.0/16")
	listening := func() error {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(a.addr, testDataPort).String())
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	waitFor(t, soon, listening)
	to := testRecord(a.id)
	to.Address, to.DataPort = a.addr, testDataPort

	known := func(c *Cluster) {
		r := testRecord(c.cfg.Identity)
		a.c.table.joined(r)
	}
	dial := func(c *Cluster, id store.HostID) error {
		st, err := c.dial(context.Background(), to, id)
		if err != nil {
			return err
		}
		defer st.close()
		_, err = st.ask(request{VNI: 5000}, time.Now().Add(soon))
		return err
	}
	stranger := asStranger(t, key)
	if err := dial(stranger, a.id.ID); err == nil || !strings.Contains(err.Error(), "not a member") {
		t.Errorf("host that is no member: %v", err)
	}
	time.AfterFunc(2*newsEvery, func() { known(stranger) })
	if err := dial(stranger, a.id.ID); err != nil {
		t.Errorf("host of which the owner hears only now: %v", err)
	}
	if err := dial(stranger, a.id.ID); err != nil {
		t.Errorf("member: %v", err)
	}
	if err := dial(stranger, stranger.id); err == nil || !strings.Contains(err.Error(), "not "+string(stranger.id)) {
		t.Errorf("owner with another identity: %v", err)
	}
	for _, k := range [][]byte{nil, []byte(strings.Repeat("x", KeyBytes))} {
		c := asStranger(t, k)
		known(c)
		if err := dial(c, a.id.ID); err == nil || !strings.Contains(err.Error(), "cluster keys") {
			t.Errorf("member with another cluster key: %v", err)
		}
	}
	// An owner that lacks the key is refused by the client too.
	a2 := newHost(t, s.addr(2)).start()
	waitFor(t, soon, func() error {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(a2.addr, testDataPort).String())
		if err == nil {
			_ = conn.Close()
		}
		return err
	})
	to = testRecord(a2.id)
	to.Address, to.DataPort = a2.addr, testDataPort
	a2.c.table.joined(testRecord(stranger.cfg.Identity))
	if err := dial(stranger, a2.id.ID); err == nil {
		t.Error("owner without the cluster key was accepted")
	}
}

func TestStreamSurvivesRubbish(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2), s.addr(1)).start()
	a.addNetwork(5000, "10.50.0.0/16")
	b.addNetwork(5000, "10.50.0.0/16")
	b.waitPeer(a, soon, "in sync", inSync)
	for _, port := range []uint16{testPort, testDataPort} {
		for _, text := range []string{"", "GET / HTTP/1.1\r\n\r\n", strings.Repeat("\x00", 5000), strings.Repeat("\xff", 5000), "\x16\x03\x01\x02\x00"} {
			conn, err := net.Dial("tcp", netip.AddrPortFrom(a.addr, port).String())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(conn, text)
			_ = conn.Close()
			if port == testPort && text != "" {
				u, err := net.Dial("udp", netip.AddrPortFrom(a.addr, port).String())
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.WriteString(u, text[:min(len(text), 1400)])
				_ = u.Close()
			}
		}
	}
	// Connections that say nothing: only so many are held, and members get through.
	var idle []net.Conn
	for range maxHandshakes * 2 {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(a.addr, testDataPort).String())
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	a.addEndpoint(5000, "ep1", "10.50.0.1")
	b.waitSees(5000, soon, "ep1")
	// Frames of a member that are too large or no request.
	for _, frame := range []string{"\xff\xff\xff\xff", "\x00\x00\x00\x02[]", "\x00\x00\x00\x01{"} {
		st, err := b.c.dial(context.Background(), hostRecord(a), a.id.ID)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(st.conn, frame)
		_ = st.conn.SetReadDeadline(time.Now().Add(soon))
		if _, err := st.conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("frame %q: %v", frame, err)
		}
		st.close()
	}
	for _, c := range idle {
		_ = c.Close()
	}
	a.addEndpoint(5000, "ep2", "10.50.0.2")
	b.waitSees(5000, soon, "ep1", "ep2")
	if a.c.Stats().Dropped["stream-too-many"] == 0 {
		t.Errorf("no connection was refused: %v", a.c.Stats().Dropped)
	}
}

func hostRecord(h *host) record {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	return h.c.self
}

func TestLargeAnswersComeInParts(t *testing.T) {
	t.Parallel()
	s := newSegment()
	a := newHost(t, s.addr(1)).start()
	b := newHost(t, s.addr(2)).start()
	const count = 2*chunk + 7
	a.addNetwork(5000, "10.50.0.0/16")
	b.addNetwork(5000, "10.50.0.0/16")
	a.update(func(tx *store.Tx) error {
		for i := range count {
			if _, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(fmt.Sprint("ep", i)), Network: networkID(5000), VNI: 5000,
				MAC: store.DeriveMAC(fmt.Sprint(i))}); err != nil {
				return err
			}
		}
		return nil
	})
	b.halt()
	b.cfg.Join = []string{a.addr.String()}
	b.start()
	took := waitFor(t, 4*soon, func() error {
		if n := len(b.sees(5000)); n != count {
			return fmt.Errorf("%d of %d endpoints", n, count)
		}
		return nil
	})
	t.Logf("figure: %d endpoints fetched by a joining host after %v", count, took)
}

func TestCertificateProvesIdentity(t *testing.T) {
	c, o := unrunCluster(t), unrunCluster(t)
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	got := make(chan error, 1)
	go func() {
		srv := tls.Server(server, tlsConfig(o.cert, func(id store.HostID) error {
			if id != c.id {
				return fmt.Errorf("client is %s", id)
			}
			return nil
		}))
		got <- srv.Handshake()
	}()
	conn := tls.Client(client, tlsConfig(c.cert, func(id store.HostID) error {
		if id != o.id {
			return fmt.Errorf("server is %s", id)
		}
		return nil
	}))
	_ = conn.SetDeadline(time.Now().Add(soon))
	if err := errors.Join(conn.Handshake(), <-got); err != nil {
		t.Error(err)
	}
}

func TestRunLeavesNothingBehind(t *testing.T) {
	s := newSegment()
	before := runtime.NumGoroutine()
	for range 3 {
		a := newHost(t, s.addr(1)).start()
		b := newHost(t, s.addr(2), s.addr(1)).start()
		a.addNetwork(5000, "10.50.0.0/16")
		b.addNetwork(5000, "10.50.0.0/16")
		b.waitPeer(a, soon, "in sync", inSync)
		a.waitPeer(b, soon, "in sync", inSync)
		b.db.SetAddress(s.addr(3), 1500)
		a.waitPeer(b, soon, "in sync", func(p PeerStatus) bool { return inSync(p) && p.Address == s.addr(3) })
		b.halt()
		a.halt()
	}
	waitFor(t, 2*soon, func() error {
		if n := runtime.NumGoroutine(); n > before {
			buf := make([]byte, 1<<16)
			return fmt.Errorf("%d goroutines, %d before:\n%s", n, before, buf[:runtime.Stack(buf, true)])
		}
		return nil
	})
}
