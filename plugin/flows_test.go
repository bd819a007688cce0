package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/dataplane/kernel"
)

// TestFlowsAreNamed puts what the records know beside what the kernel counted.
func TestFlowsAreNamed(t *testing.T) {
	ip := netip.MustParseAddr
	eps := []endpointReply{
		{ID: "a", VNI: 1, Network: "n", Host: "alpha", Local: true, State: "joined", IPv4: ip("10.0.0.2"), IPv6: ip("fd00::2"), Link: "weftva"},
		{ID: "old", VNI: 1, Network: "n", Host: "alpha", Local: true, State: "left", IPv4: ip("10.0.0.3"), Link: "weftvold"},
		{ID: "b", VNI: 1, Network: "n", Host: "beta", State: "remote", IPv4: ip("10.0.0.3")},
		{ID: "c", VNI: 2, Network: "m", Host: "beta", State: "remote", IPv4: ip("10.0.0.2")},
	}
	a := flowEnd{Address: ip("10.0.0.2"), Endpoint: "a", Host: "alpha", Local: true}
	with := func(e flowEnd, address string, pretends bool) flowEnd {
		e.Address, e.Pretends = ip(address), pretends
		return e
	}
	b := flowEnd{Address: ip("10.0.0.3"), Endpoint: "b", Host: "beta"}
	for _, c := range []struct {
		flow     kernel.Flow
		from, to flowEnd
	}{
		{kernel.Flow{VNI: 1, Link: "weftva", Source: ip("10.0.0.2"), Destination: ip("10.0.0.3")}, a, b},
		{kernel.Flow{VNI: 1, Link: "weftva", Source: ip("fd00::2"), Destination: ip("192.0.2.1")}, with(a, "fd00::2", false), flowEnd{Address: ip("192.0.2.1")}},
		{kernel.Flow{VNI: 1, Link: "weftva", Source: ip("fe80::2"), Destination: ip("ff02::1")}, with(a, "fe80::2", false), flowEnd{Address: ip("ff02::1")}},
		{kernel.Flow{VNI: 1, Link: "weftva", Source: ip("10.0.0.3"), Destination: ip("10.0.0.3")}, with(a, "10.0.0.3", true), b},
		{kernel.Flow{VNI: 1, Link: "", Source: ip("10.0.0.2"), Destination: ip("10.0.0.3")}, flowEnd{Address: ip("10.0.0.2")}, b},
	} {
		got := nameFlows([]kernel.Flow{c.flow}, eps)
		want := []flowReply{{VNI: 1, Network: "n", Source: c.from, Destination: c.to, Protocol: "0"}}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%+v: -want +got\n%s", c.flow, diff)
		}
	}
}

// TestFollowedFlows: a line tells what was sent since the last look.
func TestFollowedFlows(t *testing.T) {
	flow := func(port uint16, packets, bytes uint64) flowReply {
		return flowReply{Source: flowEnd{Address: netip.MustParseAddr("10.0.0.2"), Container: "web"}, Destination: flowEnd{Address: netip.MustParseAddr("10.0.0.3")},
			Protocol: "udp", Port: port, Verdict: "fast", Packets: packets, Bytes: bytes, Last: time.Date(2026, 11, 24, 12, 0, 1, 0, time.UTC)}
	}
	_, before := moved(nil, []flowReply{flow(1, 5, 50), flow(2, 6, 60), flow(3, 7, 70)})
	now, _ := moved(before, []flowReply{flow(1, 5, 50), flow(2, 8, 90), flow(3, 2, 20), flow(4, 1, 10)})
	var out bytes.Buffer
	c := &cli{out: &out}
	c.printAllMoved(now, before)
	want := `12:00:01  web -> 10.0.0.3  udp/2  fast  2 packets, 30 bytes
12:00:01  web -> 10.0.0.3  udp/3  fast  2 packets, 20 bytes
12:00:01  web -> 10.0.0.3  udp/4  fast  1 packets, 10 bytes
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	out.Reset()
	c.json = true
	c.printAllMoved(now, before)
	if n := strings.Count(out.String(), "\n"); n != 3 || !strings.Contains(out.String(), `"packets":8,"bytes":90`) {
		t.Errorf("as JSON, one to a line:\n%s", &out)
	}
}
