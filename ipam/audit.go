package ipam

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/store"
)

const (
	auditEvery = time.Minute
	// auditBatch bounds one audit's transaction; the rest waits for the next.
	auditBatch = 1000
)

// sighting is one lease that looks leaked.
type sighting struct {
	pool  string
	addr  netip.Addr
	taken int64 // Unix nanoseconds: another lease of the address is another sighting
}

func sightingOf(l store.Lease) sighting { return sighting{l.Pool, l.Address, l.Taken.UnixNano()} }

// Run audits every Config.AuditEvery until ctx ends.
func (i *IPAM) Run(ctx context.Context) error {
	tick := time.NewTicker(cmp.Or(i.cfg.AuditEvery, auditEvery))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		freed, err := i.Audit(ctx)
		if ctx.Err() == nil {
			i.report(freed, err)
		}
	}
}

// report logs what an audit has freed, and failure and recovery once each.
func (i *IPAM) report(freed []store.Lease, err error) {
	for _, l := range freed {
		i.cfg.Log.Info("leaked lease freed", "pool", l.Pool, "address", l.Address, "kind", l.Kind, "taken", l.Taken, "container", l.Tag)
	}
	i.auditMu.Lock()
	was := i.auditErr
	i.auditErr = err != nil
	i.auditMu.Unlock()
	switch {
	case err != nil && !was:
		i.cfg.Log.Warn("audit of leases fails", "err", err)
	case err == nil && was:
		i.cfg.Log.Info("audit of leases works again")
	}
}

// Audit frees leases that no endpoint has any more, because Docker's release was
// lost or never sent, and returns them. A lease is leaked only where this host
// can know it: in the local space, in a pool with one reference that is a subnet
// of a Weft network of this host; in the global space, when Docker did not confirm
// it to this host as the new leader. It is freed when a second audit, Config.Grace
// after the first, still finds it so. Pools are not removed, since what Docker or
// another driver does with them cannot be seen from here, but for those of Swarm's
// networks: they go with their network, and those of the global space once the leader
// has forgotten it.
//
// It also removes the records of addresses that have cooled.
func (i *IPAM) Audit(ctx context.Context) ([]store.Lease, error) {
	i.auditMu.Lock()
	defer i.auditMu.Unlock()
	now := i.cfg.Now()
	var f findings
	if err := i.db.View(func(tx *store.Tx) (err error) {
		f, err = i.find(tx, now)
		return err
	}); err != nil {
		return nil, err
	}
	sighted := map[sighting]time.Time{}
	var ripe []store.Lease
	for _, l := range f.leaked {
		s := sightingOf(l)
		since, again := i.sighted[s]
		if !again {
			since = now
		}
		sighted[s] = since
		if again && now.Sub(since) >= i.cfg.Grace && len(ripe) < auditBatch {
			ripe = append(ripe, l)
		}
	}
	var gone []store.Pool
	for _, p := range f.idle {
		s := sighting{pool: p.ID, taken: p.Asked.UnixNano()}
		since, again := i.sighted[s]
		if !again {
			since = now
		}
		sighted[s] = since
		if again && now.Sub(since) >= i.cfg.Grace {
			gone = append(gone, p)
		}
	}
	i.sighted = sighted
	f.past, f.future = f.past[:min(len(f.past), auditBatch)], f.future[:min(len(f.future), auditBatch)]
	if len(ripe)+len(f.past)+len(f.future)+len(f.swarm)+len(gone) == 0 {
		return nil, nil
	}
	var freed []store.Lease
	err := i.update(ctx, "Audit", func(tx *store.Tx) (done func(), err error) {
		// Calls may have come since: look again before anything is taken away.
		if freed, err = free(tx, ripe, now); err != nil {
			return nil, err
		}
		if err := errors.Join(clean(tx, f, now), markSwarm(tx, f.swarm), dropIdle(tx, gone)); err != nil {
			return nil, err
		}
		return func() {
			for _, p := range gone {
				delete(i.books, p.ID)
			}
			for _, l := range slices.Concat(freed, f.future) {
				delete(i.books, l.Pool)
			}
		}, nil
	})
	if err != nil {
		return nil, err
	}
	return freed, nil
}

// findings is what an audit sees.
type findings struct {
	swarm  []store.Pool  // of a network of Swarm on this host, and not marked so
	idle   []store.Pool  // marked, or of an earlier term, and no network has them
	leaked []store.Lease // held by nobody
	past   []store.Lease // freed, have cooled
	future []store.Lease // freed in the future: the clock went back
}

func (i *IPAM) find(tx *store.Tx, now time.Time) (f findings, err error) {
	pools, err := tx.Pools()
	if err != nil {
		return f, err
	}
	networks, err := tx.Networks()
	if err != nil {
		return f, err
	}
	for _, p := range pools {
		has, _, err := ofSwarm(tx, p)
		if err != nil {
			return f, err
		}
		kept, err := allocated(tx, p)
		if err != nil {
			return f, err
		}
		switch {
		case has && !p.Swarm:
			f.swarm = append(f.swarm, p)
		case (p.Swarm || i.former(p) && !kept) && !inNetwork(networks, p):
			f.idle = append(f.idle, p)
		}
		leases, err := tx.Leases(p.ID)
		if err != nil {
			return f, err
		}
		h, ours, err := audited(tx, p, networks)
		if err != nil {
			return f, err
		}
		for _, l := range leases {
			switch {
			case l.Freed.After(now):
				f.future = append(f.future, l)
			case !l.Freed.IsZero() && !cools(l, now):
				f.past = append(f.past, l)
			case ours && looksLeaked(p, l, h):
				f.leaked = append(f.leaked, l)
			}
		}
	}
	return f, nil
}

// audited reports whether a leak in the pool can be known here, and who holds
// its addresses.
func audited(tx *store.Tx, p store.Pool, networks []store.Network) (h holders, ours bool, err error) {
	h = newHolders()
	if p.Space == GlobalSpace {
		return h, true, nil // Docker alone knows who has its addresses: see looksLeaked
	}
	if p.Refs != 1 {
		return h, false, nil
	}
	for _, n := range networks {
		if slices.Contains(n.Prefixes(), p.Prefix) {
			ours = true
			if err := h.addNetwork(tx, n); err != nil {
				return h, false, err
			}
		}
	}
	return h, ours, nil
}

// looksLeaked reports whether nobody has the address of a lease: no endpoint, or in
// the global space Docker itself, which did not confirm it when this host became the
// leader.
func looksLeaked(p store.Pool, l store.Lease, h holders) bool {
	if !l.Freed.IsZero() || l.Kind == kindGateway {
		return false
	}
	if p.Space == GlobalSpace {
		return !l.Doubt.IsZero()
	}
	return !h.has(l.Address)
}

// free frees those of the leases that are still held by nobody.
func free(tx *store.Tx, ripe []store.Lease, now time.Time) (freed []store.Lease, err error) {
	networks, err := tx.Networks()
	if err != nil {
		return nil, err
	}
	type view struct {
		holders
		pool store.Pool
		ours bool
	}
	views := map[string]view{}
	for _, l := range ripe {
		v, ok := views[l.Pool]
		if !ok {
			v.pool, err = tx.Pool(l.Pool)
			if errors.Is(err, store.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if v.holders, v.ours, err = audited(tx, v.pool, networks); err != nil {
				return nil, err
			}
			views[l.Pool] = v
		}
		if !v.ours || !unchanged(tx, l) || !looksLeaked(v.pool, l, v.holders) {
			continue
		}
		l.Freed = now.UTC()
		if err := tx.PutLease(l); err != nil {
			return nil, err
		}
		freed = append(freed, l)
	}
	return freed, nil
}

// markSwarm notes pools of networks of Swarm, so that they are known when the network
// is gone.
func markSwarm(tx *store.Tx, pools []store.Pool) error {
	for _, p := range pools {
		now, err := tx.Pool(p.ID)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		now.Swarm = true
		if err := tx.PutPool(now); err != nil {
			return err
		}
	}
	return nil
}

// dropIdle removes pools of networks of Swarm that left this host without a word:
// after a kill Docker does not release what no task needs any more.
func dropIdle(tx *store.Tx, pools []store.Pool) error {
	networks, err := tx.Networks()
	if err != nil {
		return err
	}
	for _, p := range pools {
		now, err := tx.Pool(p.ID)
		if errors.Is(err, store.ErrNotFound) || err == nil && (!now.Asked.Equal(p.Asked) || inNetwork(networks, now)) {
			continue
		}
		if err != nil {
			return err
		}
		if err := tx.DeletePool(p.ID); err != nil {
			return err
		}
	}
	return nil
}

func inNetwork(networks []store.Network, p store.Pool) bool {
	return slices.ContainsFunc(networks, func(n store.Network) bool { return slices.Contains(n.Prefixes(), p.Prefix) })
}

// unchanged reports whether the lease is as it was seen.
func unchanged(tx *store.Tx, l store.Lease) bool {
	c, err := tx.Lease(l.Pool, l.Address)
	return err == nil && c.Freed.Equal(l.Freed) && c.Taken.Equal(l.Taken) && c.Doubt.Equal(l.Doubt)
}

// clean removes what has cooled and corrects what was freed in the future.
func clean(tx *store.Tx, f findings, now time.Time) error {
	for _, l := range f.past {
		if !unchanged(tx, l) {
			continue
		}
		if err := tx.DeleteLease(l.Pool, l.Address); err != nil {
			return err
		}
	}
	for _, l := range f.future {
		if !unchanged(tx, l) {
			continue
		}
		l.Freed = now.UTC()
		if err := tx.PutLease(l); err != nil {
			return err
		}
	}
	return nil
}
