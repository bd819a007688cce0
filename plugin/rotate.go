package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// rotator changes this host's WireGuard key without losing a packet (see wgKeyState).
type rotator struct {
	keys   *wgKeys
	db     *store.DB
	kernel *kernel.Kernel
	loop   *dataplane.Loop
	ask    chan struct{} // cap 1: change it now
	log    *slog.Logger
}

// Times of a change of keys.
const (
	// wayTime is how long hosts that answer nothing are waited for, on a new way.
	wayTime = 10 * time.Second
	// moveTime is how long all peers have to hear of a step and to act on it, and
	// movePerPeer how much longer for each of them.
	moveTime    = 3 * time.Second
	movePerPeer = 5 * time.Millisecond
	rotatePoll  = 200 * time.Millisecond
	// agePoll is how often the age of the key is looked at.
	agePoll = time.Minute
)

// run changes the key when it is as old as age (0: never), or when one is asked for,
// and finishes what a former process began.
func (r *rotator) run(ctx context.Context, age time.Duration) error {
	look := time.NewTicker(agePoll)
	defer look.Stop()
	for {
		if r.keys.state().rotates() {
			if err := r.finish(ctx); err != nil && ctx.Err() == nil {
				r.log.Error("the WireGuard key is not changed; trying on", "err", err)
			}
		}
		due := true
		select {
		case <-ctx.Done():
			return nil
		case <-r.ask:
		case <-look.C:
			due = age > 0 && time.Since(r.keys.state().Keys[0].Made) > age
		}
		if !due {
			continue
		}
		if err := r.begin(ctx); err != nil && ctx.Err() == nil {
			r.log.Error("cannot begin to change the WireGuard key", "err", err)
		}
	}
}

// begin makes the new key, once no peer changes its own: the two would share the
// second way.
func (r *rotator) begin(ctx context.Context) error {
	for r.peerRotates() {
		if err := sleep(ctx, rotatePoll); err != nil {
			return err
		}
	}
	k, err := newWGKey()
	if err != nil {
		return err
	}
	return r.keys.put(r.db, wgKeyState{Keys: []wgKey{r.keys.state().Keys[0], k}})
}

// finish goes on from the step that the file tells to the end.
func (r *rotator) finish(ctx context.Context) error {
	for ctx.Err() == nil {
		st := r.keys.state()
		switch {
		case len(st.Keys) == 1:
			r.log.Info("the WireGuard key was changed")
			return r.keys.put(r.db, wgKeyState{Keys: st.Keys})
		case st.Keys[0] != st.Keys[1] && !st.Last:
			// Two hosts may have begun before they heard of each other: the second way is
			// of both their new keys only then.
			begun := time.Now()
			r.awaitMove(ctx)
			r.awaitWay(ctx, 1, begun)
			st.Last = true
		case st.Keys[0] != st.Keys[1]:
			r.awaitMove(ctx)
			st.Keys = []wgKey{st.Keys[1], st.Keys[1]}
		case st.Last:
			// A peer that answers on a way takes packets from it a little later, when its
			// pass over the network is done.
			begun := time.Now()
			r.awaitMove(ctx)
			r.awaitWay(ctx, 0, begun)
			st.Last = false
		default:
			r.awaitMove(ctx)
			st.Keys = st.Keys[:1]
		}
		if ctx.Err() != nil {
			break
		}
		if err := r.keys.put(r.db, st); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// awaitWay waits until all living peers have answered on a way since begun, or wayTime.
func (r *rotator) awaitWay(ctx context.Context, way int, begun time.Time) {
	for time.Since(begun) < wayTime && !r.answered(ctx, way, begun) {
		if sleep(ctx, rotatePoll) != nil {
			return
		}
	}
}

// awaitMove gives all peers the time to hear of a step and to act on it.
func (r *rotator) awaitMove(ctx context.Context) {
	host, err := r.db.HostSnapshot()
	if peers := len(dataplane.TunnelPeers(host, r.loop.Underlay())); err == nil && peers > 0 {
		_ = sleep(ctx, moveTime+time.Duration(peers)*movePerPeer)
	}
}

// answered reports whether all living peers have.
func (r *rotator) answered(ctx context.Context, way int, since time.Time) bool {
	host, err := r.db.HostSnapshot()
	if err != nil {
		return false
	}
	devices, err := r.kernel.Tunnels(ctx)
	if err != nil {
		return false
	}
	heard := map[store.WGKey]time.Time{}
	for _, d := range devices {
		for _, p := range d.Peers {
			if d.Name == dataplane.TunnelNames[way] {
				heard[p.Public] = p.Handshake
			}
		}
	}
	for _, p := range dataplane.TunnelPeers(host, r.loop.Underlay()) {
		if !p.DeadSince.IsZero() || len(p.Tunnel.Keys) == 0 {
			continue
		}
		if heard[p.Tunnel.Key(way)].Before(since) {
			return false
		}
	}
	return true
}

// peerRotates reports whether a living peer changes its key.
func (r *rotator) peerRotates() bool {
	host, err := r.db.HostSnapshot()
	if err != nil {
		return false
	}
	for _, p := range dataplane.TunnelPeers(host, r.loop.Underlay()) {
		if p.DeadSince.IsZero() && p.Tunnel.Rotating() {
			return true
		}
	}
	return false
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
