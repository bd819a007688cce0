package gossip

import (
	"context"
	"errors"
	"time"

	"github.com/weftnet/weft/store"
)

// takenTime is how long an owner that is asked whether it has acted on a record waits
// until it has, before it says no.
const takenTime = 5 * time.Second

// Taken reports whether a living peer has acted on what this host tells of its tunnel.
// One whose version does not say has.
func (c *Cluster) Taken(ctx context.Context, id store.HostID, t store.Tunnel) (bool, error) {
	see, ok := c.table.sight(id)
	if !ok || !see.alive {
		return false, errors.New("it is not heard of")
	}
	s, err := c.dial(ctx, see.rec, id)
	if err != nil {
		return false, err
	}
	defer s.close()
	a, err := s.ask(request{VNI: store.HostVNI, Taken: &t}, time.Now().Add(takenTime+ioTime))
	return err == nil && (a.Taken == nil || *a.Taken), err
}

// readTaken answers a host's question of that kind.
func (c *Cluster) readTaken(ctx context.Context, q request, id store.HostID) (answer, error) {
	taken, err := c.holdsTunnel(id, *q.Taken)
	if taken {
		ctx, cancel := context.WithTimeout(ctx, takenTime)
		defer cancel()
		taken = c.cfg.Settled(ctx) == nil
	}
	a := answer{Taken: &taken}
	a.VNI, a.Epoch = q.VNI, c.db.Self().Epoch
	return a, err
}

// holdsTunnel reports whether the database says of a peer's tunnel what the peer told.
// Nothing is encrypted to one that is revoked, nor to one that tells another's key.
func (c *Cluster) holdsTunnel(id store.HostID, t store.Tunnel) (holds bool, err error) {
	see, ok := c.table.sight(id)
	if !ok || !see.rec.Tunnel.Equal(t) {
		return false, nil // it has not come here yet
	}
	err = c.db.View(func(tx *store.Tx) error {
		out, err := tx.Revoked(id)
		if err != nil {
			return err
		}
		p, err := tx.Peer(id)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		holds = out || p.KeyOf != "" || p.Tunnel.Equal(t)
		return err
	})
	return holds, err
}
