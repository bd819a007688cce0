package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel/bpf"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestAllTasksAreChosen: of a service with very many tasks each gets some of the
// connections.
func TestAllTasksAreChosen(t *testing.T) {
	kerneltest.Netns(t)
	for _, tasks := range []int{1, 500, dataplane.MaxBackends} {
		p, _ := guarded(t, dataplane.Port{Guard: true, Services: true})
		vip := netip.MustParseAddr("10.1.255.1")
		left := map[netip.Addr]bool{}
		var all []string
		for i := range tasks {
			a := netip.AddrFrom4([4]byte{10, 1, byte(1 + i>>8), byte(i)})
			left[a] = true
			all = append(all, fmt.Sprintf("%s %s", a, store.MAC{2, 0, 0, 1, byte(i >> 8), byte(i)}))
		}
		key := bpf.ProgramDestKey{Vni: 1, At: fromAddr(vip)}
		must(t, p.objects.WeftServices.Put(key, serviceValue(dataplane.Service{VNI: 1, VIP: vip, Backends: strings.Join(all, ",")})))
		// With 40 tries for each, one without any has a chance of 512 · e^-40.
		for i := range 40 * tasks {
			const syn = 2
			frame := ipv4(own.MAC, dataplane.RouterMAC, own.IPv4, vip, 6, segment(uint16(1024+i), 80, syn))
			r := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
			_, err := p.objects.WeftFromContainer.Run(&r)
			must(t, err)
			to, _ := netip.AddrFromSlice(r.DataOut[30:34])
			mac := binary.BigEndian.Uint16(r.DataOut[4:])
			if b := to.As4(); to == vip || mac != uint16(b[2]-1)<<8|uint16(b[3]) {
				t.Fatalf("a connection goes to %s at %x", to, r.DataOut[:6])
			}
			delete(left, to)
		}
		if len(left) > 0 {
			t.Errorf("of %d tasks %d got no connection", tasks, len(left))
		}
	}
}
