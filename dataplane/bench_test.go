package dataplane_test

import (
	"fmt"
	"testing"

	"github.com/weftnet/weft/store"
)

// BenchmarkAttach is the loop's and the database's part of attaching and
// detaching one endpoint (record, plan, difference; the kernel is in memory), with
// so many endpoints on this host and so many on peers.
func BenchmarkAttach(b *testing.B) {
	for _, c := range []struct{ local, remote int }{{10, 0}, {100, 0}, {1000, 0}, {10, 10000}} {
		b.Run(fmt.Sprintf("local%d/remote%d", c.local, c.remote), func(b *testing.B) {
			h := newHost(b)
			h.peers(1, 1)
			h.update(func(tx *store.Tx) error {
				if err := tx.PutNetwork(network(1)); err != nil {
					return err
				}
				for i := range c.local {
					if _, err := tx.PutEndpoint(endpoint(1, 1000+i)); err != nil {
						return err
					}
				}
				d := store.Delta{VNI: 1, Epoch: 1, Seq: 2, Full: true}
				for i := range c.remote {
					d.Endpoints = append(d.Endpoints, endpoint(1, 10000+i).Shared())
				}
				_, err := tx.MergeEndpoints("peer000", 1, d)
				return err
			})
			h.settled()
			b.ResetTimer()
			for i := range b.N {
				e := endpoint(1, 100+i%2)
				h.update(func(tx *store.Tx) error { _, err := tx.PutEndpoint(e); return err })
				if err := h.loop.Sync(b.Context(), 1, e.ID); err != nil {
					b.Fatal(err)
				}
				h.update(func(tx *store.Tx) error { return tx.DeleteEndpoint(e.Network, e.ID) })
			}
		})
	}
}
