package kerneltest

import (
	"context"
	"sync"

	"github.com/weftnet/weft/store"
)

// watcher collects the networks that one Watch has still to send.
type watcher struct {
	wake chan struct{}

	mu      sync.Mutex // guards pending
	pending []store.VNI
}

// Watch implements dataplane.Kernel. It tells what Break, SetUnderlay and Lost do,
// at once.
func (m *Memory) Watch(ctx context.Context) <-chan store.VNI {
	w := &watcher{wake: make(chan struct{}, 1)}
	m.mu.Lock()
	m.watchers = append(m.watchers, w)
	m.mu.Unlock()
	out := make(chan store.VNI)
	go w.run(ctx, out)
	return out
}

func (w *watcher) run(ctx context.Context, out chan<- store.VNI) {
	defer close(out)
	for {
		w.mu.Lock()
		batch := w.pending
		w.pending = nil
		w.mu.Unlock()
		for _, v := range batch {
			select {
			case <-ctx.Done():
				return
			case out <- v:
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
	}
}

// tell sends a network to all watchers.
func (m *Memory) tell(v store.VNI) {
	for _, w := range m.watchers {
		w.mu.Lock()
		w.pending = append(w.pending, v)
		w.mu.Unlock()
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}
