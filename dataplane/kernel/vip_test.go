package kernel_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestPublishedEndpointsReachServices: on a routed network what an endpoint with published
// ports sends goes through the host's stack, and virtual addresses are answered all the
// same, by a task here and by one of a peer.
func TestPublishedEndpointsReachServices(t *testing.T) {
	all := fastHosts(t, store.ModeRouted, [2]bool{true, true})
	a, b := all[0], all[1]
	a.endpoints[0].Ports = []store.Port{{Proto: "tcp", Port: 80, HostPort: 8080}}
	for i, task := range []struct {
		place *kerneltest.Place
		at    netip.Addr
	}{{a.containers[1], a.endpoints[1].IPv4.Addr()}, {b.containers[0], b.endpoints[0].IPv4.Addr()}} {
		vip := netip.AddrFrom4([4]byte{10, 9, 0, byte(100 + i)})
		a.services = append(a.services, store.Service{VIP: vip, Backends: []netip.Addr{task.at}})
		a.program(t, all...)
		asks(t, a.containers[0], vip, task.place, task.at)
		asks(t, a.containers[0], task.at, task.place, task.at)
	}
}

// asks connects to a virtual address, of which the task has another one, and reads what
// that says.
func asks(t *testing.T, client *kerneltest.Place, vip netip.Addr, task *kerneltest.Place, at netip.Addr) {
	t.Helper()
	const port = 7004
	var server net.Listener
	var c net.Conn
	var err, err2 error
	task.Do(func() { server, err = net.Listen("tcp", netip.AddrPortFrom(at, port).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	go func() {
		if c, err := server.Accept(); err == nil {
			_, err = c.Write([]byte("hello"))
			_ = errors.Join(err, c.Close())
		}
	}()
	client.Do(func() {
		c, err2 = (&net.Dialer{Timeout: 3 * time.Second}).Dial("tcp", netip.AddrPortFrom(vip, port).String())
	})
	if err2 != nil {
		t.Errorf("connect to %s: %v", vip, err2)
		return
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	if got, err := io.ReadAll(c); string(got) != "hello" {
		t.Errorf("%s says %q, %v", vip, got, err)
	}
}
