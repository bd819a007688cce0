package ipam

import (
	"encoding/binary"
	"hash/fnv"
	"math"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/weftnet/weft/store"
)

// span is the addresses from lo to hi, both included and of one family. The zero
// span is empty.
type span struct{ lo, hi netip.Addr }

func (s span) has(a netip.Addr) bool {
	return s.lo.IsValid() && s.lo.Compare(a) <= 0 && a.Compare(s.hi) <= 0
}

// size returns the number of addresses, at most MaxUint64.
func (s span) size() uint64 {
	if !s.lo.IsValid() {
		return 0
	}
	hiLo, loLo := halves(s.lo)
	hiHi, loHi := halves(s.hi)
	low, borrow := bits.Sub64(loHi, loLo, 0)
	high, _ := bits.Sub64(hiHi, hiLo, borrow)
	if high != 0 || low == math.MaxUint64 {
		return math.MaxUint64
	}
	return low + 1
}

// at returns the address n places after lo; n must be less than size.
func (s span) at(n uint64) netip.Addr {
	high, low := halves(s.lo)
	low, carry := bits.Add64(low, n, 0)
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], high+carry)
	binary.BigEndian.PutUint64(b[8:], low)
	a := netip.AddrFrom16(b)
	if s.lo.Is4() {
		return a.Unmap()
	}
	return a
}

func halves(a netip.Addr) (high, low uint64) {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

// whole returns all addresses of a masked prefix.
func whole(p netip.Prefix) span {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return span{p.Addr(), last}
}

// usable returns the addresses of a pool that an interface may have, within sub
// if that is valid: not IPv4's network and broadcast address, not IPv6's
// subnet-router anycast address (RFC 4291, 2.6.1).
func usable(pool, sub netip.Prefix) span {
	s := whole(pool)
	s.lo = s.lo.Next()
	if pool.Addr().Is4() {
		s.hi = s.hi.Prev()
	}
	if sub.IsValid() {
		r := whole(sub)
		if s.lo.Less(r.lo) {
			s.lo = r.lo
		}
		if r.hi.Less(s.hi) {
			s.hi = r.hi
		}
	}
	if s.hi.Less(s.lo) {
		return span{}
	}
	return s
}

// firstChoice returns where the search in a new pool begins: at a place that
// differs from host to host, unless the user has divided the pool by sub-pools.
func firstChoice(p store.Pool, host store.HostID) netip.Addr {
	s := usable(p.Prefix, p.Sub)
	if p.Sub.IsValid() {
		return s.lo
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(string(host) + " " + p.ID)) // never fails
	return s.at(uint64(h.Sum32()) % s.size())
}

// runs is a set of addresses of one family as its longest spans, in order: two
// neighbours are one span. The search for a free address skips a span at a time.
type runs []span

// find returns the first span that ends at or after a, and whether a is in it.
func (r runs) find(a netip.Addr) (int, bool) {
	i, _ := slices.BinarySearchFunc(r, a, func(s span, a netip.Addr) int { return s.hi.Compare(a) })
	return i, i < len(r) && r[i].lo.Compare(a) <= 0
}

// next returns the first address at or after a that is not in the set; the zero
// Addr after the last one that exists.
func (r runs) next(a netip.Addr) netip.Addr {
	if i, in := r.find(a); in {
		return r[i].hi.Next()
	}
	return a
}

func (r runs) add(a netip.Addr) runs {
	i, in := r.find(a)
	if in {
		return r
	}
	left := i > 0 && r[i-1].hi.Next() == a
	right := i < len(r) && a.Next() == r[i].lo
	switch {
	case left && right:
		r[i-1].hi = r[i].hi
		return slices.Delete(r, i, i+1)
	case left:
		r[i-1].hi = a
	case right:
		r[i].lo = a
	default:
		return slices.Insert(r, i, span{a, a})
	}
	return r
}

func (r runs) remove(a netip.Addr) runs {
	i, in := r.find(a)
	if !in {
		return r
	}
	s := r[i]
	switch {
	case s.lo == s.hi:
		return slices.Delete(r, i, i+1)
	case s.lo == a:
		r[i].lo = a.Next()
	case s.hi == a:
		r[i].hi = a.Prev()
	default:
		r[i].hi = a.Prev()
		return slices.Insert(r, i+1, span{a.Next(), s.hi})
	}
	return r
}

// pick returns the first address of in that is neither taken nor blocked, at or
// after start and then from the beginning.
func pick(in span, start netip.Addr, taken runs, blocked func(netip.Addr) bool) (netip.Addr, bool) {
	if !in.has(start) {
		start = in.lo
	}
	if a, ok := first(span{start, in.hi}, taken, blocked); ok {
		return a, true
	}
	return first(span{in.lo, start}, taken, blocked)
}

func first(in span, taken runs, blocked func(netip.Addr) bool) (netip.Addr, bool) {
	for a := taken.next(in.lo); in.has(a); a = taken.next(a.Next()) {
		if !blocked(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}
