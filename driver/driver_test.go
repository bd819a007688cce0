package driver

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/google/go-cmp/cmp"

	"github.com/weftnet/weft/store"
)

// fakeSync is a data plane that holds everything at once, or fails.
type fakeSync struct {
	mu      sync.Mutex
	err     error
	calls   []string
	missing []store.EndpointID
	untaken []store.EndpointID
}

func (f *fakeSync) Sync(_ context.Context, v store.VNI, e store.EndpointID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf("%d/%s", v, e))
	return f.err
}

func (f *fakeSync) Missing(store.VNI) []store.EndpointID { return f.missing }
func (f *fakeSync) Untaken(store.VNI) []store.EndpointID { return f.untaken }

func newDriver(t testing.TB) (*Driver, *fakeSync) {
	t.Helper()
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "self", Name: "alpha", DataPort: 4797})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	f := &fakeSync{}
	return New(Config{DB: db, Sync: f,
		Routes: func(context.Context) ([]Route, error) {
			return []Route{{netip.MustParsePrefix("192.168.7.0/24"), "eth0"}}, nil
		},
		VXLANs: func(context.Context) ([]VXLAN, error) {
			return []VXLAN{{"flannel.1", 77, 4797}, {"other", 78, 4789}}, nil
		},
		Log: slog.New(slog.DiscardHandler)}), f
}

// decode reads a request as the server does.
func decode[T any](t testing.TB, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

const (
	netA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	netB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	netC = "uevk9dbp5kwsf7p8jnic6u85c"
	epA  = "1111111111111111111111111111111111111111111111111111111111111111"
	epB  = "2222222222222222222222222222222222222222222222222222222222222222"
)

func createNet(id, pool, options string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"IPv4Data":[{"AddressSpace":"LocalDefault","Pool":%q,"Gateway":"","AuxAddresses":{}}],"IPv6Data":[],
		"Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.enable_ipv4":true,"com.docker.network.generic":{%s}}}`, id, pool, options)
}

func createEp(net, ep, address string) string {
	return fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":{"Address":%q,"AddressIPv6":"","MacAddress":""},
		"Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[]}}`, net, ep, address)
}

func mustNet(t testing.TB, d *Driver, text string) {
	t.Helper()
	if _, err := d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, text)); err != nil {
		t.Fatal(err)
	}
}

// state returns all records as text, to show that a failed call changes nothing.
func state(t testing.TB, d *Driver) string {
	t.Helper()
	var b strings.Builder
	err := d.DB.View(func(tx *store.Tx) error {
		nets, err := tx.Networks()
		if err != nil {
			return err
		}
		eps, err := tx.AllEndpoints()
		if err != nil {
			return err
		}
		return json.NewEncoder(&b).Encode([]any{nets, eps})
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestLifeOfAnEndpoint(t *testing.T) {
	d, f := newDriver(t)
	ctx := t.Context()
	mustNet(t, d, createNet(netA, "10.50.0.0/24", `"com.docker.network.driver.mtu":"1400"`))
	for range 2 { // every call may be repeated
		got, err := d.CreateEndpoint(ctx, decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.2/24")))
		if err != nil {
			t.Fatal(err)
		}
		want := network.CreateEndpointResponse{Interface: &network.EndpointInterface{MacAddress: store.DeriveMAC("endpoint", "4096", "10.50.0.2").String()}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	}
	for range 2 {
		got, err := d.Join(ctx, network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/run/docker/netns/b7171c1b2260"})
		if err != nil {
			t.Fatal(err)
		}
		link := store.ContainerLink(store.EndpointID(epA).HostLink())
		if diff := cmp.Diff(JoinResponse{InterfaceName: InterfaceName{SrcName: link, DstPrefix: "eth"}}, got); diff != "" {
			t.Fatal(diff)
		}
	}
	if _, err := d.Join(ctx, network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/other"}); err == nil {
		t.Error("a second sandbox was let in")
	}
	for range 2 {
		if _, err := d.Leave(ctx, network.LeaveRequest{NetworkID: netA, EndpointID: epA}); err != nil {
			t.Fatal(err)
		}
	}
	// Docker may join again after it left.
	if _, err := d.Join(ctx, network.JoinRequest{NetworkID: netA, EndpointID: epA, SandboxKey: "/other"}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := d.DeleteEndpoint(ctx, network.DeleteEndpointRequest{NetworkID: netA, EndpointID: epA}); err != nil {
			t.Fatal(err)
		}
		if _, err := d.DeleteNetwork(ctx, network.DeleteNetworkRequest{NetworkID: netA}); err != nil {
			t.Fatal(err)
		}
	}
	if got := state(t, d); got != "[null,null]\n" {
		t.Errorf("left behind: %s", got)
	}
	if f.calls[0] != "4096/" {
		t.Errorf("the network was not synced first: %v", f.calls)
	}
}

func TestFailedSyncLeavesNoRecord(t *testing.T) {
	d, f := newDriver(t)
	f.err = errors.New("no room on the bridge")
	before := state(t, d)
	if _, err := d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, createNet(netA, "10.50.0.0/24", ""))); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Fatalf("got %v", err)
	}
	if after := state(t, d); after != before {
		t.Errorf("record stayed: %s", after)
	}
	f.err = nil
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	f.err = errors.New("no room on the bridge")
	before = state(t, d)
	if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.2/24"))); err == nil {
		t.Fatal("no error")
	}
	if after := state(t, d); after != before {
		t.Errorf("record stayed: %s", after)
	}
}

// TestRefused is the bad-input matrix of network and endpoint requests: each gets
// an error that names the value and changes nothing.
func TestRefused(t *testing.T) {
	net := func(options string) string { return createNet(netB, "10.60.0.0/24", options) }
	pool := func(p string) string { return createNet(netB, p, "") }
	for _, c := range []struct{ call, request, want string }{
		{"network", `{}`, "NetworkID is empty"},
		{"network", createNet("../etc", "10.60.0.0/24", ""), "../etc"},
		{"network", createNet(strings.Repeat("x", 4096), "10.60.0.0/24", ""), "4096 characters"},
		{"network", createNet("a b", "10.60.0.0/24", ""), "is not an id"},
		{"network", createNet("nætwork", "10.60.0.0/24", ""), "is not an id"},
		{"network", fmt.Sprintf(`{"NetworkID":%q}`, netB), "no subnet"},
		{"network", fmt.Sprintf(`{"NetworkID":%q,"IPv4Data":[null]}`, netB), "IPv4Data[0] is null"},
		{"network", fmt.Sprintf(`{"NetworkID":%q,"Options":{"com.docker.network.generic":[1]}}`, netB), "not a map"},
		{"network", fmt.Sprintf(`{"NetworkID":%q,"Options":{"com.docker.network.generic":{"mtu":1400}}}`, netB), "is not text"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"com.docker.network.enable_ipv4":true`, `"com.docker.network.internal":"yes"`, 1), "must be true or false"},
		{"network", pool(""), "is not a subnet"},
		{"network", pool("10.60.0.0"), "is not a subnet"},
		{"network", pool("10.60.0.1/24"), "host bits"},
		{"network", pool("0.0.0.0/0"), "0.0.0.0/0"},
		{"network", pool("10.60.0.1/32"), "one address"},
		{"network", pool("fd00::1/128"), "one address"},
		{"network", pool("224.0.0.0/8"), "unicast"},
		{"network", pool("127.0.0.0/16"), "unicast"},
		{"network", pool("169.254.0.0/16"), "unicast"},
		{"network", pool("fe80::/64"), "unicast"},
		{"network", pool("::ffff:10.0.0.0/104"), "IPv6 form"},
		{"network", pool("192.168.0.0/16"), "192.168.7.0/24 on eth0"},
		{"network", createNet(netB, "10.50.0.0/16", ""), "aaaaaaaaaaaa (vni 4096)"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"Gateway":""`, `"Gateway":"10.61.0.1/24"`, 1), "outside pool"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"Gateway":""`, `"Gateway":"10.60.0.1"`, 1), "prefix length"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"AuxAddresses":{}`, `"AuxAddresses":{"a":"10.61.0.1/24"}`, 1), "aux address"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"AuxAddresses":{}`, `"AuxAddresses":{"a":7}`, 1), "aux address"},
		{"network", strings.Replace(pool("10.60.0.0/24"), `"IPv6Data":[]`, `"IPv6Data":[{"Pool":"10.60.0.128/25"}]`, 1), "overlap"},
		{"network", createNet(netA, "10.51.0.0/24", ""), "exists with subnets"},
		{"network", net(`"vnni":"5"`), "did you mean vni?"},
		{"network", net(`"com.docker.network.driver.mtuu":"5"`), "did you mean com.docker.network.driver.mtu?"},
		{"network", net(`"quite-another-thing":"5"`), "not known"},
		{"network", net(`"vni":"0"`), "16777215"},
		{"network", net(`"vni":"16777216"`), "16777215"},
		{"network", net(`"vni":"-1"`), "16777215"},
		{"network", net(`"vni":"4097,4098"`), "is a list"},
		{"network", net(`"vni":"4096"`), "belongs to Weft network"},
		{"network", net(`"vni":"77"`), "flannel.1"},
		{"network", net(`"vni":"9","weft.vni":"10"`), "contradict"},
		{"network", net(`"mtu":"-1"`), "MTU"},
		{"network", net(`"mtu":"0"`), "MTU"},
		{"network", net(`"mtu":"67"`), "MTU"},
		{"network", net(`"mtu":"65536"`), "MTU"},
		{"network", net(`"mtu":"$(reboot)"`), "MTU"},
		{"network", createNet(netB, "fd01::/64", `"mtu":"1279"`), "1280"},
		{"network", net(`"mode":"bgp"`), "use vxlan"},
		{"network", net(`"mode":"routed"`), "no gateway"},
		{"network", net(`"mode":"routed","gateway":"docker"`), "do not go together"},
		{"network", net(`"gateway":"weft"`), "no gateway"},
		{"network", net(`"gateway":"me"`), "use docker"},
		{"network", net(`"masquerade":"false"`), "gateway=weft"},
		{"network", createNet(netB, "10.52.0.0/24", `"encrypted":"perhaps"`), "neither true nor false"},
		{"network", net(`"encrypted":""`), "no gateway"},
		{"network", net(`"internal":"TRUE!"`), "neither true nor false"},
		{"network", net(`"ifname":"a;b"`), "interface name"},
		{"network", net(`"ifname":"` + strings.Repeat("x", 65536) + `"`), "…"},
		{"endpoint", `{}`, "NetworkID is empty"},
		{"endpoint", createEp(netC, epB, "10.50.0.9/24"), "docker network rm"},
		{"endpoint", createEp(netA, "", "10.50.0.9/24"), "EndpointID is empty"},
		{"endpoint", createEp(netA, "a b", "10.50.0.9/24"), "is not an id"},
		{"endpoint", createEp(netA, epB, ""), "neither Address"},
		{"endpoint", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"Interface":null}`, netA, epB), "neither Address"},
		{"endpoint", createEp(netA, epB, "10.50.0.9"), "prefix length"},
		{"endpoint", createEp(netA, epB, "10.51.0.9/24"), "outside the subnets"},
		{"endpoint", createEp(netA, epB, "10.50.0.0/24"), "subnet itself"},
		{"endpoint", createEp(netA, epB, "10.50.0.255/24"), "broadcast"},
		{"endpoint", createEp(netA, epB, "fd00::1/64"), "family"},
		{"endpoint", createEp(netA, epB, "10.50.0.2/24"), "on this host"},
		{"endpoint", createEp(netA, epB, "10.50.0.7/24"), "lives on host beta"},
		{"endpoint", createEp(netA, epA, "10.50.0.3/24"), "exists with"},
		{"endpoint", strings.Replace(createEp(netA, epB, "10.50.0.9/24"), `"MacAddress":""`, `"MacAddress":"01:02:03:04:05:06"`, 1), "unicast"},
		{"endpoint", strings.Replace(createEp(netA, epB, "10.50.0.9/24"), `"MacAddress":""`, `"MacAddress":"00:00:00:00:00:00"`, 1), "unicast"},
		{"endpoint", strings.Replace(createEp(netA, epB, "10.50.0.9/24"), `"MacAddress":""`, `"MacAddress":"02:00:00:00:00:77"`, 1), "lives on host beta"},
		{"endpoint", strings.Replace(createEp(netA, epB, "10.50.0.9/24"), `"com.docker.network.portmap":[]`, `"qos":"1"`, 1), "not known"},
		{"endpoint", strings.Replace(createEp(netA, epB, "10.50.0.9/24"), `"com.docker.network.portmap":[]`, `"com.docker.network.endpoint.ifname":"a b"`, 1), "interface name"},
		{"join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q}`, netA, epA), "SandboxKey is empty"},
		{"join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/x"}`, netA, epB), "not found"},
		{"join", fmt.Sprintf(`{"NetworkID":%q,"EndpointID":%q,"SandboxKey":"/x"}`, netC, epA), "not known to Weft"},
	} {
		t.Run(c.call+" "+c.want, func(t *testing.T) {
			d, _ := newDriver(t)
			mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
			if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.2/24"))); err != nil {
				t.Fatal(err)
			}
			addRemote(t, d, "beta", 4096, "10.50.0.0/24", "10.50.0.7", store.MAC{2, 0, 0, 0, 0, 0x77})
			before := state(t, d)
			var err error
			switch c.call {
			case "network":
				_, err = d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, c.request))
			case "endpoint":
				_, err = d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, c.request))
			case "join":
				_, err = d.Join(t.Context(), decode[network.JoinRequest](t, c.request))
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("the message has %d bytes", len(err.Error()))
			}
			if after := state(t, d); after != before {
				t.Errorf("records changed:\n%s\n%s", before, after)
			}
		})
	}
}

// addRemote plants what a peer has told.
func addRemote(t testing.TB, d *Driver, name string, v store.VNI, pool, address string, mac store.MAC) {
	t.Helper()
	id := store.HostID("host-" + name)
	err := d.DB.Update(t.Context(), func(tx *store.Tx) error {
		shared := store.SharedNetwork{VNI: v, Mode: "vxlan", Prefixes: []netip.Prefix{netip.MustParsePrefix(pool)}}
		e := store.SharedEndpoint{ID: "remote", MAC: mac, IPv4: netip.MustParseAddr(address), Seq: 1}
		if err := tx.PutPeer(store.Peer{Host: store.Host{ID: id, Name: name, Epoch: 5}}); err != nil {
			return err
		}
		if err := tx.MergeNetworks(id, 5, 1, []store.SharedNetwork{shared}); err != nil {
			return err
		}
		_, err := tx.MergeEndpoints(id, 0, store.Delta{VNI: v, Epoch: 5, Seq: 1, Full: true, Endpoints: []store.SharedEndpoint{e}})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAddressMovesFromAnotherHost(t *testing.T) {
	d, _ := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	addRemote(t, d, "beta", 4096, "10.50.0.0/24", "10.50.0.7", store.MAC{2, 0, 0, 0, 0, 0x77})
	gone := time.AfterFunc(200*time.Millisecond, func() {
		_ = d.DB.Update(context.Background(), func(tx *store.Tx) error {
			_, err := tx.MergeEndpoints("host-beta", 1, store.Delta{VNI: 4096, Epoch: 5, Seq: 2, Endpoints: []store.SharedEndpoint{{ID: "remote", Seq: 2, Gone: true}}})
			return err
		})
	})
	defer gone.Stop()
	if _, err := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.7/24"))); err != nil {
		t.Fatal(err)
	}
}

func TestVNIIsChosenFreeInTheCluster(t *testing.T) {
	d, _ := newDriver(t)
	addRemote(t, d, "beta", 4096, "10.99.0.0/24", "10.99.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	mustNet(t, d, createNet(netA, "10.50.0.0/24", "")) // 4096 is another network on beta
	mustNet(t, d, createNet(netB, "10.51.0.0/24", `"com.docker.network.driver.overlay.vxlanid_list":"4098"`))
	mustNet(t, d, createNet(netC, "10.52.0.0/24", ""))
	var got []store.VNI
	_ = d.DB.View(func(tx *store.Tx) error {
		for _, id := range []store.NetworkID{netA, netB, netC} {
			n, err := tx.Network(id)
			if err != nil {
				t.Error(err)
			}
			got = append(got, n.VNI)
		}
		return nil
	})
	if diff := cmp.Diff([]store.VNI{4097, 4098, 4099}, got); diff != "" {
		t.Error(diff)
	}
	_, err := d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, createNet("dd", "10.53.0.0/24", `"vni":"4096"`)))
	if err == nil || !strings.Contains(err.Error(), "host beta") || !strings.Contains(err.Error(), "10.99.0.0/24") {
		t.Errorf("got %v, want an error that names the other host's subnet", err)
	}
}

func TestVNIIsThatOfThePeersNetworkWithTheSameSubnets(t *testing.T) {
	d, _ := newDriver(t)
	addRemote(t, d, "beta", 4100, "10.50.0.0/24", "10.50.0.7", store.MAC{2, 0, 0, 0, 0, 1})
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	err := d.DB.View(func(tx *store.Tx) error {
		n, err := tx.Network(netA)
		if err == nil && n.VNI != 4100 {
			t.Errorf("vni %d, want beta's 4100", n.VNI)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestGivenMACIsNotAnswered(t *testing.T) {
	d, _ := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	r := decode[network.CreateEndpointRequest](t, strings.Replace(createEp(netA, epA, "10.50.0.2/24"), `"MacAddress":""`, `"MacAddress":"02:11:22:33:44:55"`, 1))
	got, err := d.CreateEndpoint(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if got.Interface.MacAddress != "" {
		t.Errorf("answered %s; Docker refuses that", got.Interface.MacAddress)
	}
	// The newest engine also passes the option; the older ones the option alone.
	r = decode[network.CreateEndpointRequest](t, strings.Replace(createEp(netA, epB, "10.50.0.3/24"), `"com.docker.network.portmap":[]`, `"com.docker.network.endpoint.macaddress":"AhEiM0RW"`, 1))
	if got, err = d.CreateEndpoint(t.Context(), r); err != nil || got.Interface.MacAddress != "02:11:22:33:44:56" {
		t.Errorf("got %+v, %v", got.Interface, err)
	}
}

func TestRefusedHostMakesNothing(t *testing.T) {
	d, _ := newDriver(t)
	mustNet(t, d, createNet(netA, "10.50.0.0/24", ""))
	before := state(t, d)
	d.Refuse = func() error { return errors.New("this host is a copy") }
	_, errN := d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, createNet(netB, "10.51.0.0/24", "")))
	_, errE := d.CreateEndpoint(t.Context(), decode[network.CreateEndpointRequest](t, createEp(netA, epA, "10.50.0.2/24")))
	_, errA := d.AllocateNetwork(t.Context(), allocation(swarmNet, "10.90.0.0/24", nil))
	for _, err := range []error{errN, errE, errA} {
		if err == nil || !strings.Contains(err.Error(), "this host is a copy") {
			t.Errorf("got error %v", err)
		}
	}
	if after := state(t, d); after != before {
		t.Errorf("records changed:\n%s\n%s", before, after)
	}
}

// A network that was made from the kernel's links takes what they lack from the next call.
func TestRecoveredNetworkIsCompleted(t *testing.T) {
	d, _ := newDriver(t)
	key := strings.Repeat("ab", 32)
	options := fmt.Sprintf(`"weft.vni":"5000","weft.key":%q`, key)
	recovered := store.Network{ID: netA, VNI: 5000, Mode: store.ModeVXLAN, Recovered: true, Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.50.0.0/24")}}}
	if err := d.DB.Update(t.Context(), func(tx *store.Tx) error { return tx.PutNetwork(recovered) }); err != nil {
		t.Fatal(err)
	}
	before := state(t, d)
	_, err := d.CreateNetwork(t.Context(), decode[network.CreateNetworkRequest](t, createNet(netA, "10.51.0.0/24", options)))
	if err == nil || !strings.Contains(err.Error(), "exists with subnets [10.50.0.0/24]") || state(t, d) != before {
		t.Errorf("other subnets: %v", err)
	}
	for range 2 { // the second finds it whole
		mustNet(t, d, createNet(netA, "10.50.0.0/24", options))
	}
	err = d.DB.View(func(tx *store.Tx) error {
		n, err := tx.Network(netA)
		if err == nil && (n.Recovered || hex.EncodeToString(n.Key) != key || n.Options["weft.key"] != key) {
			err = fmt.Errorf("it is %+v", n)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func FuzzOptions(f *testing.F) {
	f.Add("vni", "4096", "mtu", "1400")
	f.Add("weft.encrypted", "", "com.docker.network.driver.overlay.vxlanid_list", "1,2")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		_, err := parseOptions(map[string]string{k1: v1, k2: v2})
		if err != nil && len(err.Error()) > 2000 {
			t.Errorf("message of %d bytes", len(err.Error()))
		}
	})
}

func FuzzCreateNetwork(f *testing.F) {
	f.Add([]byte(createNet(netA, "10.50.0.0/24", `"vni":"9"`)))
	f.Add([]byte(`{"NetworkID":"x","IPv4Data":[{"Pool":"::/0","AuxAddresses":{"a":null}}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var r network.CreateNetworkRequest
		if json.Unmarshal(body, &r) != nil {
			return
		}
		n, err := parseNetwork(r)
		if err == nil && (n.ID == "" || len(n.Subnets) == 0) {
			t.Errorf("accepted %s as %+v", body, n)
		}
	})
}

func FuzzCreateEndpoint(f *testing.F) {
	n := store.Network{ID: netA, VNI: 4096, Mode: "vxlan", Subnets: []store.Subnet{{Pool: netip.MustParsePrefix("10.50.0.0/24")}, {Pool: netip.MustParsePrefix("fd00::/64")}}}
	f.Add([]byte(createEp(netA, epA, "10.50.0.2/24")))
	f.Add([]byte(`{"NetworkID":"x","EndpointID":"y","Interface":{"AddressIPv6":"fd00::2/64","MacAddress":"x"},"Options":{"com.docker.network.endpoint.macaddress":7}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var r network.CreateEndpointRequest
		if json.Unmarshal(body, &r) != nil {
			return
		}
		e, err := parseEndpoint(r, n)
		if err == nil && (e.MAC.IsZero() || e.MAC[0]&1 != 0 || !e.IPv4.IsValid() && !e.IPv6.IsValid()) {
			t.Errorf("accepted %s as %+v", body, e)
		}
	})
}
