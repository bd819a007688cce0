package gossip

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

// Services of a host that runs none of the networks reach those that do, however many.
func TestServicesAreTold(t *testing.T) {
	t.Parallel()
	s := newSegment()
	manager := newHost(t, s.addr(1)).start()
	worker := newHost(t, s.addr(2), s.addr(1)).start()
	worker.addNetwork(5000, "10.50.0.0/16")
	tell := func(n int) {
		var all []store.Service
		for i := range n {
			service := store.Service{VNI: 5000, VIP: netip.AddrFrom4([4]byte{10, 50, 1 + byte(i>>8), byte(i)}), Name: fmt.Sprintf("service%d", i)}
			for j := range 300 {
				service.Backends = append(service.Backends, netip.AddrFrom4([4]byte{10, 50, 100 + byte(j>>8), byte(j)}))
			}
			all = append(all, service)
		}
		manager.update(func(tx *store.Tx) error { return tx.PutServices(manager.id.ID, true, all) })
		took := waitFor(t, soon, func() error {
			snap, err := worker.db.Snapshot(5000)
			if err == nil && len(snap.Services) != n {
				err = fmt.Errorf("%d services, want %d", len(snap.Services), n)
			}
			return err
		})
		t.Logf("figure: %d services known after %v", n, took)
	}
	tell(1)
	tell(3 * serviceChunk)
	tell(0)
}
