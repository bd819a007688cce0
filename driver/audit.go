package driver

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/weftnet/weft/store"
)

// Times of the audit. Docker asks for clean-up once, and not at all if it or the
// plugin was down: such endpoints are ours to find.
const (
	auditEvery = 5 * time.Second
	// lostGrace: a joined endpoint whose link has been missing for so long, at two
	// sightings or more, has left: peers no longer count on it, and its address may
	// live elsewhere. The link goes when its container ends.
	lostGrace = 5 * time.Second
	// goneGrace: after so long it is removed. Docker's own calls come within seconds.
	goneGrace = 2 * time.Minute
	// emptyGrace: a network of Swarm without endpoints, that Docker has not created
	// in this term (Config.Term), is removed after so long. Docker does not
	// remember such networks when it starts, and creates them when it needs them.
	emptyGrace = 15 * time.Minute
	// idleGrace: an endpoint that was made but never joined, whose link Docker never
	// took, or that has left, is removed after so long. Docker joins within seconds of
	// making it, and takes the link at once.
	idleGrace = 15 * time.Minute
)

// Audit finds endpoints that Docker has forgotten and deletes their records. It
// is owned by the goroutine that calls Run.
type Audit struct {
	d     *Driver
	now   func() time.Time
	every time.Duration
	since map[store.EndpointID]time.Time // first sighting without a live link
	lost  map[store.EndpointID]bool      // of those, that were joined and lost it
	empty map[store.NetworkID]time.Time  // first sighting of a network that may be forgotten
	term  uint64                         // in which Docker repeats what it has,
	begun time.Time                      // since when
}

// NewAudit returns the audit of a driver's endpoints. It looks every so often, 0
// for five seconds, and reads the time from now, nil for time.Now.
func NewAudit(d *Driver, every time.Duration, now func() time.Time) *Audit {
	if now == nil {
		now = time.Now
	}
	return &Audit{d: d, now: now, every: cmp.Or(every, auditEvery), since: map[store.EndpointID]time.Time{}, lost: map[store.EndpointID]bool{}, empty: map[store.NetworkID]time.Time{}}
}

// Run audits until ctx ends and returns nil.
func (a *Audit) Run(ctx context.Context) error {
	tick := time.NewTicker(a.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := errors.Join(a.once(ctx), a.networks(ctx), a.allocations(ctx)); err != nil && ctx.Err() == nil {
				a.d.Log.Error("audit of endpoints and networks", "err", err)
			}
		}
	}
}

func (a *Audit) once(ctx context.Context) error {
	var all []store.Endpoint
	if err := a.d.DB.View(func(tx *store.Tx) (err error) { all, err = tx.AllEndpoints(); return err }); err != nil {
		return err
	}
	missing, untaken := map[store.EndpointID]bool{}, map[store.EndpointID]bool{}
	asked := map[store.VNI]bool{}
	seen := map[store.EndpointID]bool{}
	for _, e := range all {
		if !asked[e.VNI] {
			asked[e.VNI] = true
			for _, id := range a.d.Sync.Missing(e.VNI) {
				missing[id] = true
			}
			for _, id := range a.d.Sync.Untaken(e.VNI) {
				untaken[id] = true
			}
		}
		idle := e.Sandbox == "" || untaken[e.ID]
		if !idle && !missing[e.ID] {
			continue
		}
		seen[e.ID] = true
		first, again := a.since[e.ID]
		if !again {
			a.since[e.ID] = a.now()
			continue
		}
		age, grace := a.now().Sub(first), idleGrace
		if a.lost[e.ID] {
			grace = goneGrace
		}
		var err error
		switch {
		case !idle && age >= lostGrace:
			a.lost[e.ID] = true
			a.d.Log.Warn("endpoint has lost its link: its container is gone", "endpoint", e.ID, "vni", e.VNI, "address", e.IPv4, "for", age)
			err = a.change(ctx, e, func(tx *store.Tx) error {
				e.Sandbox, e.Left, e.Ports = "", true, nil
				_, err := tx.PutEndpoint(e)
				return err
			})
		case idle && age >= grace:
			a.d.Log.Warn("endpoint removed: Docker has forgotten it", "endpoint", e.ID, "vni", e.VNI, "address", e.IPv4, "for", age)
			err = a.change(ctx, e, func(tx *store.Tx) error { return tx.DeleteEndpoint(e.Network, e.ID) })
		}
		if err != nil {
			return err
		}
	}
	for id := range a.since {
		if !seen[id] {
			delete(a.since, id)
			delete(a.lost, id)
		}
	}
	return nil
}

// networks finds networks of Swarm that Docker has forgotten: after a kill of dockerd
// it never deletes those that no task needs any more.
func (a *Audit) networks(ctx context.Context) error {
	var idle []store.Network
	err := a.d.DB.View(func(tx *store.Tx) error {
		all, err := tx.Networks()
		if err != nil {
			return err
		}
		for _, n := range all {
			forgotten, err := a.forgotten(tx, n.ID)
			if err != nil {
				return err
			}
			if forgotten {
				idle = append(idle, n)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	was := a.empty
	a.empty = map[store.NetworkID]time.Time{}
	for _, n := range idle {
		first, again := was[n.ID]
		if !again {
			first = a.now()
		}
		a.empty[n.ID] = first
		age := a.now().Sub(first)
		if !again || age < emptyGrace {
			continue
		}
		a.d.Log.Warn("network of Swarm removed: Docker has forgotten it", "network", n.ID, "vni", n.VNI, "for", age)
		err := a.d.DB.Update(ctx, func(tx *store.Tx) error {
			if forgotten, err := a.forgotten(tx, n.ID); err != nil || !forgotten {
				return err
			}
			return tx.DeleteNetwork(n.ID)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *Audit) forgotten(tx *store.Tx, id store.NetworkID) (bool, error) {
	n, err := tx.Network(id)
	if errors.Is(err, store.ErrNotFound) || err == nil && (n.Term == a.d.term() || !id.OfSwarm()) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	eps, err := tx.Endpoints(id)
	return len(eps) == 0, err
}

// change writes and gives the endpoint's ports back to the host, unless a call of Docker
// has changed the endpoint meanwhile.
func (a *Audit) change(ctx context.Context, e store.Endpoint, fn func(*store.Tx) error) error {
	written := false
	err := a.d.DB.Update(ctx, func(tx *store.Tx) error {
		now, err := tx.Endpoint(e.Network, e.ID)
		if written = err == nil && now.Seq == e.Seq; written {
			return fn(tx)
		}
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		return err
	})
	if err == nil && written {
		a.d.release(e.ID)
	}
	return err
}

// allocations forgets, as the Swarm's leader, the networks that Docker has not repeated
// in this term: they were removed while another manager led.
func (a *Audit) allocations(ctx context.Context) error {
	term := a.d.term()
	if term == 0 || a.d.repeated.Load() != term {
		return nil
	}
	if a.term != term {
		a.term, a.begun = term, a.now()
	}
	if a.now().Sub(a.begun) < emptyGrace {
		return nil
	}
	var former []store.Allocation
	err := a.d.DB.View(func(tx *store.Tx) error {
		all, err := tx.Allocations()
		for _, o := range all {
			if a.d.former(o) {
				former = append(former, o)
			}
		}
		return err
	})
	if err != nil || len(former) == 0 {
		return err
	}
	return a.d.DB.Update(ctx, func(tx *store.Tx) error {
		for _, o := range former {
			now, err := tx.Allocation(o.ID)
			if errors.Is(err, store.ErrNotFound) || err == nil && now.Term != o.Term {
				continue
			}
			if err := errors.Join(err, tx.DeleteAllocation(o.ID)); err != nil {
				return err
			}
			a.d.Log.Info("allocation forgotten: its network was removed while another manager led", "network", o.ID, "vni", o.VNI)
		}
		return nil
	})
}
