package kernel_test

import (
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestCountersOfAnEndpoint: what the guard drops is counted with the endpoint that sent it,
// by reason, and with no other.
func TestCountersOfAnEndpoint(t *testing.T) {
	a := fastHosts(t, store.ModeVXLAN, [2]bool{true, false})[0]
	socket := packetSocket(t, a.containers[0])
	defer func() { _ = unix.Close(socket) }()
	want := map[string]uint64{}
	for _, f := range kerneltest.Frames(rand.New(rand.NewPCG(1, 2)), stationOf(a.endpoints[0]), stationOf(a.endpoints[1])) {
		if _, err := unix.Write(socket, f.Data); err != nil {
			t.Fatalf("%s: %v", f.Kind, err)
		}
		if f.Reason != "" {
			want[f.Reason]++
		}
	}
	var sum uint64
	for i, e := range a.endpoints {
		c, err := a.k.CountersOf(dataplane.VethName(e.ID))
		if err != nil {
			t.Fatal(err)
		}
		expected := []map[string]uint64{want, {}}[i]
		if diff := cmp.Diff(expected, c.Dropped); diff != "" {
			t.Errorf("endpoint %d, -want +got\n%s", i, diff)
		}
		for _, n := range c.Dropped {
			sum += n
		}
	}
	var total uint64
	for _, n := range counted(t, a.k).Dropped {
		total += n
	}
	if total != sum {
		t.Errorf("%d frames are dropped on the host, and %d of its endpoints", total, sum)
	}
	if _, err := a.k.CountersOf("weftv000000000"); err == nil {
		t.Error("a link that is not there has counts")
	}
}

func stationOf(e store.Endpoint) kerneltest.Station {
	return kerneltest.Station{MAC: e.MAC, IPv4: e.IPv4.Addr(), IPv6: e.IPv6.Addr()}
}
