package dataplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/weftnet/weft/store"
)

// pass makes the kernel match the records of one network. The host's rules come
// first, since they guard its links, but go last. It returns what failed in either; the
// error is for what kept a pass from running at all.
func (l *Loop) pass(ctx context.Context, v store.VNI) ([]*OpError, error) {
	host := l.network(store.HostVNI)
	if v != store.HostVNI && (!host.due.IsZero() || host.lookedAt.IsZero()) {
		if s, err := l.db.HostSnapshot(); err == nil && len(s.Networks) > 0 {
			if errs, err := l.passOne(ctx, store.HostVNI); err != nil || len(errs) > 0 {
				more, err2 := l.passOne(ctx, v)
				return append(errs, more...), cmp.Or(err, err2)
			}
		}
	}
	if v == store.HostVNI {
		if s, err := l.db.HostSnapshot(); err == nil && len(s.Networks) == 0 {
			for o, n := range l.networks {
				if o != store.HostVNI && !n.due.IsZero() {
					_, _ = l.passOne(ctx, o)
				}
			}
		}
	}
	return l.passOne(ctx, v)
}

func (l *Loop) passOne(ctx context.Context, v store.VNI) ([]*OpError, error) {
	ctx, cancel := context.WithTimeout(ctx, passLimit)
	defer cancel()
	l.takeRecords() // so that a change of records is not taken for drift
	n := l.network(v)
	changed, fresh := n.changed, n.have == nil
	n.due, n.changed = time.Time{}, false
	c, err := l.compare(ctx, v, fresh)
	if err != nil && errors.Is(ctx.Err(), context.Canceled) {
		n.have, n.changed = nil, true // for finish
		return nil, err               // the process ends: nothing is wrong with the kernel
	}
	if err != nil {
		l.done(v, comparison{}, nil, err)
		return nil, err
	}
	ops, waits := l.withhold(c.want, Diff(c.want, c.have))
	c.held = cmp.Or(waits, c.held)
	errs, full := splitFull(l.kernel.Apply(ctx, ops))
	if len(errs) > 0 && errors.Is(ctx.Err(), context.Canceled) {
		n.have, n.changed = nil, true
		return errs, ctx.Err()
	}
	if len(errs) > 0 && !fresh {
		n.have = nil // it was not as remembered: look, and try once more
		n.changed = changed
		return l.passOne(ctx, v)
	}
	n.have = c.have
	apply(n.have, ops)
	mended := slices.DeleteFunc(slices.Clone(ops), func(op Op) bool { return full[op.Object.Key()] })
	mended = n.possible(mended) // for which there is room now
	n.noteFull(fresh, ops, full)
	if fresh && !changed && n.failures == 0 && len(mended) > len(errs) {
		l.repaired(v, mended)
	}
	l.done(v, c, ops, joinErrors(errs))
	if !slices.ContainsFunc(errs, ofTunnel) {
		l.caughtUp(v, n)
	}
	if fresh {
		l.findMissing(v, c.want, c.have)
	}
	return errs, nil
}

// passEndpoint makes the objects of one endpoint, beside the network's own, when
// all else is as the last pass left it. A pass over the whole network follows soon
// after, since the record changed; Docker need not wait for it (measured: 15 ms
// with a thousand endpoints). False: it did not do, a full pass must.
func (l *Loop) passEndpoint(ctx context.Context, v store.VNI, e store.EndpointID) bool {
	host, n := l.network(store.HostVNI), l.network(v)
	l.takeRecords()
	if e == "" || n.have == nil || !host.due.IsZero() || host.lookedAt.IsZero() || n.failures > 0 {
		return false
	}
	s, err := l.db.EndpointSnapshot(v, e)
	if err != nil || len(s.Endpoints) == 0 || s.Endpoints[0].Left {
		return false
	}
	want, err := PlanNetwork(s, l.Underlay())
	if err != nil {
		return false
	}
	have := Plan{}
	for k := range want {
		if o, ok := n.have[k]; ok {
			have[k] = o
		}
	}
	ops, _ := l.withhold(want, Diff(want, have)) // the pass that follows says it
	ctx, cancel := context.WithTimeout(ctx, passLimit)
	defer cancel()
	errs, full := splitFull(l.kernel.Apply(ctx, ops))
	if len(errs) > 0 {
		n.have = nil
		return false
	}
	apply(n.have, ops)
	n.noteFull(false, ops, full)
	l.mu.Lock()
	l.stats.Passes++
	l.stats.Ops += uint64(len(ops))
	l.mu.Unlock()
	return !l.lost(v, e)
}

// comparison is what the kernel should hold and what it holds.
type comparison struct {
	want, have Plan
	held       string // why peers that say nothing still have their entries
	contests   []Contest
}

// compare returns what the kernel should hold and what it holds for a network.
func (l *Loop) compare(ctx context.Context, v store.VNI, fresh bool) (c comparison, err error) {
	n := l.network(v)
	if v == store.HostVNI && (fresh || l.address() != l.asked) || v != store.HostVNI && l.network(store.HostVNI).lookedAt.IsZero() {
		if err := l.findUnderlay(ctx); err != nil {
			return comparison{}, err
		}
	}
	c.have = n.have
	if fresh || c.have == nil {
		n.lookedAt = time.Now()
		if c.have, err = l.kernel.Read(ctx, v); err != nil {
			return comparison{}, fmt.Errorf("read the kernel: %w", err)
		}
	}
	if v == store.HostVNI {
		s, err := l.db.HostSnapshot()
		if err != nil {
			return comparison{}, err
		}
		// Those behind a NAT, for whom it is there, may be still to come.
		_, s.Tunnel = c.have[Key{Kind: KindWireGuard, Name: TunnelNames[0]}]
		s.Tunnel = s.Tunnel && !l.inSync()
		c.want, c.held = PlanHost(s, l.Underlay()), silence(s.Peers)
		return c, nil
	}
	s, err := l.db.Snapshot(v)
	if err != nil {
		return comparison{}, err
	}
	c.held = silence(s.Peers)
	c.want, c.contests, err = planNetwork(s, l.Underlay(), c.have, l.inSync())
	return c, err
}

// apply changes a plan as the kernel was changed.
func apply(have Plan, ops []Op) {
	for _, op := range ops {
		if op.Verb == Put {
			have.Add(op.Object)
		} else {
			delete(have, op.Object.Key())
		}
	}
}

// findUnderlay looks for the host's address and link. A change makes all networks
// due, for their links are bound to it.
func (l *Loop) findUnderlay(ctx context.Context) error {
	l.asked = l.address()
	u, err := l.kernel.Underlay(ctx, l.asked)
	if err != nil {
		return fmt.Errorf("look for the underlay: %w", err)
	}
	l.mu.Lock()
	old := l.underlay
	l.underlay = u
	l.mu.Unlock()
	if old == u {
		return nil
	}
	l.log.Info("underlay", "address", u.Address, "link", u.Link, "mtu", u.MTU)
	if u.NoChecksum {
		l.log.Info("checksum offload of VXLAN links is switched off", "reason", u.Reason)
	}
	l.db.SetAddress(u.Address, u.MTU)
	for v := range l.networks {
		if v != store.HostVNI {
			l.mark(v)
		}
	}
	return nil
}

// repaired says once that something else had changed the kernel.
func (l *Loop) repaired(v store.VNI, ops []Op) {
	kinds := map[string]int{}
	l.mu.Lock()
	for _, op := range ops {
		kinds[op.Object.Key().Kind.String()]++
		l.stats.Repaired[op.Object.Key().Kind.String()]++
	}
	l.mu.Unlock()
	// A few lines tell what happened; a whole lost network would be thousands.
	text := make([]string, 0, 3)
	for _, op := range ops[:min(len(ops), cap(text))] {
		text = append(text, op.String())
	}
	l.log.Warn("kernel repaired: it did not match the records", "vni", v, "objects", kinds, "first", text)
}

// findMissing notes the endpoints whose link has vanished after Docker took it, and
// those that Docker has not taken.
func (l *Loop) findMissing(v store.VNI, want, have Plan) {
	var missing, untaken []store.EndpointID
	for k, o := range want {
		veth, ok := o.(Veth)
		if !ok || !veth.Joined {
			continue
		}
		e, ok := ParseEndpointAlias(veth.Alias)
		if h, there := have[k].(Veth); ok && !there {
			missing = append(missing, e.ID)
		} else if ok && h.Waits {
			untaken = append(untaken, e.ID)
		}
	}
	l.mu.Lock()
	l.missing[v], l.untaken[v] = missing, untaken
	l.mu.Unlock()
}

// Untaken returns the endpoints of a network that were handed to Docker, and whose link
// it had not taken at the last reading. Docker does so within a second, unless it dies.
func (l *Loop) Untaken(v store.VNI) []store.EndpointID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.untaken[v])
}

// Missing returns the endpoints of a network that Docker had joined and whose link
// was not there at the last reading: the container is gone, or somebody deleted it.
func (l *Loop) Missing(v store.VNI) []store.EndpointID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.missing[v])
}

// done records how a pass went and plans the next try after a failure. Only a
// change of health is logged.
func (l *Loop) done(v store.VNI, c comparison, ops []Op, err error) {
	n, now, objects, held := l.network(v), time.Now(), len(c.want), c.held
	l.mu.Lock()
	old := l.status[v]
	s := NetworkStatus{VNI: v, LastPass: now, Objects: objects, Held: held, Contests: old.Contests, Contested: old.Contested, Full: n.countFull()}
	var tell []Contest
	later := false
	if c.want != nil {
		s.Contests, s.Contested = firstContests(c.contests, old.Contests, now), len(c.contests)
		tell, later = ripe(s.Contests, now)
	}
	l.stats.Passes++
	l.stats.Ops += uint64(len(ops))
	if err != nil {
		l.stats.Failures++
		s.Err, s.Since = err.Error(), now
		if !old.Since.IsZero() {
			s.Since = old.Since
		}
	}
	if objects == 0 && err == nil && v != store.HostVNI {
		delete(l.status, v)
		delete(l.missing, v)
		delete(l.untaken, v)
	} else {
		l.status[v] = s
	}
	l.mu.Unlock()
	switch {
	case err != nil && old.Err == "":
		l.log.Error("kernel does not match the records; trying on", "vni", v, "err", err)
	case err == nil && old.Err != "":
		l.log.Info("kernel matches the records again", "vni", v)
	}
	if held != "" && old.Held == "" {
		l.log.Warn("deletions held back", "vni", v, "reason", held)
	}
	if s.Full != nil && old.Full == nil {
		l.log.Warn("the port program's maps are full: destinations that it does not know are reached through the host's stack, services not at all", "vni", v, "unknown", s.Full)
	}
	for _, c := range tell {
		l.log.Warn("two hosts have one address", "vni", v, "address", c.What, "used", c.Used.Name, "host", c.Used.Host, "endpoint", c.Used.Endpoint,
			"other", c.Other.Name, "otherHost", c.Other.Host, "otherEndpoint", c.Other.Endpoint, "all", s.Contested)
	}
	switch {
	case err != nil:
		n.failures++
		n.have = nil
		n.dueAt(now.Add(min(retryFirst<<min(n.failures-1, 10), retryLast)))
	case held != "":
		n.failures = 0
		n.dueAt(now.Add(5 * time.Second))
	case objects == 0 && v != store.HostVNI && n.due.IsZero() && !n.changed:
		delete(l.networks, v)
	default:
		n.failures = 0
	}
	if later {
		n.dueAt(now.Add(tellAfter))
	}
}

func joinErrors(errs []*OpError) error {
	all := make([]error, 0, len(errs))
	for _, e := range errs {
		all = append(all, e)
	}
	return errors.Join(all...)
}

// Status returns the last pass of each network and of the host, sorted by VNI.
func (l *Loop) Status() []NetworkStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.SortedFunc(maps.Values(l.status), func(a, b NetworkStatus) int { return int(a.VNI) - int(b.VNI) })
}

// Stats returns the counters.
func (l *Loop) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Repaired = maps.Clone(s.Repaired)
	return s
}
