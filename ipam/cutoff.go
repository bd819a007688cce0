package ipam

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// DropUnused removes the pools of the local space that hold no address and belong
// to no Weft network: what a RequestPool leaves that a crash cut off. Docker takes
// it for failed and never releases it. Should a network have such a pool after
// all, its first address makes it again.
func (i *IPAM) DropUnused(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var dropped []string
	err := i.db.Update(ctx, func(tx *store.Tx) error {
		dropped = nil
		pools, err := tx.Pools()
		if err != nil {
			return err
		}
		networks, err := tx.Networks()
		if err != nil {
			return err
		}
		for _, p := range pools {
			leases, err := tx.Leases(p.ID)
			if err != nil {
				return err
			}
			held := slices.ContainsFunc(leases, func(l store.Lease) bool { return l.Freed.IsZero() })
			named := slices.ContainsFunc(networks, func(n store.Network) bool { return slices.Contains(n.Prefixes(), p.Prefix) })
			if p.Space != LocalSpace || held || named {
				continue
			}
			if err := tx.DeletePool(p.ID); err != nil {
				return err
			}
			dropped = append(dropped, p.ID)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range dropped {
		delete(i.books, id)
	}
	return nil
}

// Forget removes the pools with these prefixes, and returns them: Docker gave them to a
// network that it no longer has, and its ReleasePool did not come. Those that another
// network of this host or of the Swarm has stay.
func (i *IPAM) Forget(ctx context.Context, prefixes []netip.Prefix) (gone []store.Pool, err error) {
	err = i.update(ctx, "ReleasePool", func(tx *store.Tx) (func(), error) {
		gone = nil
		pools, err := tx.Pools()
		if err != nil {
			return nil, err
		}
		networks, err := tx.Networks()
		if err != nil {
			return nil, err
		}
		for _, p := range pools {
			kept, err := allocated(tx, p)
			if err != nil {
				return nil, err
			}
			if kept || inNetwork(networks, p) || !slices.Contains(prefixes, p.Prefix) {
				continue
			}
			if err := tx.DeletePool(p.ID); err != nil {
				return nil, err
			}
			gone = append(gone, p)
		}
		return func() {
			for _, p := range gone {
				delete(i.books, p.ID)
			}
		}, nil
	})
	return gone, err
}

// ReleaseCutOff ends a ReleasePool that a crash cut off. Whether the call had
// counted is not known then, so of a pool with several references none is taken.
func (i *IPAM) ReleaseCutOff(ctx context.Context, r api.ReleasePoolRequest) error {
	shared := false
	err := i.db.View(func(tx *store.Tx) error {
		p, err := tx.Pool(r.PoolID)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		shared = p.Refs > 1
		return err
	})
	if err != nil || shared {
		return err
	}
	_, err = i.ReleasePool(ctx, r)
	return err
}

// leaseAgain gives a pool that was made again the leases of the endpoints that
// live in it: they were lost with it.
func (i *IPAM) leaseAgain(tx *store.Tx, p store.Pool) error {
	networks, err := tx.Networks()
	if err != nil {
		return err
	}
	for _, n := range networks {
		if !slices.Contains(n.Prefixes(), p.Prefix) {
			continue
		}
		endpoints, err := tx.Endpoints(n.ID)
		if err != nil {
			return err
		}
		for _, e := range endpoints {
			for _, a := range []netip.Addr{e.IPv4.Addr(), e.IPv6.Addr()} {
				if e.Left || !a.IsValid() || !p.Prefix.Contains(a) {
					continue
				}
				if err := tx.PutLease(store.Lease{Pool: p.ID, Address: a, Kind: kindAuto, Taken: i.cfg.Now().UTC()}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
