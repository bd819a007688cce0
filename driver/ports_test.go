package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

// holder stands for the host's sockets.
type holder struct {
	busy map[string]bool // by other processes
	held map[string]int
}

type hold struct {
	h   *holder
	key string
}

func (h hold) Close() error { h.h.held[h.key]--; return nil }

func (h *holder) hold(proto string, at, _ netip.AddrPort) (io.Closer, error) {
	key := proto + " " + at.String()
	if h.busy[key] || h.held[key] > 0 {
		return nil, errors.New("address already in use")
	}
	h.held[key]++
	return hold{h, key}, nil
}

func (h *holder) keys() (out []string) {
	for k, n := range h.held {
		if n > 0 {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

// published is a driver with a routed network and two endpoints.
func published(t *testing.T) (*Driver, *holder, func(endpoint, ports string) ([]string, error)) {
	t.Helper()
	d, _ := newDriver(t)
	h := &holder{busy: map[string]bool{}, held: map[string]int{}}
	d.Hold = h.hold
	mustNet(t, d, strings.Replace(createNet(netA, "10.50.0.0/24", `"mode":"routed"`), `"Gateway":""`, `"Gateway":"10.50.0.1/24"`, 1))
	for ep, address := range map[string]string{epA: "10.50.0.2/24", epB: "10.50.0.3/24"} {
		if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, ep, address))); err != nil {
			t.Fatal(err)
		}
	}
	return d, h, func(endpoint, ports string) ([]string, error) {
		_, err := d.ProgramExternalConnectivity(t.Context(), decode[network.ProgramExternalConnectivityRequest](t,
			fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Options":{"com.docker.network.portmap":[%s]}}`, netA, endpoint, ports)))
		var out []string
		verr := d.DB.View(func(tx *store.Tx) error {
			e, err := tx.Endpoint(netA, store.EndpointID(endpoint))
			for _, p := range e.Ports {
				out = append(out, p.String())
			}
			return err
		})
		return out, errors.Join(err, verr)
	}
}

func TestPortsArePublishedAndTakenBack(t *testing.T) {
	d, h, publish := published(t)
	const fixed = `{"Proto":6,"Port":80,"HostIP":"","HostPort":8080,"HostPortEnd":8080},{"Proto":17,"Port":53,"HostIP":"127.0.0.1","HostPort":5353,"HostPortEnd":5353},{"Proto":132,"Port":4000,"HostPort":3868,"HostPortEnd":3868}`
	want := []string{"0.0.0.0:8080->80/tcp", "127.0.0.1:5353->53/udp", "0.0.0.0:3868->4000/sctp"}
	for range 2 { // Docker may ask again
		got, err := publish(epA, fixed)
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("%v, %v", got, err)
		}
	}
	if diff := cmp.Diff([]string{"sctp 0.0.0.0:3868", "tcp 0.0.0.0:8080", "udp 127.0.0.1:5353"}, h.keys()); diff != "" {
		t.Error(diff)
	}
	// The same again for another endpoint, and what overlaps it.
	for _, ports := range []string{
		`{"Proto":6,"Port":81,"HostPort":8080,"HostPortEnd":8080}`,
		`{"Proto":6,"Port":81,"HostIP":"192.0.2.1","HostPort":8080,"HostPortEnd":8080}`,
		`{"Proto":17,"Port":53,"HostPort":5353,"HostPortEnd":5353}`,
		`{"Proto":132,"Port":4001,"HostIP":"192.0.2.1","HostPort":3868,"HostPortEnd":3868}`,
		`{"Proto":6,"Port":81,"HostPort":9000,"HostPortEnd":9000},{"Proto":6,"Port":82,"HostPort":9000,"HostPortEnd":9000}`,
	} {
		if got, err := publish(epB, ports); err == nil || !strings.Contains(err.Error(), "port is already allocated") || len(got) > 0 {
			t.Errorf("%s: %v, %v", ports, got, err)
		}
	}
	if n := len(h.keys()); n != 3 {
		t.Errorf("after refusals %v are held", h.keys())
	}
	// A range goes on behind what is taken, by whomever.
	h.busy["tcp 0.0.0.0:8081"] = true
	if got, err := publish(epB, `{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8082}`); err != nil || !slices.Equal(got, []string{"0.0.0.0:8082->80/tcp"}) {
		t.Errorf("range: %v, %v", got, err)
	}
	if _, err := publish(epB, `{"Proto":6,"Port":80,"HostPort":8081,"HostPortEnd":8081}`); err == nil || !strings.Contains(err.Error(), "0.0.0.0:8081/tcp failed: address already in use") {
		t.Errorf("a port of a process: %v", err)
	}
	first, err := publish(epB, `{"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":0}`)
	if again, err2 := publish(epB, `{"Proto":6,"Port":80,"HostPort":0,"HostPortEnd":0}`); err != nil || err2 != nil || !slices.Equal(first, again) {
		t.Errorf("a port of our choice: %v and then %v, %v %v", first, again, err, err2)
	}

	if _, err := d.RevokeExternalConnectivity(t.Context(), network.RevokeExternalConnectivityRequest{NetworkID: netA, EndpointID: epA}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.RevokeExternalConnectivity(t.Context(), network.RevokeExternalConnectivityRequest{NetworkID: netA, EndpointID: "unknown"}); err != nil {
		t.Error(err)
	}
	if _, err := d.DeleteEndpoint(context.Background(), network.DeleteEndpointRequest{NetworkID: netA, EndpointID: epB}); err != nil {
		t.Fatal(err)
	}
	if left := h.keys(); len(left) > 0 {
		t.Errorf("held for nobody: %v", left)
	}
}

// As Docker has it: 0.0.0.0 is IPv4 alone, :: IPv6 alone, and nothing is both.
func TestPortsOfOneFamily(t *testing.T) {
	d, h, publish := published(t)
	const v4, v6 = `{"Proto":6,"Port":80,"HostIP":"0.0.0.0","HostPort":8080,"HostPortEnd":8080}`, `{"Proto":6,"Port":80,"HostIP":"::","HostPort":8080,"HostPortEnd":8080}`
	if got, err := publish(epA, v4+","+v6); err != nil || !slices.Equal(got, []string{"0.0.0.0:8080->80/tcp"}) {
		t.Errorf("an endpoint with IPv4 alone: %v, %v", got, err)
	}
	if err := d.DB.Update(t.Context(), func(tx *store.Tx) error {
		for id, address := range map[store.EndpointID]string{epA: "fd00:50::2/64", epB: "fd00:50::3/64"} {
			e, err := tx.Endpoint(netA, id)
			if err != nil {
				return err
			}
			e.IPv6 = netip.MustParsePrefix(address)
			if _, err := tx.PutEndpoint(e); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got, err := publish(epA, v4+","+v6); err != nil || !slices.Equal(got, []string{"0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp"}) {
		t.Errorf("both, as Compose files have them: %v, %v", got, err)
	}
	if diff := cmp.Diff([]string{"tcp 0.0.0.0:8080", "tcp [::]:8080"}, h.keys()); diff != "" {
		t.Error(diff)
	}
	if got, err := publish(epA, v4); err != nil || !slices.Equal(h.keys(), []string{"tcp 0.0.0.0:8080"}) {
		t.Errorf("0.0.0.0: %v, %v, held %v", got, err, h.keys())
	}
	for _, clash := range []string{v4, `{"Proto":6,"Port":80,"HostIP":"192.0.2.1","HostPort":8080}`, `{"Proto":6,"Port":80,"HostPort":8080}`} {
		if _, err := publish(epB, clash); err == nil || !strings.Contains(err.Error(), "already allocated") {
			t.Errorf("%s beside 0.0.0.0: %v", clash, err)
		}
	}
	for _, other := range []string{v6, `{"Proto":6,"Port":80,"HostIP":"2001:db8::1","HostPort":8080}`} {
		if _, err := publish(epB, other); err != nil {
			t.Errorf("%s beside 0.0.0.0: %v", other, err)
		}
	}
	if _, err := publish(epA, `{"Proto":6,"Port":80,"HostPort":9090}`); err != nil || !slices.Contains(h.keys(), "tcp 0.0.0.0:9090") || !slices.Contains(h.keys(), "tcp [::]:9090") {
		t.Errorf("no address: %v, held %v", err, h.keys())
	}
}

// What Docker does not take back, because it was killed, goes with the record.
func TestPortsOfForgottenEndpointsAreGivenBack(t *testing.T) {
	const port = `{"Proto":6,"Port":80,"HostPort":8080,"HostPortEnd":8080}`
	for _, lost := range []bool{true, false} {
		d, h, publish := published(t)
		f, now := d.Sync.(*fakeSync), time.Now()
		a := NewAudit(d, 0, func() time.Time { return now })
		grace := idleGrace // its link was never taken
		if lost {
			grace = lostGrace
		}
		if _, err := d.Join(t.Context(), network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/x"}); err != nil {
			t.Fatal(err)
		}
		if _, err := publish(epA, port); err != nil {
			t.Fatal(err)
		}
		if lost {
			f.missing = []store.EndpointID{epA}
		} else {
			f.untaken = []store.EndpointID{epA}
		}
		for range 2 {
			if err := a.once(t.Context()); err != nil {
				t.Fatal(err)
			}
			now = now.Add(grace)
		}
		if left := h.keys(); len(left) > 0 {
			t.Errorf("lost %v: held for nobody: %v", lost, left)
		}
		if !lost {
			continue
		}
		if _, err := publish(epB, port); err != nil {
			t.Errorf("the next container cannot have the port: %v", err)
		}
		if _, err := d.DeleteNetwork(t.Context(), network.DeleteNetworkRequest{NetworkID: netA}); err != nil {
			t.Fatal(err)
		}
		if left := h.keys(); len(left) > 0 {
			t.Errorf("held after the network: %v", left)
		}
	}
}

func TestPortsRefused(t *testing.T) {
	_, h, publish := published(t)
	for ports, want := range map[string]string{
		`{"Proto":99,"Port":80,"HostPort":8080}`:                   "tcp, udp or sctp",
		`{"Proto":6,"Port":0,"HostPort":8080}`:                     "port 0",
		`{"Proto":6,"Port":80,"HostIP":"me","HostPort":8080}`:      "is no address",
		`{"Proto":6,"Port":80,"HostIP":"fd00::1","HostPort":8080}`: "no address of that family",
		`{"Proto":6,"Port":99999,"HostPort":8080}`:                 "not a list of ports",
		`{"Proto":132,"Port":80,"HostIP":"::1","HostPort":8080}`:   "SCTP port 80 cannot be published on ::1",
	} {
		if got, err := publish(epA, ports); err == nil || !strings.Contains(err.Error(), want) || len(got) > 0 {
			t.Errorf("%s: %v, %v; want %q", ports, got, err, want)
		}
	}
	if left := h.keys(); len(left) > 0 {
		t.Errorf("held: %v", left)
	}
}

func TestJoinOfARoutedNetwork(t *testing.T) {
	n := store.Network{Mode: store.ModeRouted, Subnets: []store.Subnet{
		{Pool: netip.MustParsePrefix("10.90.0.0/24"), Gateway: netip.MustParseAddr("10.90.0.1")},
		{Pool: netip.MustParsePrefix("10.91.0.0/31"), Gateway: netip.MustParseAddr("10.91.0.0")},
		{Pool: netip.MustParsePrefix("fd00:90::/64"), Gateway: netip.MustParseAddr("fd00:90::1")},
	}}
	e := store.Endpoint{IPv4: netip.MustParsePrefix("10.90.0.7/24"), IPv6: netip.MustParsePrefix("fd00:90::7/64")}
	got := joinReply(n, e)
	want := []network.StaticRoute{
		{Destination: "10.90.0.1/32", RouteType: connected}, {Destination: "fd00:90::1/128", RouteType: connected},
		{Destination: "10.90.0.0/25", NextHop: "10.90.0.1"}, {Destination: "10.90.0.128/25", NextHop: "10.90.0.1"}, {Destination: "10.91.0.0/31", NextHop: "10.90.0.1"},
		{Destination: "fd00:90::/65", NextHop: "fd00:90::1"}, {Destination: "fd00:90:0:0:8000::/65", NextHop: "fd00:90::1"},
	}
	if diff := cmp.Diff(want, got.StaticRoutes); diff != "" {
		t.Error(diff)
	}
	if got.Gateway != "10.90.0.1" || got.GatewayIPv6 != "fd00:90::1" || got.DisableGatewayService {
		t.Errorf("%+v", got)
	}
	n.Internal = true
	if got := joinReply(n, e); got.Gateway+got.GatewayIPv6 != "" || !got.DisableGatewayService || len(got.StaticRoutes) != len(want) {
		t.Errorf("internal: %+v", got)
	}
}
