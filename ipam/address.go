package ipam

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// addressRequest is a RequestAddress that makes sense in itself.
type addressRequest struct {
	pool   store.Pool // as its id says
	addr   netip.Addr // invalid: any
	kind   string
	serial bool
	tag    string
}

func parseAddressRequest(r api.RequestAddressRequest) (q addressRequest, err error) {
	if q.pool, err = parsePoolID(r.PoolID); err != nil {
		return q, err
	}
	q.serial, q.tag = serial(r.Options), strings.ToValidUTF8(cut(r.Options[optName]), "?")
	q.kind = kindAuto
	if r.Address != "" {
		q.kind = kindFixed
		if q.addr, err = parseAddress(r.Address); err != nil {
			return q, err
		}
		if err := mayBeGiven(q.pool.Prefix, q.addr); err != nil {
			return q, err
		}
	}
	switch t, ok := r.Options[optType]; {
	case t == typeGateway:
		q.kind = kindGateway
	case ok:
		return q, fmt.Errorf("option %s %s is not known; the only value is %s", optType, quote(t), typeGateway)
	}
	return q, nil
}

func parseAddress(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil || a.Zone() != "":
		return a, fmt.Errorf("address %s is not an IP address; write it like 10.70.0.9 or fd00:70::9", quote(s))
	case a.Is4In6():
		return a, fmt.Errorf("address %s is an IPv4 address in IPv6 form; write it as %s", s, a.Unmap())
	}
	return a, nil
}

// mayBeGiven refuses addresses that no interface in the pool can have.
func mayBeGiven(pool netip.Prefix, a netip.Addr) error {
	switch all := whole(pool); {
	case !all.has(a):
		return fmt.Errorf("address %s is outside pool %s; choose one inside it", a, pool)
	case a == all.lo && a.Is4():
		return fmt.Errorf("address %s is the network address of pool %s; choose another", a, pool)
	case a == all.lo:
		return fmt.Errorf("address %s is the subnet-router anycast address of pool %s (RFC 4291); choose another", a, pool)
	case a == all.hi && a.Is4():
		return fmt.Errorf("address %s is the broadcast address of pool %s; choose another", a, pool)
	}
	return nil
}

// RequestAddress gives out an address of a pool: the one asked for, the gateway,
// or any that is free. A pool that is not known is made again from its id: the
// database may have been lost while Docker kept the network.
//
// Asking again for the gateway gives the same answer. An asked-for address that
// is taken is refused with its holder, except in Swarm (option serial or ofSwarm),
// where the leader has decided and this host confirms.
func (i *IPAM) RequestAddress(ctx context.Context, r api.RequestAddressRequest) (api.RequestAddressResponse, error) {
	q, err := parseAddressRequest(r)
	if err != nil {
		return api.RequestAddressResponse{}, fmt.Errorf("request address: %w", err)
	}
	var l store.Lease
	again := false // the pool was made again
	write := func(tx *store.Tx) (func(), error) {
		c, err := i.choose(tx, q)
		if err != nil {
			return nil, err
		}
		if l = c.lease; c.held {
			return nil, errUnchanged
		}
		if again = c.again; again || c.pool.Next != c.next {
			c.pool.Next = c.next
			if err := tx.PutPool(c.pool); err != nil {
				return nil, err
			}
		}
		if again {
			if err := i.leaseAgain(tx, c.pool); err != nil {
				return nil, err
			}
		}
		return func() {
			c.book.taken = c.book.taken.add(l.Address)
			i.books[c.pool.ID] = c.book
		}, tx.PutLease(l)
	}
	err = store.AwaitPeers(ctx, func() error { return i.update(ctx, "RequestAddress", write) })
	if err != nil {
		return api.RequestAddressResponse{}, fmt.Errorf("request address of pool %s: %w", q.pool.ID, err)
	}
	if again {
		i.cfg.Log.Warn("pool was not known and is made again from its id", "pool", q.pool.ID)
	}
	return api.RequestAddressResponse{Address: netip.PrefixFrom(l.Address, q.pool.Prefix.Bits()).String(), Data: map[string]string{}}, nil
}

// choice is what RequestAddress is about to write.
type choice struct {
	pool  store.Pool
	again bool // the pool is made again
	next  netip.Addr
	book  *book
	lease store.Lease
	held  bool // the lease stands already
}

func (i *IPAM) choose(tx *store.Tx, q addressRequest) (c choice, err error) {
	if c.pool, c.again, err = i.pool(tx, q.pool); err != nil {
		return c, err
	}
	_, chosen, err := ofSwarm(tx, c.pool)
	if err != nil {
		return c, err
	}
	q.serial = q.serial || chosen
	c.next = c.pool.Next
	if c.book, err = i.book(tx, c.pool.ID); err != nil {
		return c, err
	}
	h, err := i.holders(tx, c.pool, q.kind)
	if err != nil {
		return c, err
	}
	c.lease = store.Lease{Pool: c.pool.ID, Kind: q.kind, Taken: i.cfg.Now().UTC(), Tag: q.tag}
	switch {
	case q.addr.IsValid():
		err = c.given(tx, q, h)
	case q.kind == kindGateway:
		err = i.gateway(tx, &c, h)
	default:
		in := usable(c.pool.Prefix, c.pool.Sub)
		if c.lease.Address, err = i.free(tx, c, in, c.pool.Next, h); err == nil {
			c.next = c.lease.Address.Next()
			if !in.has(c.next) {
				c.next = in.lo
			}
		}
	}
	return c, err
}

// pool returns the pool, or makes it again.
func (i *IPAM) pool(tx *store.Tx, want store.Pool) (p store.Pool, again bool, err error) {
	p, err = tx.Pool(want.ID)
	if !errors.Is(err, store.ErrNotFound) {
		return p, false, err
	}
	pools, err := tx.Pools()
	if err != nil {
		return p, false, err
	}
	networks, err := tx.Networks()
	if err != nil {
		return p, false, err
	}
	// Its routes are not looked at: they may be those of its own network.
	if err := clash(want, pools, networks, nil); err != nil {
		return p, false, fmt.Errorf("it is not known and cannot be made again: %w", err)
	}
	p = i.newPool(want)
	p.Refs = 1
	return p, true, nil
}

// given decides on an address that was asked for. One that cools may be had: its
// former owner asks for it again, as a rule.
func (c *choice) given(tx *store.Tx, q addressRequest, h holders) error {
	c.lease.Address = q.addr
	old, err := tx.Lease(c.pool.ID, q.addr)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	taken := err == nil && old.Freed.IsZero()
	if taken && (q.serial || old.Kind == kindGateway && q.kind == kindGateway) {
		c.lease, c.held = old, old.Doubt.IsZero()
		c.lease.Doubt = time.Time{} // confirmed
		return nil
	}
	if q.serial {
		return nil
	}
	who, err := h.of(tx, q.addr)
	switch {
	case err != nil:
		return err
	case taken && who == "" && old.Kind == kindFixed && old.Tag != "" && old.Tag == q.tag:
		// The same container asks again: it never got our first answer, or its
		// release was lost.
		c.lease, c.held = old, true
		return nil
	case taken && who == "" && old.Kind == kindGateway:
		who = "the gateway"
	case taken && who == "" && old.Tag != "":
		who = "container " + quote(old.Tag)
	case taken && who == "":
		who = "a lease since " + old.Taken.Format("2006-01-02 15:04:05 MST")
	}
	if who == "" {
		return nil
	}
	reason := fmt.Sprintf("address %s is taken by %s; choose another", q.addr, who)
	if _, elsewhere := h.peer(q.addr); elsewhere {
		return &store.ElsewhereError{Reason: reason}
	}
	return errors.New(reason)
}

// gateway returns the gateway that the pool has, or chooses the first address of
// the whole pool: with --ip-range too, so that hosts with different ranges agree.
func (i *IPAM) gateway(tx *store.Tx, c *choice, h holders) error {
	leases, err := tx.Leases(c.pool.ID)
	if err != nil {
		return err
	}
	for _, l := range leases {
		if l.Kind == kindGateway && l.Freed.IsZero() {
			c.lease, c.held = l, true
			return nil
		}
	}
	in := usable(c.pool.Prefix, netip.Prefix{})
	c.lease.Address, err = i.free(tx, *c, in, in.lo, h)
	return err
}

// free chooses an address of in: one that is free and has cooled, from start on;
// when there is none, the one that cools for longest.
func (i *IPAM) free(tx *store.Tx, c choice, in span, start netip.Addr, h holders) (netip.Addr, error) {
	now := i.cfg.Now()
	if err := c.book.settle(tx, c.pool.ID, now); err != nil {
		return netip.Addr{}, err
	}
	for {
		a, ok := pick(in, start, c.book.taken, h.has)
		if !ok {
			break
		}
		// The database decides, not the book.
		old, err := tx.Lease(c.pool.ID, a)
		if errors.Is(err, store.ErrNotFound) || err == nil && !old.Freed.IsZero() && !cools(old, now) {
			return a, nil
		}
		if err != nil {
			return a, err
		}
		c.book.taken = c.book.taken.add(a)
	}
	for _, f := range c.book.queue {
		if !in.has(f.addr) || h.has(f.addr) {
			continue
		}
		if l, err := tx.Lease(c.pool.ID, f.addr); err == nil && l.Freed.Equal(f.freed) {
			return f.addr, nil
		}
	}
	return netip.Addr{}, i.exhausted(tx, c, in, h)
}

// exhausted says where all the addresses are.
func (i *IPAM) exhausted(tx *store.Tx, c choice, in span, h holders) error {
	leases, err := tx.Leases(c.pool.ID)
	if err != nil {
		return err
	}
	now, used, cooling := i.cfg.Now(), 0, 0
	leased := map[netip.Addr]bool{}
	for _, l := range leases {
		switch {
		case !in.has(l.Address):
		case l.Freed.IsZero():
			used++
			leased[l.Address] = true
		case cools(l, now):
			cooling++
		}
	}
	peers, others := h.count(in, leased)
	return fmt.Errorf("no address is free: %d usable (%s to %s), %d used, %d cooling, %d held by peers, %d by endpoints or the network itself without a lease; remove containers or make the network again with a larger subnet",
		in.size(), in.lo, in.hi, used, cooling, peers, others)
}

// ReleaseAddress frees an address; it cools before it is given out again. An
// unknown pool or address is no error. The gateway of a pool with several
// references stays until the last one is about to go; that of a network that was refused
// because another has the pool does not.
func (i *IPAM) ReleaseAddress(ctx context.Context, r api.ReleaseAddressRequest) (struct{}, error) {
	if r.PoolID == "" {
		return struct{}{}, errors.New("release address: PoolID is empty")
	}
	a, err := parseAddress(r.Address)
	if err != nil {
		return struct{}{}, fmt.Errorf("release address of pool %s: %w", quote(r.PoolID), err)
	}
	err = i.update(ctx, "ReleaseAddress", func(tx *store.Tx) (func(), error) {
		p, err := tx.Pool(r.PoolID)
		if errors.Is(err, store.ErrNotFound) {
			return nil, errUnchanged
		}
		if err != nil {
			return nil, err
		}
		l, err := tx.Lease(p.ID, a)
		if errors.Is(err, store.ErrNotFound) || err == nil && !l.Freed.IsZero() {
			return nil, errUnchanged
		}
		if err != nil {
			return nil, err
		}
		kept, err := allocated(tx, p)
		if err != nil {
			return nil, err
		}
		if l.Kind == kindGateway && (kept || p.Refs > 1) {
			if stays, err := standsFor(tx, l, p); err != nil || stays {
				return nil, cmp.Or(err, errUnchanged)
			}
		}
		l.Freed = i.cfg.Now().UTC()
		return func() { i.books[p.ID].freed(l) }, tx.PutLease(l)
	})
	if err != nil {
		return struct{}{}, fmt.Errorf("release address %s of pool %s: %w", a, quote(r.PoolID), err)
	}
	return struct{}{}, nil
}

// standsFor reports whether a gateway's lease is that of a network which has the pool:
// one of this host, or the first that asked.
func standsFor(tx *store.Tx, l store.Lease, p store.Pool) (bool, error) {
	networks, err := tx.Networks()
	if err != nil {
		return false, err
	}
	for _, n := range networks {
		if slices.ContainsFunc(n.Subnets, func(s store.Subnet) bool { return s.Pool == p.Prefix && s.Gateway == l.Address }) {
			return true, nil
		}
	}
	leases, err := tx.Leases(p.ID)
	return !slices.ContainsFunc(leases, func(o store.Lease) bool {
		return o.Kind == kindGateway && o.Freed.IsZero() && o.Address != l.Address && o.Taken.Before(l.Taken)
	}), err
}
