package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// rotator changes this host's WireGuard key without losing a packet (see wgKeyState).
type rotator struct {
	keys    *wgKeys
	db      *store.DB
	tunnels func(context.Context) ([]kernel.Tunnel, error)
	loop    *dataplane.Loop
	// settled waits until this host's kernel does what the records say; taken reports
	// whether a peer has acted on this host's (see gossip.Cluster.Taken).
	settled func(context.Context) error
	taken   func(context.Context, store.HostID, store.Tunnel) (bool, error)
	ask     chan struct{} // cap 1: change it now
	log     *slog.Logger
}

// Times of a change of keys.
const (
	// wayTime is how long hosts that answer nothing are waited for, on a new way, and
	// how long one has that was silent and is back.
	wayTime = 10 * time.Second
	// moveTime is how long all peers have at least to hear of a step and to act on it, and
	// movePerPeer how much longer for each of them: what is on its way arrives, and peers
	// of a version that does not tell when it is done are.
	moveTime    = 3 * time.Second
	movePerPeer = 5 * time.Millisecond
	// deafTime is how long a peer is asked whether it is done that gives no answer, though
	// it lives: nothing need come from it to here.
	deafTime   = time.Minute
	lookTime   = 5 * time.Second // for one look at the own kernel
	asksAtOnce = 16
	rotatePoll = 200 * time.Millisecond
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

// begin makes the new key, once nobody is in the way.
func (r *rotator) begin(ctx context.Context) error {
	r.awaitPeers(ctx, true)
	if err := ctx.Err(); err != nil {
		return err
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
		if len(st.Keys) > 1 && r.awaitPeers(ctx, false) {
			_ = sleep(ctx, wayTime) // who is back hears of a step later than the others
		}
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
		if len(r.inTheWay(false)) > 0 {
			continue // fell silent meanwhile, perhaps before it took the step
		}
		if err := r.keys.put(r.db, st); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// awaitWay waits until all living peers have answered on a way since then, or wayTime.
func (r *rotator) awaitWay(ctx context.Context, way int, since time.Time) {
	for begun := time.Now(); time.Since(begun) < wayTime && !r.answered(ctx, way, since); {
		if sleep(ctx, rotatePoll) != nil {
			return
		}
	}
}

// awaitMove waits until this host and all peers have acted on the last step. It returns
// before if one of them falls silent.
func (r *rotator) awaitMove(ctx context.Context) {
	peers := r.peers()
	if len(peers) == 0 || sleep(ctx, moveTime+time.Duration(len(peers))*movePerPeer) != nil {
		return
	}
	done, said := map[store.HostID]bool{}, false
	for begun := time.Now(); len(r.inTheWay(false)) == 0; {
		behind := r.behind(ctx, done, time.Since(begun) > deafTime)
		if len(behind) == 0 {
			return
		}
		if !said && time.Since(begun) > wayTime {
			r.tellWait(behind)
			said = true
		}
		if sleep(ctx, rotatePoll) != nil {
			return
		}
	}
}

// behind returns who has not acted on the last step, and why it is thought so. It adds to
// done who has. One that cannot be asked counts unless it is for too long.
func (r *rotator) behind(ctx context.Context, done map[store.HostID]bool, long bool) (out []string) {
	tell, err := r.keys.tunnel()
	if err != nil {
		return []string{err.Error()}
	}
	self := r.db.Self()
	self.Name = "this host"
	var asked []store.Host
	for _, h := range append([]store.Peer{{Host: self}}, r.peers()...) {
		if !done[h.ID] && len(h.Tunnel.Keys) > 0 {
			asked = append(asked, h.Host)
		}
	}
	var mu sync.Mutex // guards out and done
	var asks errgroup.Group
	asks.SetLimit(asksAtOnce)
	for _, h := range asked {
		asks.Go(func() error {
			taken, err := r.follows(ctx, h.ID, tell)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case taken || err != nil && long:
				done[h.ID] = true
			case err != nil:
				out = append(out, fmt.Sprintf("%s: whether it has taken the last step cannot be asked: %v", h.Name, err))
			default:
				out = append(out, h.Name+": it has not taken the last step yet")
			}
			return nil
		})
	}
	_ = asks.Wait()
	return out
}

// follows reports whether a host, which may be this one, has acted on what this one tells.
func (r *rotator) follows(ctx context.Context, id store.HostID, tell store.Tunnel) (bool, error) {
	if id != r.db.Self().ID {
		return r.taken(ctx, id, tell)
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	return r.settled(ctx) == nil, nil
}

func (r *rotator) peers() []store.Peer {
	host, err := r.db.HostSnapshot()
	if err != nil {
		return nil // what follows fails
	}
	return dataplane.TunnelPeers(host, r.loop.Underlay())
}

// answered reports whether all living peers have.
func (r *rotator) answered(ctx context.Context, way int, since time.Time) bool {
	devices, err := r.tunnels(ctx)
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
	for _, p := range r.peers() {
		if !p.DeadSince.IsZero() || len(p.Tunnel.Keys) == 0 {
			continue
		}
		if heard[p.Tunnel.Key(way)].Before(since) {
			return false
		}
	}
	return true
}

// awaitPeers waits while peers are in the way, and reports whether any were.
func (r *rotator) awaitPeers(ctx context.Context, begins bool) (waited bool) {
	for {
		peers := r.inTheWay(begins)
		if len(peers) == 0 {
			return waited
		}
		if !waited {
			r.tellWait(peers)
		}
		waited = true
		if sleep(ctx, rotatePoll) != nil {
			return waited
		}
	}
}

func (r *rotator) tellWait(who []string) {
	r.log.Info("the change of the WireGuard key waits", "peers", len(who), "first", who[0])
}

func (r *rotator) inTheWay(begins bool) []string { return inTheWay(r.peers(), begins) }

// inTheWay returns the peers for which a change of keys waits, and why. One whose plugin
// is silent takes no step, while its kernel goes on with the keys that it has: it would
// be cut off. After some minutes it is hidden, and not among the peers any more. A
// change that begins waits for those of others, too: the two would share the second way.
func inTheWay(peers []store.Peer, begins bool) (out []string) {
	for _, p := range peers {
		switch {
		case len(p.Tunnel.Keys) == 0:
		case !p.DeadSince.IsZero():
			out = append(out, p.Name+": its plugin is silent")
		case begins && p.Tunnel.Rotating():
			out = append(out, p.Name+": it changes its own key")
		}
	}
	return out
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
