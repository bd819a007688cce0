package tests

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestCyclesLeaveNothing makes and removes endpoints, by Docker and straight at
// the plugin's socket, and compares everything that could be left.
func TestCyclesLeaveNothing(t *testing.T) {
	t.Parallel()
	byDocker, bySocket := 20, 300
	if soak() {
		byDocker, bySocket = 2000, 2000
	}
	lab := newLab(t, 1, nil)
	install(t, lab, pluginDir(t, "failpoint", "crash"), clusterKey)
	h := lab.Hosts[0]
	createNetwork(t, lab, "app", 32, "--ipam-driver", hosts.PluginName)
	createNetwork(t, lab, "way", 33, "-o", "mode=routed", "--ipam-driver", hosts.PluginName)
	createNetwork(t, lab, "vault", 34, "-o", "encrypted", "--ipam-driver", hosts.PluginName)
	run(t, h, "stays", "--network", "app")
	kinds := [][]string{{"--network", "app"}, {"--network", "way", "-p", "8080:80"}, {"--network", "vault"}}
	cycle := func(n int) {
		for i := range n {
			docker(t, h, append(append([]string{"run", "--rm"}, kinds[i%len(kinds)]...), hosts.Image, "true")...)
		}
	}
	s := newDirect(t, h, "app")
	// The first ones fill caches and pools of connections.
	cycle(6)
	s.cycles(20)
	clean(t, h)
	before, goroutines, leases := inventory(t, h), metric(t, h, "go_goroutines"), metric(t, h, `weft_leases{state="taken"}`)

	cycle(byDocker)
	started := time.Now()
	s.cycles(bySocket)
	t.Logf("%d cycles at the socket took %s", bySocket, time.Since(started).Round(time.Millisecond))
	clean(t, h)
	unleaked(t, h, before)
	atMost(t, h, "go_goroutines", goroutines+3)
	atMost(t, h, `weft_leases{state="taken"}`, leases)
	figure(t, "create/delete cycles", byDocker+bySocket, "%d by docker run, %d at the socket: links, routes, rules, sets, namespaces, mounts and open files as before; goroutines %.0f before, %.0f after; leases %.0f before, %.0f after",
		byDocker, bySocket, goroutines, metric(t, h, "go_goroutines"), leases, metric(t, h, `weft_leases{state="taken"}`))
}

func atMost(t *testing.T, h *hosts.Host, name string, most float64) {
	t.Helper()
	if now := metric(t, h, name); now > most {
		t.Errorf("host %s: %s is %.0f, more than %.0f", h.Name, name, now, most)
	}
}

// direct calls the plugin as Docker does.
type direct struct {
	t       *testing.T
	host    *hosts.Host
	socket  string
	network string
	pool    string
	next    int
}

// newDirect returns a direct caller for a network with Weft's IPAM.
func newDirect(t *testing.T, h *hosts.Host, network string) *direct {
	d := &direct{t: t, host: h, network: docker(t, h, "network", "inspect", "--format", "{{.Id}}", network)}
	raw, err := ask(t.Context(), h, "weft-admin.sock", http.MethodGet, "/v1/ipam", nil)
	if err != nil {
		t.Fatal(err)
	}
	var pools []struct {
		ID     string       `json:"id"`
		Prefix netip.Prefix `json:"prefix"`
	}
	if err := json.Unmarshal(raw, &pools); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	subnet := docker(t, h, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Subnet}}", network)
	for _, p := range pools {
		if p.Prefix.String() == subnet {
			d.pool = p.ID
		}
	}
	if d.pool == "" {
		t.Fatalf("no pool %s: %s", subnet, raw)
	}
	pid, err := h.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	d.socket = fmt.Sprintf("/proc/%d/root/run/docker/plugins/weft.sock", pid)
	return d
}

type object map[string]any

func (d *direct) call(method string, body object) map[string]any {
	d.t.Helper()
	raw, err := askAt(d.t.Context(), d.socket, http.MethodPost, "/"+method, body)
	if err != nil {
		d.t.Fatal(err)
	}
	var reply map[string]any
	if err := json.Unmarshal(raw, &reply); err != nil {
		d.t.Fatal(err)
	}
	if text, _ := reply["Err"].(string); text != "" {
		d.t.Fatalf("%s: %s", method, text)
	}
	return reply
}

// cycles makes an endpoint, joins, leaves and deletes it, n times.
func (d *direct) cycles(n int) {
	d.t.Helper()
	for range n {
		d.next++
		address := d.call("IpamDriver.RequestAddress", object{"PoolID": d.pool})["Address"].(string)
		id := fmt.Sprintf("%064x", d.next)
		ids := object{"NetworkID": d.network, "EndpointID": id}
		d.call("NetworkDriver.CreateEndpoint", object{"NetworkID": d.network, "EndpointID": id, "Interface": object{"Address": address}, "Options": object{}})
		d.call("NetworkDriver.Join", object{"NetworkID": d.network, "EndpointID": id, "SandboxKey": "/var/run/docker/netns/cycle", "Options": object{}})
		d.call("NetworkDriver.Leave", ids)
		d.call("NetworkDriver.DeleteEndpoint", ids)
		plain := address[:len(address)-len("/16")]
		d.call("IpamDriver.ReleaseAddress", object{"PoolID": d.pool, "Address": plain})
	}
}
