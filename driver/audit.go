package driver

import (
	"cmp"
	"context"
	"time"

	"github.com/weftnet/weft/store"
)

// Times of the audit. Docker asks for clean-up once, and not at all if it or the
// plugin was down: such endpoints are ours to find.
const (
	auditEvery = 30 * time.Second
	// goneGrace: a joined endpoint whose link has been missing for so long, at
	// two sightings or more, is removed. Docker's own calls come within seconds.
	goneGrace = 2 * time.Minute
	// idleGrace: an endpoint that was made but never joined, or that has left, is
	// removed after so long. Docker joins within seconds of making it.
	idleGrace = 15 * time.Minute
)

// Audit finds endpoints that Docker has forgotten and deletes their records. It
// is owned by the goroutine that calls Run.
type Audit struct {
	d     *Driver
	now   func() time.Time
	every time.Duration
	since map[store.EndpointID]time.Time // first sighting without a live link
}

// NewAudit returns the audit of a driver's endpoints. It looks every so often, 0
// for half a minute, and reads the time from now, nil for time.Now.
func NewAudit(d *Driver, every time.Duration, now func() time.Time) *Audit {
	if now == nil {
		now = time.Now
	}
	return &Audit{d: d, now: now, every: cmp.Or(every, auditEvery), since: map[store.EndpointID]time.Time{}}
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
			if err := a.once(ctx); err != nil && ctx.Err() == nil {
				a.d.Log.Error("audit of endpoints", "err", err)
			}
		}
	}
}

func (a *Audit) once(ctx context.Context) error {
	var all []store.Endpoint
	if err := a.d.DB.View(func(tx *store.Tx) (err error) { all, err = tx.AllEndpoints(); return err }); err != nil {
		return err
	}
	missing := map[store.EndpointID]bool{}
	asked := map[store.VNI]bool{}
	seen := map[store.EndpointID]bool{}
	for _, e := range all {
		if !asked[e.VNI] {
			asked[e.VNI] = true
			for _, id := range a.d.Sync.Missing(e.VNI) {
				missing[id] = true
			}
		}
		idle := e.Sandbox == ""
		if !idle && !missing[e.ID] {
			continue
		}
		seen[e.ID] = true
		first, again := a.since[e.ID]
		if !again {
			a.since[e.ID] = a.now()
			continue
		}
		grace := goneGrace
		if idle {
			grace = idleGrace
		}
		if age := a.now().Sub(first); age >= grace {
			a.d.Log.Warn("endpoint removed: Docker has forgotten it", "endpoint", e.ID, "vni", e.VNI, "address", e.IPv4, "for", age)
			if err := a.d.DB.Update(ctx, func(tx *store.Tx) error { return tx.DeleteEndpoint(e.Network, e.ID) }); err != nil {
				return err
			}
		}
	}
	for id := range a.since {
		if !seen[id] {
			delete(a.since, id)
		}
	}
	return nil
}
