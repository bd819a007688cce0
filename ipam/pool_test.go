package ipam

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	api "github.com/docker/go-plugins-helpers/ipam"
	"github.com/google/go-cmp/cmp"
)

func TestNetworkLifeLeavesNothing(t *testing.T) {
	b := newBed(t)
	empty := b.state(t)
	id := b.pool(t, "10.70.0.0/24", "10.70.0.128/25")
	if want := "WeftLocal/10.70.0.0/24/10.70.0.128/25"; id != want {
		t.Fatalf("pool id %s, want %s", id, want)
	}
	var got []string
	got = append(got, b.must(t, id, "", optType, gatewayType))
	got = append(got, b.must(t, id, "", optType, gatewayType)) // again: the same
	got = append(got, b.must(t, id, "10.70.0.9"))
	got = append(got, b.must(t, id, ""), b.must(t, id, "", optName, "web"))
	want := []string{"10.70.0.1/24", "10.70.0.1/24", "10.70.0.9/24", "10.70.0.128/24", "10.70.0.129/24"}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	_, err := b.ask(t, id, "10.70.0.129")
	wantErr(t, err, "10.70.0.129", `container "web"`)
	_, err = b.ask(t, id, "10.70.0.1")
	wantErr(t, err, "10.70.0.1", "gateway")
	for _, a := range got {
		b.release(t, id, a)
	}
	b.releasePool(t, id)
	b.releasePool(t, id)
	b.release(t, id, "10.70.0.1")
	if d := cmp.Diff(empty, b.state(t)); d != "" {
		t.Fatal(d)
	}
}

func TestRequestPoolRefuses(t *testing.T) {
	b := newBed(t)
	b.routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("fd01::/48")}
	b.pool(t, "10.70.0.0/16", "")
	b.pool(t, "10.80.0.0/24", "10.80.0.0/26")
	b.pool(t, "fd00:70::/64", "")
	b.network(t, "net-seventy-0123456789", 4096, "10.70.0.0/16")
	type r = api.RequestPoolRequest
	for _, c := range []struct {
		r     r
		words []string
	}{
		{r{}, []string{"AddressSpace", `""`, LocalSpace}},
		{r{AddressSpace: "Elsewhere", Pool: "10.1.0.0/24"}, []string{"AddressSpace", "Elsewhere"}},
		{r{AddressSpace: LocalSpace, SubPool: "10.1.0.0/24"}, []string{"SubPool", "needs"}},
		{r{AddressSpace: LocalSpace, Pool: "abc"}, []string{"pool", "abc"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0"}, []string{"pool", "10.1.0.0"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/33"}, []string{"pool"}},
		{r{AddressSpace: LocalSpace, Pool: "fe80::1%eth0/64"}, []string{"pool"}},
		{r{AddressSpace: LocalSpace, Pool: "::ffff:10.1.0.0/120"}, []string{"IPv4"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.5/24"}, []string{"10.1.0.5/24", "10.1.0.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/31"}, []string{"too small", "/30"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/32"}, []string{"too small"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00::/127"}, []string{"too small", "/126"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00::/128"}, []string{"too small"}},
		{r{AddressSpace: LocalSpace, Pool: "0.0.0.0/0"}, []string{"every address"}},
		{r{AddressSpace: LocalSpace, Pool: "::/0"}, []string{"every address"}},
		{r{AddressSpace: LocalSpace, Pool: "0.1.0.0/16"}, []string{"this network"}},
		{r{AddressSpace: LocalSpace, Pool: "127.0.0.0/16"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "126.0.0.0/7"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "169.254.7.0/24"}, []string{"link-local"}},
		{r{AddressSpace: LocalSpace, Pool: "239.0.0.0/8"}, []string{"multicast"}},
		{r{AddressSpace: LocalSpace, Pool: "::/64"}, []string{"loopback"}},
		{r{AddressSpace: LocalSpace, Pool: "fe80::/64"}, []string{"link-local"}},
		{r{AddressSpace: LocalSpace, Pool: "ff02::/64"}, []string{"multicast"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.1.0/25"}, []string{"SubPool 10.1.1.0/25", "10.1.0.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.0/16"}, []string{"SubPool", "does not lie"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "fd00::/80"}, []string{"SubPool"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.129/25"}, []string{"SubPool", "10.1.0.128/25"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", SubPool: "10.1.0.255/32"}, []string{"SubPool", "broadcast"}},
		{r{AddressSpace: LocalSpace, Pool: "10.70.3.0/24"}, []string{"overlaps", "WeftLocal/10.70.0.0/16", "net-seventy-"}},
		{r{AddressSpace: LocalSpace, Pool: "10.64.0.0/10"}, []string{"overlaps", "WeftLocal/10.70.0.0/16"}},
		{r{AddressSpace: LocalSpace, Pool: "10.80.0.0/24"}, []string{"overlaps", "WeftLocal/10.80.0.0/24/10.80.0.0/26"}},
		{r{AddressSpace: LocalSpace, Pool: "fd00:70::/80"}, []string{"overlaps", "WeftLocal/fd00:70::/64"}},
		{r{AddressSpace: LocalSpace, Pool: "192.168.0.0/16"}, []string{"overlaps", "route", "192.168.1.0/24"}},
		{r{AddressSpace: LocalSpace, Pool: "192.168.1.64/26"}, []string{"overlaps", "route"}},
		{r{AddressSpace: LocalSpace, Pool: "fd01:0:0:5::/64"}, []string{"overlaps", "fd01::/48"}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", Options: map[string]string{"io": "1"}}, []string{"ipam option", `"io"`, "com.docker.network."}},
		{r{AddressSpace: LocalSpace, Pool: "10.1.0.0/24", Options: map[string]string{"docker.network.ipam.serial": "1"}}, []string{"nearest", optSerial}},
	} {
		before := b.state(t)
		_, err := b.RequestPool(t.Context(), c.r)
		wantErr(t, err, c.words...)
		if d := cmp.Diff(before, b.state(t)); d != "" {
			t.Errorf("%+v changed the state: %s", c.r, d)
		}
	}
}

func TestSamePoolIsCounted(t *testing.T) {
	b := newBed(t)
	id := b.pool(t, "10.70.0.0/24", "")
	b.routes = []netip.Prefix{netip.MustParsePrefix("10.70.0.0/24")} // a bridge made for it
	if again := b.pool(t, "10.70.0.0/24", ""); again != id {
		t.Fatalf("%s and %s", id, again)
	}
	if same := b.pool(t, "10.70.0.0/24", "10.70.0.0/24"); same != id {
		t.Fatalf("a sub-pool that is the whole pool gave %s", same)
	}
	gw := b.must(t, id, "10.70.0.1", optType, gatewayType)
	b.releasePool(t, id)
	b.release(t, id, gw) // of the second network, which failed: the first still has it
	b.releasePool(t, id)
	_, err := b.ask(t, id, "10.70.0.1")
	wantErr(t, err, "gateway")
	b.release(t, id, gw)
	b.must(t, id, "10.70.0.1")
	// The other space is another pool with leases of its own.
	r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: GlobalSpace, Pool: "10.70.0.0/24", Options: map[string]string{optSerial: "true"}})
	if err != nil {
		t.Fatal(err)
	}
	b.must(t, r.PoolID, "10.70.0.1", optType, gatewayType)
}

// In a Swarm the driver refuses what one host cannot have, for it can say so.
func TestPoolOfSwarmDoesNotMindRoutes(t *testing.T) {
	b := newBed(t)
	b.routes = []netip.Prefix{netip.MustParsePrefix("10.70.0.0/16")}
	for _, swarm := range []bool{false, true} {
		b.cfg.Swarm = swarm
		_, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, Pool: "10.70.1.0/24"})
		if (err == nil) != swarm {
			t.Errorf("in a Swarm %t: %v", swarm, err)
		}
	}
}

func TestRoutesThatCannotBeReadRefuseThePool(t *testing.T) {
	b := newBed(t)
	b.cfg.Routes = func(context.Context) ([]netip.Prefix, error) { return nil, errors.New("no netlink") }
	_, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, Pool: "10.70.0.0/24"})
	wantErr(t, err, "routes", "no netlink")
}

func TestAutoPoolsKeepClear(t *testing.T) {
	b := newBed(t, "10.32.0.0/18", "192.168.7.0/24")
	b.routes = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("10.32.1.0/24")}
	b.network(t, "n1", 4096, "10.32.16.0/24")
	auto := func(v6 bool) (string, error) {
		r, err := b.RequestPool(t.Context(), api.RequestPoolRequest{AddressSpace: LocalSpace, V6: v6})
		return r.Pool, err
	}
	var got []string
	for range 3 {
		p, err := auto(false)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p)
	}
	if d := cmp.Diff([]string{"10.32.32.0/20", "10.32.48.0/20", "192.168.7.0/24"}, got); d != "" {
		t.Fatal(d)
	}
	_, err := auto(false)
	wantErr(t, err, "10.32.0.0/18", "192.168.7.0/24", "WEFT_SUBNETS")
	b.releasePool(t, poolID(LocalSpace, netip.MustParsePrefix("10.32.48.0/20"), netip.Prefix{}))
	if p, err := auto(false); err != nil || p != "10.32.48.0/20" {
		t.Fatal(p, err)
	}
	for _, want := range []string{"fd77:6566:7400::/64", "fd77:6566:7400:1::/64"} {
		if p, err := auto(true); err != nil || p != want {
			t.Fatalf("%s, %v; want %s", p, err, want)
		}
	}
}

func TestAutoPoolBehindALargeRouteEnds(t *testing.T) {
	_, err := freeDefault([]netip.Prefix{netip.MustParsePrefix("fd00::/8")}, []netip.Prefix{netip.MustParsePrefix("fc00::/7")})
	wantErr(t, err, "fd00::/8")
	_, err = freeDefault([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, nil)
	wantErr(t, err, "WEFT_SUBNETS", "loopback")
}

func TestFailPointsAreNamed(t *testing.T) {
	raw, err := os.ReadFile("ipam.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range FailPoints() {
		if step := p[strings.LastIndex(p, "."):]; !strings.Contains(string(raw), `store.FailPoint("ipam." + call + "`+step+`")`) {
			t.Errorf("no step %s", p)
		}
	}
}
