package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestInstall drives the built plugin as a user does, on either engine: install,
// networks with every option, containers across hosts, published ports, refusals.
func TestInstall(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lab := newLab(t, 2, func(_ int, o *hosts.HostOptions) { o.Engine = engine })
			dir, start := pluginDir(t, "", "test"), time.Now()
			for _, h := range lab.Hosts {
				if err := h.InstallPlugin(t.Context(), dir); err != nil {
					t.Fatal(err)
				}
			}
			took := time.Since(start) / 2
			figure(t, "install on "+name, 2, "%s from plugin create to enabled", took.Round(time.Millisecond))

			step := func(name string, f func(*testing.T, *hosts.Lab)) {
				if !t.Failed() { // later steps use what earlier ones left
					t.Run(name, func(t *testing.T) { f(t, lab) })
				}
			}
			step("privileges", leastPrivilege)
			step("command", installsCommand)
			step("settings", settings)
			step("every option", everyOption)
			step("across hosts", acrossHosts)
			step("frames", frames)
			step("endpoint options", endpointOptions)
			step("while running", connectWhileRunning)
			step("published", published)
			step("internal", internalNetwork)
			step("isolation", isolation)
			step("own IPAM", ownIPAM)
			step("config-from", configFrom)
			step("Compose", composed)
			step("refusals", refusals)
			for _, h := range lab.Hosts {
				removeOthers(t, h)
				docker(t, h, "network", "prune", "--force")
				clean(t, h)
				if left := ourLinks(t, h); left != "" {
					t.Errorf("host %s: links are left without networks: %s", h.Name, left)
				}
			}
		})
	}
}

// ourLinks returns the names of Weft's links on the host.
func ourLinks(t *testing.T, h *hosts.Host) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "ip", "-o", "link", "show")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], "weft") {
			found = append(found, strings.TrimSuffix(f[1], ":"))
		}
	}
	return strings.Join(found, " ")
}

// leastPrivilege reads what the running process may do and where it listens.
func leastPrivilege(t *testing.T, lab *hosts.Lab) {
	const netAdmin, netRaw, bindService, bpf = 1 << 12, 1 << 13, 1 << 10, 1 << 39
	want := fmt.Sprintf("%016x", netAdmin|netRaw|bindService|bpf)
	for _, h := range lab.Hosts {
		pid, err := h.PluginPID(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil || len(files) == 0 {
			t.Fatalf("threads of the plugin: %v %v", files, err)
		}
		for _, file := range files {
			status := fields(t, file)
			for key, value := range map[string]string{"CapEff": want, "CapPrm": want, "CapBnd": want,
				"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1"} {
				if status[key] != value {
					t.Errorf("host %s: %s has %s %s, want %s", h.Name, file, key, status[key], value)
				}
			}
		}
		dir, err := h.SocketDir(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, socket := range []string{"weft.sock", "weft-admin.sock"} {
			st, err := os.Stat(filepath.Join(dir, socket))
			if err != nil {
				t.Fatal(err)
			}
			if got := st.Mode(); got != os.ModeSocket|0o600 {
				t.Errorf("host %s: %s has mode %v, want a socket for root alone", h.Name, socket, got)
			}
		}
		state, err := h.StateDir(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"weft.db", "host.key"} {
			if st, err := os.Stat(filepath.Join(state, name)); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("host %s: %s is not a file for root alone: %v %v", h.Name, name, st, err)
			}
		}
		if ports := listening(t, h); ports != "" {
			t.Errorf("host %s: without WEFT_JOIN the plugin listens on %s", h.Name, ports)
		}
	}
	figure(t, "capabilities kept", 2, "CAP_NET_ADMIN, CAP_NET_RAW, CAP_NET_BIND_SERVICE, CAP_BPF; nothing listens without WEFT_JOIN")
}

// fields reads a file of "key: value" lines.
func fields(t *testing.T, file string) map[string]string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(line, ":")
		out[key] = strings.TrimSpace(value)
	}
	return out
}

// listening returns the TCP and UDP sockets of the host that any process waits on.
func listening(t *testing.T, h *hosts.Host) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "ss", "-H", "-l", "-n", "-t", "-u")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 4 {
			found = append(found, f[0]+" "+f[4])
		}
	}
	return strings.Join(found, ", ")
}

// settings joins the hosts to each other by docker plugin set, which needs a
// disabled plugin, and sees a wrong value refused with its name.
func settings(t *testing.T, lab *hosts.Lab) {
	join := fmt.Sprintf("WEFT_JOIN=%s,%s", lab.Hosts[0].Address, lab.Hosts[1].Address)
	for _, h := range lab.Hosts {
		docker(t, h, "plugin", "disable", hosts.PluginName)
		docker(t, h, "plugin", "set", hosts.PluginName, join, "WEFT_PORT=http")
		docker(t, h, "plugin", "enable", hosts.PluginName)
		refused(t, h, []string{"WEFT_PORT", "http"}, "network", "create", "-d", hosts.PluginName, "--subnet", "10.99.0.0/24", "never")
		docker(t, h, "plugin", "disable", hosts.PluginName)
		docker(t, h, "plugin", "set", hosts.PluginName, "WEFT_PORT=4796")
		docker(t, h, "plugin", "enable", hosts.PluginName)
	}
	start := time.Now()
	for _, h := range lab.Hosts {
		meets(t, h, len(lab.Hosts)-1)
	}
	figure(t, "hosts meet", 1, "%s after enable", time.Since(start).Round(time.Millisecond))
}

// installsCommand does what the README says, into folders of the test's.
func installsCommand(t *testing.T, lab *hosts.Lab) {
	h, dir := lab.Hosts[0], t.TempDir()
	const script = `"$(docker info -f '{{.DockerRootDir}}')/plugins/$(docker plugin inspect -f '{{.ID}}' weft:latest)/rootfs/bin/weft" install --bin-dir "$0" --cli-plugin-dir "$0/cli-plugins"`
	if out, err := h.Exec(t.Context(), "sh", "-c", script, dir); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, command := range [][]string{{filepath.Join(dir, "weft"), "version"}, {"docker", "--config", dir, "weft", "version"}} {
		if out, err := h.Exec(t.Context(), command...); err != nil || strings.Count(out, "test") != 2 {
			t.Errorf("%v: %v\n%s; want the versions of command and plugin", command, err, out)
		}
	}
}

// meets waits until the host knows n living peers and has read their records.
func meets(t *testing.T, h *hosts.Host, n int) {
	t.Helper()
	var peers []peerView
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); pause(t, 100*time.Millisecond) {
		peers = view[[]peerView](t, h, "peers")
		alive := 0
		for _, p := range peers {
			if p.Alive && p.InSync {
				alive++
			}
		}
		if alive == n {
			return
		}
	}
	t.Fatalf("host %s does not know %d living peers: %+v", h.Name, n, peers)
}

// everyOption makes networks with each option that Docker has, and compares what
// Docker and Weft then say of them.
func everyOption(t *testing.T, lab *hosts.Lab) {
	h := lab.Hosts[0]
	docker(t, h, "network", "create", "-d", hosts.PluginName,
		"--subnet", "10.40.0.0/16", "--gateway", "10.40.0.254", "--ip-range", "10.40.8.0/24", "--aux-address", "printer=10.40.8.3",
		"--ipv6", "--subnet", "fd00:40::/64", "--gateway", "fd00:40::fe", "--internal", "--attachable", "--label", "team=red",
		"-o", "mtu=1400", "-o", "vni=5040", "-o", "ifname=lan", "all")
	format := `{{.Driver}} {{.Scope}} ipv6={{.EnableIPv6}} internal={{.Internal}} attachable={{.Attachable}} {{json .Labels}} {{json .Options}}` +
		`{{range .IPAM.Config}} [{{.Subnet}} {{.Gateway}} {{.IPRange}} {{len .AuxAddress}}]{{end}}`
	// Newer clients print a range that is not set so.
	got := strings.ReplaceAll(docker(t, h, "network", "inspect", "--format", format, "all"), "invalid Prefix", "")
	want := `weft:latest local ipv6=true internal=true attachable=true {"team":"red"} {"ifname":"lan","mtu":"1400","vni":"5040"}` +
		` [10.40.0.0/16 10.40.0.254 10.40.8.0/24 1] [fd00:40::/64 fd00:40::fe  0]`
	if got != want {
		t.Errorf("docker network inspect:\n got %s\nwant %s", got, want)
	}
	n := networkOf(t, h, "all")
	if n.VNI != 5040 || n.EffectiveMTU != 1400 || !n.Internal || len(n.Subnets) != 2 ||
		n.Subnets[0].Pool != "10.40.0.0/16" || n.Subnets[0].Gateway != "10.40.0.254" || n.Subnets[0].Aux["printer"] != "10.40.8.3/16" || n.Subnets[1].Gateway != "fd00:40::fe" {
		t.Errorf("weft networks: %+v", n)
	}
	c := run(t, h, "all1", "--network", "all")
	if a := addressOf(t, c, "all").String(); !strings.HasPrefix(a, "10.40.8.") || a == "10.40.8.3" {
		t.Errorf("the container got %s, which is outside of the range or the auxiliary address", a)
	}
	if out := command(t, c, "ip", "-o", "link", "show"); !strings.Contains(out, " lan0") || !strings.Contains(out, "mtu 1400") || strings.Contains(out, " eth") {
		t.Errorf("the container's links are not lan0 with mtu 1400 alone: %s", out)
	}

	// Docker's own names for the same.
	docker(t, h, "network", "create", "-d", hosts.PluginName, "--subnet", "10.41.0.0/24",
		"-o", "com.docker.network.driver.mtu=1300", "-o", "com.docker.network.driver.overlay.vxlanid_list=5041",
		"-o", "com.docker.network.container_iface_prefix=net", "named")
	if n := networkOf(t, h, "named"); n.VNI != 5041 || n.EffectiveMTU != 1300 {
		t.Errorf("weft networks: %+v", n)
	}
	docker(t, h, "rm", "--force", "all1")
	docker(t, h, "network", "rm", "all", "named")
}

// interfaceOf returns the name of the container's link that has the address.
func interfaceOf(t *testing.T, c hosts.Container, address string) string {
	t.Helper()
	for line := range strings.Lines(command(t, c, "ip", "-o", "address", "show")) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[3], address+"/") {
			return f[1]
		}
	}
	t.Fatalf("container %s has no link with %s", c.Name, address)
	return ""
}

// mtuOf returns the MTU of a container's link.
func mtuOf(t *testing.T, c hosts.Container, link string) int {
	t.Helper()
	n, err := strconv.Atoi(command(t, c, "cat", "/sys/class/net/"+link+"/mtu"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
