package dataplane_test

import (
	"testing"

	"github.com/weftnet/weft/store"
)

// Docker removes the network, then disables and removes the plugin: nobody comes
// after this process.
func TestRemovedNetworkIsGoneBeforeTheEnd(t *testing.T) {
	h := newHost(t)
	h.update(func(tx *store.Tx) error {
		for _, v := range []store.VNI{4096, 4097} {
			if err := tx.PutNetwork(network(v)); err != nil {
				return err
			}
		}
		return nil
	})
	h.settled()
	h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(network(4096).ID) })
	h.stop()
	if left, err := h.kernel.Networks(t.Context()); err != nil || len(left) != 1 || left[0] != 4097 {
		t.Errorf("the kernel holds networks %v, %v; want 4097", left, err)
	}
	if have, err := h.kernel.Read(t.Context(), store.HostVNI); err != nil || len(have) == 0 {
		t.Errorf("the host's rules went with the first network (%v)", err)
	}
	h.start()
	h.settled()
	h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(network(4097).ID) })
	h.stop()
	for _, v := range []store.VNI{4097, store.HostVNI} {
		if have, err := h.kernel.Read(t.Context(), v); err != nil || len(have) > 0 {
			t.Errorf("vni %d: %d objects are left, %v", v, len(have), err)
		}
	}
}
