package kerneltest

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
)

// Place is a network namespace with a goroutine of its own in it, for tests that
// need several hosts or containers at once.
type Place struct {
	work chan func()
	tid  int
}

// NewPlace makes a namespace that lives until the test ends.
func NewPlace(t testing.TB) *Place {
	t.Helper()
	p := &Place{work: make(chan func())}
	ready, stopped := make(chan bool), make(chan struct{})
	go func() {
		defer close(stopped)
		defer close(ready)
		Netns(t) // ends this goroutine if it fails
		p.tid = syscall.Gettid()
		ready <- true
		for f := range p.work {
			f()
		}
	}()
	if !<-ready {
		t.FailNow()
	}
	t.Cleanup(func() {
		close(p.work)
		<-stopped
	})
	return p
}

// Do runs f in the place and waits for it. Sockets that f opens stay there. f must
// not end the test; it may report with t.Error.
func (p *Place) Do(f func()) {
	done := make(chan struct{})
	p.work <- func() { defer close(done); f() }
	<-done
}

// Run runs lines of programs in the place, like Script.
func (p *Place) Run(t testing.TB, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var err error
		p.Do(func() { _, err = output(f) })
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Wire connects two places by a veth pair with the given names and addresses
// (prefixes; without duplicate address detection), both ends up.
func Wire(t testing.TB, a *Place, aName string, aAddrs []netip.Prefix, b *Place, bName string, bAddrs []netip.Prefix) {
	t.Helper()
	a.Run(t, fmt.Sprintf("ip link add %s type veth peer name %s netns %d", aName, bName, b.tid))
	a.Configure(t, aName, aAddrs...)
	b.Configure(t, bName, bAddrs...)
}

// Configure gives a link addresses and sets it up.
func (p *Place) Configure(t testing.TB, link string, addrs ...netip.Prefix) {
	t.Helper()
	for _, a := range addrs {
		line := fmt.Sprintf("ip addr add %s dev %s", a, link)
		if a.Addr().Is6() {
			line += " nodad"
		}
		p.Run(t, line)
	}
	p.Run(t, "ip link set "+link+" up")
}

// Take moves a link from one place to another under a new name, as Docker does
// with the container's side of an endpoint.
func (p *Place) Take(t testing.TB, from *Place, link, name string, addrs ...netip.Prefix) {
	t.Helper()
	from.Run(t, fmt.Sprintf("ip link set %s netns %d name %s", link, p.tid, name))
	p.Configure(t, name, addrs...)
}
