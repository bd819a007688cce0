package driver

import (
	"net/netip"
	"testing"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

func TestJoinLeadsToTheOtherSubnets(t *testing.T) {
	n := store.Network{}
	for _, p := range []string{"10.90.0.0/24", "10.91.0.0/24", "fd00:90::/64", "fd00:91::/64"} {
		n.Subnets = append(n.Subnets, store.Subnet{Pool: netip.MustParsePrefix(p)})
	}
	four, six := netip.MustParsePrefix("10.91.0.7/24"), netip.MustParsePrefix("fd00:90::7/64")
	for _, c := range []struct {
		e    store.Endpoint
		want []network.StaticRoute
	}{
		{store.Endpoint{IPv4: four}, []network.StaticRoute{{Destination: "10.90.0.0/24", RouteType: 1}}},
		{store.Endpoint{IPv6: six}, []network.StaticRoute{{Destination: "fd00:91::/64", RouteType: 1}}},
		{store.Endpoint{IPv4: four, IPv6: six}, []network.StaticRoute{{Destination: "10.90.0.0/24", RouteType: 1}, {Destination: "fd00:91::/64", RouteType: 1}}},
	} {
		if d := cmp.Diff(c.want, joinReply(n, c.e).StaticRoutes); d != "" {
			t.Errorf("%v %v: %s", c.e.IPv4, c.e.IPv6, d)
		}
	}
}
