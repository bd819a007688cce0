package main

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"
)

// udpEcho answers what comes with the same, and returns its address.
func udpEcho(t *testing.T) netip.AddrPort {
	t.Helper()
	c := udpAt(t)
	go func() {
		packet := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(packet)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(packet[:n], from)
		}
	}()
	return local(c)
}

func udpAt(t *testing.T) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6loopback})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func local(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// answers reports whether a word comes back from an address within the wait.
func answers(t *testing.T, client *net.UDPConn, at netip.AddrPort, word string, wait time.Duration) bool {
	t.Helper()
	if _, err := client.WriteToUDPAddrPort([]byte(word), at); err != nil {
		t.Fatal(err)
	}
	_ = client.SetReadDeadline(time.Now().Add(wait))
	got := make([]byte, 1<<16)
	n, from, err := client.ReadFromUDPAddrPort(got)
	if err == nil && (from != at || string(got[:n]) != word) {
		t.Errorf("%q comes from %s, want %q from %s", got[:n], from, word, at)
	}
	return err == nil
}

// What the host sends to a UDP port at ::1 goes to the container, and the answers to
// whom they are for, until the port is given back.
func TestUDPOfLoopbackIsRelayed(t *testing.T) {
	for _, at := range []string{"[::1]:0", "[::]:0"} {
		held, err := holdPort("udp", netip.MustParseAddrPort(at), udpEcho(t))
		if err != nil {
			t.Fatal(err)
		}
		target := netip.AddrPortFrom(netip.IPv6Loopback(), local(held.(*net.UDPConn)).Port())
		clients := []*net.UDPConn{udpAt(t), udpAt(t)}
		for i := range 6 {
			if word := fmt.Sprint("word ", i); !answers(t, clients[i%2], target, word, 5*time.Second) {
				t.Errorf("%s: client %d is not answered", at, i%2)
			}
		}
		_ = held.Close()
		if answers(t, clients[0], target, "late", 100*time.Millisecond) {
			t.Errorf("%s: a port that was given back answers", at)
		}
	}
}

// Only so many clients have room, and silent ones make it again.
func TestUDPRelayIsBounded(t *testing.T) {
	in := udpAt(t)
	r := udpRelay{in: in, to: udpEcho(t), idle: time.Hour}
	go r.serve()
	clients := make([]*net.UDPConn, mostRelay+1)
	for i := range clients {
		clients[i] = udpAt(t)
		wait := 5 * time.Second
		if i == mostRelay {
			wait = 100 * time.Millisecond
		}
		if got := answers(t, clients[i], local(in), "word", wait); got != (i < mostRelay) {
			t.Fatalf("client %d is answered: %t", i, got)
		}
	}
	short := udpRelay{in: udpAt(t), to: udpEcho(t), idle: 10 * time.Millisecond}
	go short.serve()
	answers(t, clients[0], local(short.in), "word", 5*time.Second)
	for tries := 0; ; tries++ {
		short.mu.Lock()
		n := len(short.clients)
		short.mu.Unlock()
		if n == 0 {
			break
		}
		if tries == 1000 {
			t.Fatal("a silent client keeps its room")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !answers(t, clients[0], local(short.in), "again", 5*time.Second) {
		t.Error("a client that was silent is not answered again")
	}
}
