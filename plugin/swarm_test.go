package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/weftnet/weft/driver"
	"github.com/weftnet/weft/store"
)

// recordedSwarm is what one engine and the plugin on its leader answered: hosts a
// (the leader) and b are well, on c the plugin is disabled.
func recordedSwarm(t *testing.T, engine string) swarmView {
	t.Helper()
	archive, err := txtar.ParseFile("testdata/swarm-" + engine + ".txtar")
	if err != nil {
		t.Fatal(err)
	}
	v := swarmView{plugin: "weft:latest"}
	var networks []dockerNetwork
	into := map[string]any{"admin/v1/status": &v.status, "admin/v1/peers": &v.peers,
		"docker/info": &v.info, "docker/nodes": &v.nodes, "docker/services": &v.services, "docker/networks": &networks}
	for _, f := range archive.Files {
		if to, ok := into[f.Name]; ok {
			if err := json.Unmarshal(f.Data, to); err != nil {
				t.Fatalf("%s: %v", f.Name, err)
			}
		}
	}
	for _, n := range networks {
		if n.Driver == v.plugin {
			v.networks = append(v.networks, n)
		}
	}
	if len(v.nodes) != 3 || len(v.services) < 4 || len(v.networks) != 3 || len(v.peers) != 2 {
		t.Fatalf("%d nodes, %d services, %d networks, %d peers are recorded", len(v.nodes), len(v.services), len(v.networks), len(v.peers))
	}
	v.sort()
	v.status.Lent = true
	// What the recording itself shows is looked at by TestCommands.
	v.services = nil
	for i, n := range v.nodes {
		if n.Description.Hostname == "c" {
			v.nodes[i].Description.Engine.Plugins = v.nodes[0].Description.Engine.Plugins
		}
	}
	for i := range v.peers {
		v.peers[i].Alive = true
	}
	return v
}

const (
	toGlobal = "docker plugin disable -f weft:latest && docker plugin set weft:latest WEFT_SCOPE=global && docker plugin enable weft:latest"
	toLocal  = "docker plugin disable -f weft:latest && docker plugin set weft:latest WEFT_SCOPE=local && docker plugin enable weft:latest"
	lend     = "docker plugin disable -f weft:latest && docker plugin set weft:latest docker.source=/var/run/docker.sock && docker plugin enable weft:latest (who can use that socket is root on the host); or use dnsrr for all services"
)

func TestSwarmProblems(t *testing.T) {
	only := func(v *swarmView, n dockerNetwork) { v.networks = []dockerNetwork{n} }
	swarmNet := func(from string, allocated bool) dockerNetwork {
		n := dockerNetwork{ID: "n", Name: "net", Driver: "weft:latest", Scope: "swarm", Options: map[string]string{"mtu": "1400"}}
		n.ConfigFrom.Network = from
		if allocated {
			n.Options[driver.OptKey] = "00"
		}
		return n
	}
	local := func(v *swarmView) {
		v.status.Scope = scopeLocal
		for i := range v.peers {
			v.peers[i].Scope = scopeLocal
		}
	}
	outside := func(v *swarmView, version string) {
		v.info.Swarm.LocalNodeState, v.info.Swarm.ControlAvailable, v.info.ServerVersion = "inactive", false, version
		v.nodes, v.networks = nil, nil
	}
	for _, c := range []struct {
		name   string
		change func(*swarmView)
		want   []string // "! " a problem, "note: " advice, then the remedy
	}{
		{"all is well", func(*swarmView) {}, nil},
		{"local, no network", func(v *swarmView) { local(v); v.networks = nil },
			[]string{"note: scope is local in a Swarm: docker network create -d weft:latest makes networks of this host only, which services cannot use", "for networks of the whole Swarm, on every host: " + toGlobal + "; or keep it and use --config-from (README, Swarm)"}},
		{"local with config-from", func(v *swarmView) { local(v); only(v, swarmNet("cfg", false)) }, nil},
		{"local without config-from", func(v *swarmView) { local(v); only(v, swarmNet("", false)) },
			[]string{"! network net was created with --scope swarm, but without --config-from: under scope local its subnet and options get lost, and hosts give out the same addresses", "remove it and create it with --config-from (README, Swarm), or under WEFT_SCOPE=global"}},
		{"the leader's dockerd keeps to global", func(v *swarmView) { local(v); only(v, swarmNet("cfg", true)) },
			[]string{"! the Swarm's leader keeps to scope global from before: network net has --config-from, but was given to Weft, and its tasks are rejected", "restart dockerd on the managers, one after the other; then create the network and its services again"}},
		{"made under global, now local", func(v *swarmView) { local(v); only(v, swarmNet("", true)) },
			[]string{"! network net was created under scope global, but scope is local now", "on every host: " + toGlobal + "; or remove it and create it with --config-from"}},
		{"global with config-from", func(v *swarmView) { only(v, swarmNet("cfg", true)) },
			[]string{"! network net takes its configuration from cfg, which cannot be under scope global: its tasks are rejected", "create it without --config-from; or on every host: " + toLocal + ", and restart dockerd on the managers"}},
		{"global, not allocated yet", func(v *swarmView) { only(v, swarmNet("", false)) },
			[]string{"! network net waits for Weft on the Swarm's leader, a", "enable the plugin there with WEFT_SCOPE=global; Docker asks it again"}},
		{"not allocated", func(v *swarmView) { v.waiting = []dockerNetwork{{ID: "n", Name: "net"}} },
			[]string{"note: network net is not allocated by the Swarm's leader, a", "if it is Weft's, weft status there says why; the plugin must be enabled there with WEFT_SCOPE=global"}},
		{"not allocated, and the plugin says why", func(v *swarmView) {
			v.waiting = []dockerNetwork{{ID: "n", Name: "net"}}
			v.status.Problems = []problem{{Text: "option vni: 0", Network: "n"}}
		}, nil},
		{"global outside, old engine", func(v *swarmView) { outside(v, "20.10.24+dfsg1") },
			[]string{"! scope is global, but Docker is in no Swarm: engines as old as this one (20.10.24+dfsg1) refuse to create networks then", "docker swarm init or join; or on this host: " + toLocal}},
		{"global outside, new engine", func(v *swarmView) { outside(v, "library-import") },
			[]string{"note: scope is global, but Docker is in no Swarm: networks are this host's only", "docker swarm init or join; or on this host: " + toLocal}},
		{"local outside", func(v *swarmView) { local(v); outside(v, "29.0.0") }, nil},
		{"locked", func(v *swarmView) { outside(v, "29.0.0"); v.info.Swarm.LocalNodeState = "locked" },
			[]string{"! Docker's Swarm is locked: managers do not work", "docker swarm unlock"}},
		{"error", func(v *swarmView) {
			outside(v, "29.0.0")
			v.info.Swarm.LocalNodeState, v.info.Swarm.Error = "error", "certificate expired"
		}, []string{"! Docker's Swarm is in state error: certificate expired", "docker info, and dockerd's log"}},
		{"host without the plugin", func(v *swarmView) { v.nodes[2].Description.Engine.Plugins = nil },
			[]string{"! hosts of the Swarm without the plugin weft:latest: c; they get no tasks on its networks", "create and enable it there under the same name"}},
		{"host without the plugin, networks of single hosts", func(v *swarmView) {
			local(v)
			v.networks, v.nodes[2].Description.Engine.Plugins = nil, nil
			v.info.Swarm.LocalNodeState = "inactive"
		}, nil},
		{"host that is down", func(v *swarmView) {
			v.nodes[2].Description.Engine.Plugins = nil
			v.nodes[2].Status.State = "down"
		}, nil},
		{"host that was never heard", func(v *swarmView) {
			v.peers = v.peers[:1]
			v.peers[0].Name = "b"
			v.peers[0].Address = store.Host{}.Address
		},
			[]string{"! hosts of the Swarm that have the plugin, but were never heard: c (192.0.2.12)", "set the same WEFT_PORT, WEFT_DATA_PORT and WEFT_KEY on all hosts, and open the ports between them"}},
		{"other scope, port and version", func(v *swarmView) {
			p := &v.peers[0]
			p.Name, p.Scope, p.DataPort, p.VXLAN, p.Version = "b", scopeLocal, 4000, true, "0.9"
			v.status.Host.Version, v.peers[1].Version = "1.0", "1.0"
		}, []string{"! WEFT_DATA_PORT differs: b has 4000, this host 4797; no VXLAN passes between them", "set the same on all hosts; behind one NAT, where each needs its own, share encrypted networks",
			"! WEFT_SCOPE differs: b has local, this host global", "set the same on all hosts: " + toGlobal,
			"note: the plugin's version differs: b has 0.9, this host 1.0", "docker plugin upgrade, one host after the other"}},
		{"another port, and no network needs VXLAN", func(v *swarmView) { v.peers[0].DataPort, v.peers[0].VXLAN = 4807, false }, nil},
		{"a silent host's settings are old news", func(v *swarmView) { v.peers[0].Alive, v.peers[0].Version = false, "0.9" }, nil},
		{"a manager that may not ask Docker", func(v *swarmView) { v.status.Lent = false },
			[]string{"note: this manager's plugin may not ask Docker: while this host leads the Swarm, nobody answers virtual addresses of new services, and the log does not name them", lend}},
		{"the leader may not ask Docker, an earlier one might", func(v *swarmView) {
			v.status.Lent, v.status.Answered = false, []netip.Addr{netip.MustParseAddr("10.90.0.9")}
		}, []string{"! this host leads the Swarm, but its plugin may not ask Docker: hosts answer virtual addresses of services by what an earlier leader told them, and learn of no new task", lend}},
		{"a worker need not ask Docker", func(v *swarmView) { v.status.Lent, v.info.Swarm.ControlAvailable, v.nodes = false, false, nil }, nil},
		{"no network of Swarm, and Docker may not be asked", func(v *swarmView) { v.status.Lent, v.networks = false, nil }, nil},
		{"a version that does not tell its scope", func(v *swarmView) { v.peers[0].Scope = "" }, nil},
	} {
		for _, engine := range []string{"debian", "newest"} {
			t.Run(c.name+"/"+engine, func(t *testing.T) {
				v := recordedSwarm(t, engine)
				c.change(&v)
				var got []string
				for _, p := range v.problems() {
					mark := "! "
					if p.Advice {
						mark = "note: "
					}
					got = append(got, mark+p.Text, p.Remedy)
				}
				if diff := cmp.Diff(c.want, got); diff != "" {
					t.Errorf("-want +got\n%s", diff)
				}
			})
		}
	}
}

func TestManyServicesAreCounted(t *testing.T) {
	v := recordedSwarm(t, "newest")
	for i := range mostNamed + 3 {
		var s dockerService
		s.Spec.Name = fmt.Sprint("s", i)
		s.Endpoint.VirtualIPs = []struct{ NetworkID, Addr string }{{v.networks[0].ID, fmt.Sprintf("10.90.0.%d/24", 9+i)}}
		if i == 0 {
			s.Endpoint.VirtualIPs[0].Addr = "" // of --config-from
		}
		v.services = append(v.services, s)
	}
	got := v.problems()
	if last := got[len(got)-1].Text; len(got) != mostNamed+1 || last != "2 more services have a virtual address that nobody answers" {
		t.Errorf("%d problems, the last is %q", len(got), last)
	}
}

// TestStatusWithoutDocker: dockerd accepts connections, but answers nothing, as
// while it starts.
func TestStatusWithoutDocker(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/well.txtar")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "mute")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	t.Setenv("WEFT_SOCKET", serveFiles(t, archive, "admin"))
	t.Setenv("DOCKER_HOST", "unix://"+socket)
	var out bytes.Buffer
	start := time.Now()
	status := dispatch(t.Context(), []string{"weft", "status"}, &out, &out)
	t.Logf("weft status beside a mute Docker: %v", time.Since(start).Round(time.Millisecond))
	for _, part := range []string{"weft is well\n", "  note: Docker did not answer within 2s: whether Swarm and Weft fit was not looked at\n", "networks   2, with 1 endpoints"} {
		if !strings.Contains(out.String(), part) {
			t.Errorf("%q is not in\n%s", part, &out)
		}
	}
	if status != exitFine {
		t.Errorf("status %d", status)
	}
}
