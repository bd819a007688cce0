package ipam

import (
	"encoding/json"
	"net/netip"
	"testing"

	api "github.com/docker/go-plugins-helpers/ipam"

	"github.com/weftnet/weft/store"
)

// fuzzCall decodes each body into a request and calls: no panic, an answer or an
// error, no change on error, and the same refusal when asked again.
func fuzzCall[T, R any](f *testing.F, call func(*bed, *testing.T, T) (R, error), check func(*testing.T, T, R), seeds ...T) {
	for _, s := range seeds {
		raw, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	for _, raw := range []string{``, `{}`, `null`, `{"PoolID":null}`, `{"PoolID":"../"}`, `{"PoolID":"\u0000"}`, `{"Address":"::"}`, `{"Pool":1}`} {
		f.Add([]byte(raw))
	}
	b := newBed(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r T
		if json.Unmarshal(raw, &r) != nil {
			return
		}
		b.reset(t)
		before := b.state(t)
		got, err := call(b, t, r)
		if err == nil {
			check(t, r, got)
			return
		}
		if after := b.state(t); after != before {
			t.Errorf("%s failed (%v) and changed the state\nfrom %s\nto   %s", raw, err, before, after)
		}
		if _, again := call(b, t, r); again == nil || again.Error() != err.Error() {
			t.Errorf("%s: first %v, then %v", raw, err, again)
		}
	})
}

// reset brings the database to the state in which every fuzz call begins.
func (b *bed) reset(t *testing.T) {
	b.write(t, func(tx *store.Tx) error {
		pools, err := tx.Pools()
		if err != nil {
			return err
		}
		for _, p := range pools {
			if err := tx.DeletePool(p.ID); err != nil {
				return err
			}
		}
		return nil
	})
	b.books = map[string]*book{}
	b.routes = []netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}
	full := b.pool(t, "10.70.0.0/30", "")
	b.must(t, full, "", optType, gatewayType)
	b.must(t, full, "")
	b.pool(t, "fd00:70::/64", "fd00:70::100/120")
}

func FuzzRequestPool(f *testing.F) {
	type r = api.RequestPoolRequest
	fuzzCall(f, func(b *bed, t *testing.T, q r) (api.RequestPoolResponse, error) {
		return b.RequestPool(t.Context(), q)
	}, func(t *testing.T, q r, got api.RequestPoolResponse) {
		p, err := parsePoolID(got.PoolID)
		if err != nil || p.Prefix.String() != got.Pool || p.Space != q.AddressSpace {
			t.Errorf("%+v gave %+v: %v", q, got, err)
		}
		if p.Prefix.Overlaps(netip.MustParsePrefix("192.168.0.0/16")) && !serial(q.Options) {
			t.Errorf("%+v gave %+v over a route", q, got)
		}
	}, r{AddressSpace: LocalSpace}, r{AddressSpace: LocalSpace, V6: true}, r{AddressSpace: GlobalSpace, Pool: "10.70.0.0/24"},
		r{AddressSpace: LocalSpace, Pool: "10.70.0.0/24", SubPool: "10.70.0.0/25", Options: map[string]string{optSerial: "true"}},
		r{AddressSpace: LocalSpace, Pool: "fd00:70::/64", SubPool: "fd00:70::100/120"}, r{Pool: "0.0.0.0/0"}, r{Options: map[string]string{"x": ""}})
}

func FuzzReleasePool(f *testing.F) {
	type r = api.ReleasePoolRequest
	fuzzCall(f, func(b *bed, t *testing.T, q r) (struct{}, error) { return b.ReleasePool(t.Context(), q) },
		func(*testing.T, r, struct{}) {},
		r{PoolID: "WeftLocal/10.70.0.0/30"}, r{PoolID: "WeftLocal/fd00:70::/64/fd00:70::100/120"}, r{PoolID: "x"})
}

func FuzzRequestAddress(f *testing.F) {
	type r = api.RequestAddressRequest
	fuzzCall(f, func(b *bed, t *testing.T, q r) (api.RequestAddressResponse, error) {
		return b.RequestAddress(t.Context(), q)
	}, func(t *testing.T, q r, got api.RequestAddressResponse) {
		p, err := parsePoolID(q.PoolID)
		a, aErr := netip.ParsePrefix(got.Address)
		if err != nil || aErr != nil || a.Bits() != p.Prefix.Bits() || !usable(p.Prefix, netip.Prefix{}).has(a.Addr()) {
			t.Errorf("%+v gave %+v: %v %v", q, got, err, aErr)
		}
	}, r{PoolID: "WeftLocal/10.70.0.0/30"}, r{PoolID: "WeftLocal/10.70.0.0/30", Address: "10.70.0.2", Options: map[string]string{optSerial: ""}},
		r{PoolID: "WeftLocal/fd00:70::/64/fd00:70::100/120", Options: map[string]string{optName: "web"}},
		r{PoolID: "WeftGlobal/10.70.0.0/24/10.70.0.0/25", Options: map[string]string{optType: gatewayType}},
		r{PoolID: "WeftLocal/10.70.0.0/16", Address: "::ffff:10.70.0.1"})
}

func FuzzReleaseAddress(f *testing.F) {
	type r = api.ReleaseAddressRequest
	fuzzCall(f, func(b *bed, t *testing.T, q r) (struct{}, error) { return b.ReleaseAddress(t.Context(), q) },
		func(*testing.T, r, struct{}) {},
		r{PoolID: "WeftLocal/10.70.0.0/30", Address: "10.70.0.1"}, r{PoolID: "x", Address: "10.70.0.1"}, r{PoolID: "WeftLocal/10.70.0.0/30", Address: "x"})
}
