package dataplane_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestEndFinishesACutPass tells the loop to end at each operation of a removal: what
// was cut off is done before it ends, for nobody may come after it.
func TestEndFinishesACutPass(t *testing.T) {
	for k := 0; ; k++ {
		h := newHost(t)
		h.peers(1, 2)
		h.update(func(tx *store.Tx) error { return tx.PutNetwork(network(1)) })
		h.settled()
		first, removed, reached, ended := -1, make(chan struct{}), make(chan struct{}), make(chan struct{})
		h.kernel.Before = func(n int, _ dataplane.Op) error {
			<-removed // what a pass of before still has to do is cut no earlier
			if first < 0 {
				first = n
			}
			if n-first == k {
				close(reached)
				go func() { h.stop(); close(ended) }()
				return context.Canceled // as a program that was killed
			}
			return nil
		}
		h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(network(1).ID) })
		close(removed)
		select {
		case <-reached:
			<-ended
		case <-time.After(time.Second): // it has fewer operations
			h.stop()
		}
		for _, v := range []store.VNI{1, store.HostVNI} {
			have, err := h.kernel.Read(context.Background(), v)
			if err != nil || len(have) > 0 {
				t.Fatalf("cut at operation %d: left\n%v%v", k, have, err)
			}
		}
		select {
		case <-reached:
		default:
			t.Logf("%d operations cut", k)
			return
		}
		h.stop = func() {} // it has ended
	}
}

// TestCutAnywhere stops the loop after every single operation of building and of
// removing networks, as a crash would; the next process finishes the work.
func TestCutAnywhere(t *testing.T) {
	build := func(h *host) {
		h.peers(1, 2)
		h.update(func(tx *store.Tx) error {
			if err := tx.PutNetwork(network(1)); err != nil {
				return err
			}
			for i := range 3 {
				if _, err := tx.PutEndpoint(endpoint(1, 2+i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	remove := func(h *host) {
		h.update(func(tx *store.Tx) error { return tx.DeleteNetwork(network(1).ID) })
	}
	cuts := 0
	for _, c := range []struct {
		name          string
		before, after func(*host)
	}{{"build", func(*host) {}, build}, {"remove", build, remove}} {
		for k := 0; ; k++ {
			h := newHost(t)
			c.before(h)
			h.settled()
			h.stop()
			var reached atomic.Bool
			first := -1
			h.kernel.Before = func(n int, _ dataplane.Op) error {
				if first < 0 {
					first = n
				}
				if n-first < k {
					return nil
				}
				reached.Store(true)
				return kerneltest.ErrStopped
			}
			c.after(h)
			h.start()
			<-h.loop.Ready()
			h.stop()
			h.kernel.Before = nil
			h.start()
			h.settled()
			h.stop()
			h.start() // for the clean-up
			if !reached.Load() {
				break
			}
			cuts++
			if k > 200 {
				t.Fatal("no end of operations")
			}
		}
	}
	t.Logf("cut anywhere: %d operations cut, 0 differences after the next start", cuts)
	if cuts < 30 {
		t.Errorf("only %d cuts", cuts)
	}
}
