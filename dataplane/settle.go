package dataplane

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// waiter waits for a pass over networks that were behind their records when it came.
type waiter struct {
	behind map[store.VNI]bool
	reply  chan<- reply
	over   <-chan struct{} // closed when nobody waits any more
}

// Settled waits until the kernel holds what the records say now of the ways to peers. A
// failure of something else does not count, one of a tunnel is tried again until ctx ends.
func (l *Loop) Settled(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, err := l.ask(ctx, request{settle: ctx.Done()}); err != nil {
		return fmt.Errorf("the kernel does not hold the records yet: %w", err)
	}
	return nil
}

// await answers the request once no network that is behind now is so any more. It does
// not hasten passes: a call of Docker can come between two of them.
func (l *Loop) await(r request) {
	l.takeRecords()
	w := waiter{behind: map[store.VNI]bool{}, reply: r.reply, over: r.settle}
	for v, n := range l.networks {
		if n.behind {
			w.behind[v] = true
		}
	}
	l.waiters = append(l.waiters, w)
	l.answerWaiters()
}

// caughtUp notes that a pass over a network did all that leads to peers.
func (l *Loop) caughtUp(v store.VNI, n *network) {
	n.behind = false
	for _, w := range l.waiters {
		delete(w.behind, v)
	}
	l.answerWaiters()
}

func (l *Loop) answerWaiters() {
	l.waiters = slices.DeleteFunc(l.waiters, func(w waiter) bool {
		select {
		case <-w.over:
			return true
		default:
		}
		if len(w.behind) > 0 {
			return false
		}
		w.reply <- reply{}
		return true
	})
}

// ofTunnel reports whether what failed leads to a peer through a tunnel.
func ofTunnel(err *OpError) bool {
	switch o := err.Op.Object.(type) {
	case WireGuard, TunnelPeer:
		return true
	case Route:
		return strings.HasPrefix(o.Link, tunnelPrefix)
	}
	return false
}
