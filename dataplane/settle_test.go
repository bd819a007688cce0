package dataplane_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// TestSettledWaitsForTunnels: who asks is answered once the kernel has done what the
// records say of the ways to peers, in all networks and on the host, and not while it
// fails to; other failures, and who does not wait any more, do not count.
func TestSettledWaitsForTunnels(t *testing.T) {
	h := newHost(t)
	var broken atomic.Value // of an object's kind
	broken.Store(dataplane.KindPeer)
	h.kernel.Before = func(_ int, op dataplane.Op) error {
		if op.Object.Key().Kind == broken.Load() {
			return errors.New("planted failure")
		}
		return nil
	}
	settled := func(d time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		return h.loop.Settled(ctx)
	}
	n := network(1)
	n.Encrypted = true
	h.update(func(tx *store.Tx) error { return tx.PutNetwork(n) })
	if err := h.db.SetTunnel(store.Tunnel{Port: 4798, Keys: []store.WGKey{{1}}}); err != nil {
		t.Fatal(err)
	}
	peer := store.Peer{Host: store.Host{ID: "peer", Epoch: 1, Address: underlay.Address.Next(), Tunnel: store.Tunnel{Port: 4798, Keys: []store.WGKey{{2}}}}}
	h.update(func(tx *store.Tx) error {
		if err := tx.PutPeer(peer); err != nil {
			return err
		}
		return tx.MergeNetworks(peer.ID, 1, 1, []store.SharedNetwork{n.Shared()})
	})
	for range 2 { // the second time nothing is new, and all is as wrong as before
		if err := settled(time.Second); err == nil {
			t.Fatal("settled, and the peer cannot be made")
		}
	}
	broken.Store(dataplane.KindNeigh)
	if err := settled(time.Minute); err != nil {
		t.Fatal(err)
	}
	have, err := h.kernel.Read(t.Context(), store.HostVNI)
	if _, there := have[dataplane.TunnelPeer{Device: dataplane.TunnelNames[0], Public: peer.Tunnel.Keys[0]}.Key()]; !there || err != nil {
		t.Errorf("settled, and the peer is not there (%v)", err)
	}
	e := endpoint(1, 100).Shared()
	h.update(func(tx *store.Tx) error {
		_, err := tx.MergeEndpoints(peer.ID, 0, store.Delta{VNI: 1, Epoch: 1, Seq: 1, Full: true, Endpoints: []store.SharedEndpoint{e}})
		return err
	})
	broken.Store(dataplane.KindRoute)
	if err := settled(time.Second); err == nil {
		t.Fatal("settled, and the way to the endpoint cannot be made")
	}
	broken.Store(dataplane.KindNeigh)
	if err := settled(time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := settled(time.Minute); err != nil {
		t.Fatalf("with nothing to do: %v", err)
	}
	// Another process has to look first.
	h.stop()
	if err := h.kernel.Break(dataplane.Op{Verb: dataplane.Delete, Object: dataplane.TunnelPeer{Device: dataplane.TunnelNames[0], Public: peer.Tunnel.Keys[0]}}); err != nil {
		t.Fatal(err)
	}
	broken.Store(dataplane.KindPeer)
	h.start()
	if err := settled(time.Second); err == nil {
		t.Fatal("settled after a restart, and the peer is gone")
	}
	broken.Store(dataplane.KindNeigh)
	if err := settled(time.Minute); err != nil {
		t.Fatal(err)
	}
}
