package gossip

import (
	"testing"
	"time"

	"github.com/weftnet/weft/store"
)

// TestPublishLooksAgain: peers are looked at again when a network was made anew under its
// VNI, which no set of VNIs shows, and not for each endpoint.
func TestPublishLooksAgain(t *testing.T) {
	id := testIdentity(t)
	tab := newTable(time.Now, 1)
	tab.joined(testRecord(id))
	see, _ := tab.sight(id.ID)
	for _, c := range []struct {
		name string
		seq  map[store.VNI]uint64
		want bool
	}{
		{"a network", map[store.VNI]uint64{store.HostVNI: 1, 5000: 1}, true},
		{"an endpoint", map[store.VNI]uint64{store.HostVNI: 1, 5000: 2}, false},
		{"the network removed and made again", map[store.VNI]uint64{store.HostVNI: 3, 5000: 2}, true},
		{"nothing", map[store.VNI]uint64{store.HostVNI: 3, 5000: 2}, false},
	} {
		select {
		case <-see.wake:
		default:
		}
		tab.publish("self", c.seq)
		select {
		case <-see.wake:
			if !c.want {
				t.Errorf("%s: peers are looked at", c.name)
			}
		default:
			if c.want {
				t.Errorf("%s: peers are not looked at", c.name)
			}
		}
	}
}
