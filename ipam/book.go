package ipam

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/weftnet/weft/store"
)

// book is the index of a pool's leases: which addresses are not to be had, and
// which of them cool. It is made from the database when it is first needed.
type book struct {
	taken runs     // held or cooling
	queue []cooled // oldest first; an entry counts while the lease says the same
}

type cooled struct {
	addr  netip.Addr
	freed time.Time
}

// cools reports whether a freed lease may not be given out yet. One that was
// freed in the future, because the clock went back, cools until Audit corrects it.
func cools(l store.Lease, now time.Time) bool {
	return !l.Freed.IsZero() && now.Sub(l.Freed) < cooling
}

// book returns the pool's book without keeping it: what a failed transaction has
// seen must not stay.
func (i *IPAM) book(tx *store.Tx, pool string) (*book, error) {
	if b, ok := i.books[pool]; ok {
		return b, nil
	}
	leases, err := tx.Leases(pool)
	if err != nil {
		return nil, err
	}
	b, now := &book{}, i.cfg.Now()
	for _, l := range leases {
		switch {
		case l.Freed.IsZero():
			b.taken = b.taken.add(l.Address)
		case cools(l, now):
			b.taken = b.taken.add(l.Address)
			b.queue = append(b.queue, cooled{l.Address, l.Freed})
		}
	}
	slices.SortStableFunc(b.queue, byFreed)
	return b, nil
}

func byFreed(a, b cooled) int { return cmp.Or(a.freed.Compare(b.freed), a.addr.Compare(b.addr)) }

// freed notes that a lease cools from now on. A book that is not there yet will
// be made from the database.
func (b *book) freed(l store.Lease) {
	if b == nil {
		return
	}
	f := cooled{l.Address, l.Freed}
	at, _ := slices.BinarySearchFunc(b.queue, f, byFreed)
	b.queue = slices.Insert(b.queue, at, f)
}

// settle takes the addresses that have cooled out of the book.
func (b *book) settle(tx *store.Tx, pool string, now time.Time) error {
	n := 0
	for _, f := range b.queue {
		if now.Sub(f.freed) < cooling {
			break
		}
		l, err := tx.Lease(pool, f.addr)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err != nil || l.Freed.Equal(f.freed) {
			b.taken = b.taken.remove(f.addr)
		}
		n++
	}
	b.queue = slices.Delete(b.queue, 0, n)
	return nil
}
