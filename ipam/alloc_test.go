package ipam

import (
	"math"
	"net/netip"
	"testing"

	"github.com/weftnet/weft/store"
)

func TestUsable(t *testing.T) {
	for _, c := range []struct {
		pool, sub, lo, hi string
		size              uint64
	}{
		{"10.0.0.0/30", "", "10.0.0.1", "10.0.0.2", 2},
		{"10.0.0.0/24", "", "10.0.0.1", "10.0.0.254", 254},
		{"10.0.0.0/24", "10.0.0.128/25", "10.0.0.128", "10.0.0.254", 127},
		{"10.0.0.0/24", "10.0.0.0/25", "10.0.0.1", "10.0.0.127", 127},
		{"10.0.0.0/24", "10.0.0.9/32", "10.0.0.9", "10.0.0.9", 1},
		{"10.0.0.0/24", "10.0.0.255/32", "", "", 0},
		{"10.0.0.0/24", "10.0.0.0/32", "", "", 0},
		{"240.0.0.0/4", "", "240.0.0.1", "255.255.255.254", 1<<28 - 2},
		{"fd00::/126", "", "fd00::1", "fd00::3", 3},
		{"fd00::/64", "", "fd00::1", "fd00::ffff:ffff:ffff:ffff", math.MaxUint64},
		{"fd00::/48", "", "fd00::1", "fd00::ffff:ffff:ffff:ffff:ffff", math.MaxUint64},
	} {
		var sub netip.Prefix
		if c.sub != "" {
			sub = netip.MustParsePrefix(c.sub)
		}
		s := usable(netip.MustParsePrefix(c.pool), sub)
		want := span{}
		if c.lo != "" {
			want = span{netip.MustParseAddr(c.lo), netip.MustParseAddr(c.hi)}
		}
		if s != want || s.size() != c.size {
			t.Errorf("%s %s: %v, %d addresses; want %v, %d", c.pool, c.sub, s, s.size(), want, c.size)
		}
		if c.size > 0 && c.size < math.MaxUint64 && s.at(c.size-1) != s.hi {
			t.Errorf("%s: address %d is %s", c.pool, c.size-1, s.at(c.size-1))
		}
	}
}

func TestHostsBeginAtDifferentPlaces(t *testing.T) {
	p := store.Pool{ID: "WeftLocal/10.70.0.0/24", Prefix: netip.MustParsePrefix("10.70.0.0/24")}
	seen := map[netip.Addr]bool{}
	for _, h := range []store.HostID{"a", "b", "c", "d"} {
		a := firstChoice(p, h)
		if !usable(p.Prefix, p.Sub).has(a) || a != firstChoice(p, h) {
			t.Errorf("host %s begins at %s", h, a)
		}
		seen[a] = true
	}
	if len(seen) < 3 {
		t.Errorf("four hosts begin at %v", seen)
	}
}

// FuzzRuns compares the set and the search with a plain map: each byte pair adds,
// removes or searches in a span of 64 addresses that touches the end of all.
func FuzzRuns(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 0, 3, 1, 2, 2, 0, 3, 63}, false)
	f.Add([]byte{0, 63, 0, 62, 2, 62, 1, 63, 3, 63}, true)
	f.Fuzz(func(t *testing.T, ops []byte, v6 bool) {
		base := netip.MustParseAddr("255.255.255.192")
		if v6 {
			base = netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffc0")
		}
		all := span{base, span{base, base}.at(63)}
		var r runs
		ref := map[netip.Addr]bool{}
		for k := 0; k+1 < len(ops); k += 2 {
			a := all.at(uint64(ops[k+1] % 64))
			switch ops[k] % 4 {
			case 0:
				r, ref[a] = r.add(a), true
			case 1:
				r = r.remove(a)
				delete(ref, a)
			default:
				blocked := func(b netip.Addr) bool { return ops[k]%4 == 3 && b.As16()[15]%3 == 0 }
				got, ok := pick(all, a, r, blocked)
				want, wantOK := refPick(all, a, ref, blocked)
				if got != want || ok != wantOK {
					t.Fatalf("pick from %s: %s %v, want %s %v in %v", a, got, ok, want, wantOK, r)
				}
			}
			checkRuns(t, r, ref)
		}
	})
}

func refPick(all span, start netip.Addr, taken map[netip.Addr]bool, blocked func(netip.Addr) bool) (netip.Addr, bool) {
	a := start
	for range all.size() {
		if !taken[a] && !blocked(a) {
			return a, true
		}
		if a == all.hi {
			a = all.lo
		} else {
			a = a.Next()
		}
	}
	return netip.Addr{}, false
}

// checkRuns demands the same members, order, and no two spans that touch.
func checkRuns(t *testing.T, r runs, ref map[netip.Addr]bool) {
	t.Helper()
	var n uint64
	for k, s := range r {
		n += s.size()
		for j := range s.size() {
			if !ref[s.at(j)] {
				t.Fatalf("%v holds %s", r, s.at(j))
			}
		}
		if k > 0 && !r[k-1].hi.Next().Less(s.lo) {
			t.Fatalf("%v: spans touch", r)
		}
	}
	if n != uint64(len(ref)) {
		t.Fatalf("%v holds %d, want %d", r, n, len(ref))
	}
}

// FuzzPoolID demands that an id that is accepted is the one we write.
func FuzzPoolID(f *testing.F) {
	for _, s := range []string{"", "WeftLocal/10.0.0.0/24", "WeftGlobal/fd00::/64", "WeftLocal/10.0.0.0/24/10.0.0.0/25", "WeftLocal/10.0.0.0/24/10.0.0.0/24", "///", "WeftLocal//"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, id string) {
		p, err := parsePoolID(id)
		if err == nil && (poolID(p.Space, p.Prefix, p.Sub) != id || !usable(p.Prefix, p.Sub).lo.IsValid()) {
			t.Errorf("%q became %+v", id, p)
		}
	})
}
