package gossip

import (
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/weftnet/weft/store"
)

// judge decides what the database should say of a peer, given what it says now
// (known is false for nothing) and what membership says. A peer that is lost keeps
// its records; they are hidden after hide and dropped after forget. Only elapsed
// time counts, not the clock of the day.
func judge(now time.Time, s sight, p store.Peer, known bool, hide, forget time.Duration) (next store.Peer, drop bool) {
	next = p
	if s.alive {
		next.DeadSince, next.Hidden = time.Time{}, false
		if !known || s.stored != s.rec.Counter {
			if p.Epoch != s.rec.Epoch {
				next.Networks = 0 // a version of another database
			}
			next.Away = p.Away && p.Address == s.rec.Address // the new address was not tried
			next.Host = s.rec.Host
		}
		return next, false
	}
	gone := now.Sub(s.lost)
	if (s.dead || gone >= hide) && p.DeadSince.IsZero() {
		next.DeadSince = now.UTC().Round(0)
	}
	next.Hidden = p.Hidden || gone >= hide
	return next, gone >= forget
}

// life keeps the database's peers in step with membership, and one follower per
// living peer.
func (c *Cluster) life(ctx context.Context) error {
	var following sync.WaitGroup
	followers := map[store.HostID]context.CancelFunc{}
	defer func() {
		for _, stop := range followers {
			stop()
		}
		following.Wait()
	}()
	// Changes of membership come by themselves; what time alone brings is in no hurry.
	tick := time.NewTicker(min(5*time.Second, max(c.cfg.HideAfter/4, time.Millisecond)))
	defer tick.Stop()
	failing, all := false, true
	for {
		alive, err := c.savePeers(ctx, all)
		switch {
		case err != nil && ctx.Err() == nil && !failing:
			failing = true
			c.log.Error("cannot save what is known of peers", "err", err)
		case err == nil && failing:
			failing = false
			c.log.Info("peers are saved again")
		}
		for id, lives := range alive {
			switch stop := followers[id]; {
			case lives && stop == nil:
				fctx, stop := context.WithCancel(ctx)
				followers[id] = stop
				following.Go(func() { c.follow(fctx, id) })
			case !lives && stop != nil:
				stop()
				delete(followers, id)
			}
		}
		all = err != nil // what changed is in none of the next news
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			all = true
		case <-c.table.changed:
		}
	}
}

// savePeers writes what changed, of all peers or of those alone of which there is news,
// and returns which of those are alive and saved. While a cluster starts there is news of
// each host, and a look at all of them each time would be their number squared.
func (c *Cluster) savePeers(ctx context.Context, all bool) (map[store.HostID]bool, error) {
	now := c.table.now()
	alive := map[store.HostID]bool{}
	var write []store.Peer
	var drop []store.Peer
	sights := c.table.news()
	if all {
		sights = c.table.sights()
	}
	was, held, err := c.savedPeers(sights, all)
	if err != nil {
		return nil, err
	}
	// In order of their ids: of two hosts that tell one key at once the lower has it.
	for _, id := range slices.Sorted(maps.Keys(sights)) {
		s := sights[id]
		p, known := was[id]
		alive[id] = s.alive
		if !known && !s.alive {
			c.table.forgetAfter(id, c.cfg.ForgetAfter)
			continue
		}
		next, gone := judge(now, s, p, known, c.cfg.HideAfter, c.cfg.ForgetAfter)
		if next, _ = held.judge(p, s.told(next)); gone {
			drop = append(drop, p)
		} else if !reflect.DeepEqual(next, p) {
			write = append(write, next)
		}
	}
	if len(write)+len(drop) == 0 {
		return alive, nil
	}
	claimed := map[store.HostID]store.WGKey{}
	err = c.db.Update(ctx, func(tx *store.Tx) error {
		held, err := c.holdersFor(tx, write, was)
		if err != nil {
			return err
		}
		for i := range write {
			// A follower may have written meanwhile: decide on what is there now.
			id := write[i].ID
			p, err := tx.Peer(id)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
			next, _ := judge(now, sights[id], p, err == nil, c.cfg.HideAfter, c.cfg.ForgetAfter)
			next, claimed[id] = held.judge(p, sights[id].told(next))
			if write[i] = next; reflect.DeepEqual(next, p) {
				continue // it tells another's key, as before
			}
			if err := tx.PutPeer(next); err != nil {
				return err
			}
		}
		for _, p := range drop {
			if err := tx.ForgetPeer(p.ID); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, p := range drop {
		c.table.forget(p.ID)
		c.log.Info("peer forgotten", "peer", p.Name, "host", p.ID)
	}
	for _, p := range write {
		if s := sights[p.ID]; s.alive {
			c.table.saved(p.ID, s.rec.Counter)
		}
		c.logChange(was[p.ID], p)
		c.logKey(was[p.ID], p, claimed[p.ID])
	}
	return alive, nil
}

// savedPeers returns what the database says of the hosts; or of all, and then whose each
// WireGuard key is.
func (c *Cluster) savedPeers(hosts map[store.HostID]sight, all bool) (map[store.HostID]store.Peer, holders, error) {
	out, held := map[store.HostID]store.Peer{}, holders{}
	err := c.db.View(func(tx *store.Tx) error {
		if all {
			peers, err := tx.Peers()
			if err != nil {
				return err
			}
			for _, p := range peers {
				out[p.ID] = p
				if _, ok := hosts[p.ID]; !ok { // written by somebody else than us
					c.table.remember(p.ID)
				}
			}
			held, err = c.holders(tx)
			return err
		}
		for id := range hosts {
			switch p, err := tx.Peer(id); {
			case err == nil:
				out[id] = p
			case !errors.Is(err, store.ErrNotFound):
				return err
			}
		}
		return nil
	})
	return out, held, err
}

func (c *Cluster) logChange(was, is store.Peer) {
	who := []any{"peer", is.Name, "host", is.ID, "address", is.Address}
	switch {
	case was.ID == "":
		c.log.Info("peer joined", who...)
	case was.Address != is.Address:
		c.log.Info("peer has a new address", append(who, "old", was.Address)...)
	case !was.DeadSince.IsZero() && is.DeadSince.IsZero():
		c.log.Info("peer is back", who...)
	case was.DeadSince.IsZero() && !is.DeadSince.IsZero():
		c.log.Warn("peer is not reachable; its records stay for now", who...)
	}
	if is.Hidden && !was.Hidden {
		c.log.Warn("peer is gone for long; its endpoints are hidden", who...)
	}
}
