package main

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

// servedSwarm is a Swarm with one network and services on it, each with that address.
func servedSwarm(address string, services ...string) *swarmView {
	v := &swarmView{networks: []dockerNetwork{{ID: "n", Name: "app", Options: map[string]string{driver.OptVNI: "4096", driver.OptKey: "00"}}}}
	for i, name := range services {
		var s dockerService
		s.ID, s.Spec.Name = "id-of-"+name, name
		s.CreatedAt = time.Date(2026, 11, 26, 12, i, 0, 0, time.UTC)
		s.Endpoint.VirtualIPs = []struct{ NetworkID, Addr string }{{"n", address}}
		v.services = append(v.services, s)
	}
	return v
}

func taskOf(service, address, state, desired string, index uint64) (t dockerTask) {
	t.ServiceID, t.Status.State, t.DesiredState, t.Version.Index = "id-of-"+service, state, desired, index
	t.NetworksAttachments = slices.Grow(t.NetworksAttachments, 1)[:1]
	t.NetworksAttachments[0].Network.ID, t.NetworksAttachments[0].Addresses = "n", []string{address + "/24"}
	return t
}

// Only tasks that run and are to run answer for a virtual address. Docker lets one with a
// health check run ("running") when it is healthy for the first time, and ends one that is
// no longer.
func TestHealthyTasksAreOffered(t *testing.T) {
	v := servedSwarm("10.1.0.9/24", "web")
	for _, c := range []struct {
		state, desired string
		offered        bool
	}{{"running", "running", true}, {"starting", "running", false}, {"preparing", "running", false}, {"ready", "ready", false},
		{"running", "shutdown", false}, {"failed", "shutdown", false}, {"failed", "running", false}, {"complete", "shutdown", false}, {"rejected", "shutdown", false}} {
		all := v.offered("self", []dockerTask{taskOf("web", "10.1.0.2", "running", "running", 1), taskOf("web", "10.1.0.3", c.state, c.desired, 2)})
		if len(all) != 1 || slices.Contains(all[0].Backends, netip.MustParseAddr("10.1.0.3")) != c.offered || !slices.Contains(all[0].Backends, netip.MustParseAddr("10.1.0.2")) {
			t.Errorf("a task that is %s and should be %s: offered are %+v", c.state, c.desired, all)
		}
	}
}

// Of two services with one address the older has it, whatever changes last.
func TestOneAddressOfTwoServicesIsTheOlders(t *testing.T) {
	v := servedSwarm("10.1.0.9/24", "web", "api")
	for _, newest := range []string{"web", "api"} {
		index := map[string]uint64{"web": 10, "api": 10}
		index[newest] = 20
		all := v.offered("self", []dockerTask{taskOf("web", "10.1.0.2", "running", "running", index["web"]), taskOf("api", "10.1.0.3", "running", "running", index["api"])})
		if len(all) != 1 || all[0].Name != "web" || !slices.Equal(all[0].Backends, []netip.Addr{netip.MustParseAddr("10.1.0.2")}) {
			t.Errorf("after a change of %s the address is that of %+v, want web alone", newest, all)
		}
		slices.Reverse(v.services)
	}
	// Others have their own: another address, and the same one of another network.
	v.services[1].Endpoint.VirtualIPs[0].Addr = "10.1.0.10/24"
	v.networks = append(v.networks, dockerNetwork{ID: "m", Options: map[string]string{driver.OptVNI: "4097", driver.OptKey: "01"}})
	v.services = append(v.services, servedSwarm("10.1.0.10/24", "db").services...)
	v.services[2].Endpoint.VirtualIPs[0].NetworkID = "m"
	if all := v.offered("self", nil); len(all) != 3 {
		t.Errorf("services with an address of their own: %+v", all)
	}
}

func TestOneAddressOfTwoServicesIsTold(t *testing.T) {
	v := servedSwarm("10.1.0.9/24", "web", "api")
	v.status.Program, v.status.Answered = "on", []netip.Addr{netip.MustParseAddr("10.1.0.9")}
	said := func() (text string) {
		for _, p := range v.problems() {
			text += fmt.Sprintln(p.Text) + fmt.Sprintln(p.Remedy)
		}
		return text
	}
	want := "services web, api have one virtual address, 10.1.0.9 on network app: it leads to web alone, the oldest; tasks.NAME resolves to the tasks of each\n" +
		"docker service update --endpoint-mode dnsrr web && docker service update --endpoint-mode dnsrr api; and back with --endpoint-mode vip\n"
	for range 2 {
		if got := said(); !strings.HasSuffix(got, want) {
			t.Errorf("%q does not end with %q", got, want)
		}
		slices.Reverse(v.services)
	}
	v.services[1].Spec.EndpointSpec.Ports = []dockerPort{{Protocol: "tcp", TargetPort: 80, PublishedPort: 8080, PublishMode: "ingress"}}
	if got := said(); !strings.Contains(got, "remove them all and create them again") {
		t.Errorf("with ports for which Docker refuses another mode: %q", got)
	}
	v.services[1].Endpoint.VirtualIPs[0].Addr = "10.1.0.10/24"
	v.status.Answered = append(v.status.Answered, netip.MustParseAddr("10.1.0.10"))
	if got := said(); strings.Contains(got, "one virtual address") {
		t.Errorf("with an address each: %q", got)
	}
}

func TestManyTasksAreTold(t *testing.T) {
	db, err := store.Open(filepath.Join(t.TempDir(), "weft.db"), store.Host{ID: "self"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	n := store.Network{ID: "n", VNI: 4096, Mode: store.ModeVXLAN, Key: make([]byte, 32)}
	service := func(last byte, tasks int) store.Service {
		s := store.Service{VNI: 4096, VIP: netip.AddrFrom4([4]byte{10, 9, 255, last}), Name: fmt.Sprint("with", tasks), Proof: n.Proof("self")}
		for i := range tasks {
			s.Backends = append(s.Backends, netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}))
		}
		return s
	}
	var got []string
	if err := db.Update(t.Context(), func(tx *store.Tx) error {
		err := tx.PutServices("self", true, []store.Service{service(1, dataplane.MaxBackends), service(2, dataplane.MaxBackends+1)})
		if err == nil {
			_, got, err = served(tx, n)
		}
		return err
	}); err != nil || !slices.Equal(got, []string{"with513 (10.9.255.2) has 513"}) {
		t.Errorf("told is %q, %v", got, err)
	}
}
