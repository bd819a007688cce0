package tests

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestDriftIsRepaired changes, behind the plugin's back, each thing that it keeps
// in the kernel, with either backend of iptables.
func TestDriftIsRepaired(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			d := newDrift(t, backend)
			// The rest does not depend on the backend.
			all := backend == "nft" || soak()
			audited := func(*testing.T) {}
			if all {
				audited = d.audited(t)
			}
			t.Run("closed without rules", d.closedWithoutRules)
			t.Run("rules", d.rules)
			t.Run("audit", audited)
			if all {
				t.Run("links", d.links)
				t.Run("entries", d.entries)
				t.Run("program", d.program)
			}
			reach(t, d.one, "10.32.2.10")
			reach(t, d.two, "fd00:32::a")
			for _, h := range d.lab.Hosts {
				clean(t, h)
			}
			d.score(t)
		})
	}
}

// eventLimit is the target for what the kernel tells of. The figure is printed; only
// far more fails the test.
const eventLimit = 2 * time.Second

// drift is a pair of hosts, of which the first is damaged.
type drift struct {
	lab      *hosts.Lab
	h        *hosts.Host
	backend  string
	one, two hosts.Container // on the damaged host and on the other
	net      networkView
	veth     string // host's side of container one
	remote   string // MAC address of container two

	broken  int
	slowest time.Duration
	what    string
}

func newDrift(t *testing.T, backend string) *drift {
	d := &drift{backend: backend}
	d.lab = newLab(t, 2, func(_ int, o *hosts.HostOptions) { o.IPTables = backend })
	d.h = d.lab.Hosts[0]
	install(t, d.lab, pluginDir(t, "", "test"))
	createNetwork(t, d.lab, "app", 32, "--ipv6", "--subnet", "fd00:32::/64")
	d.one = run(t, d.h, "one", "--network", "app", "--ip", "10.32.1.10", "--ip6", "fd00:32::a")
	d.two = run(t, d.lab.Hosts[1], "two", "--network", "app", "--ip", "10.32.2.10", "--ip6", "fd00:32::b")
	reach(t, d.one, "10.32.2.10")
	d.net = networkOf(t, d.h, "app")
	for _, e := range view[[]endpointView](t, d.h, "endpoints") {
		if e.Local {
			d.veth = e.Link
		} else {
			d.remote = e.MAC
		}
	}
	if got := view[statusView](t, d.h, "status").IPTables; got != backend {
		t.Fatalf("weft status: iptables %s, want %s as Docker", got, backend)
	}
	// The checksum probe and the first audits are over.
	clean(t, d.h)
	return d
}

func (d *drift) score(t *testing.T) {
	figure(t, "K1 K4 drift repaired, "+d.backend, d.broken, "slowest %s (%s); target 2 s", d.slowest.Round(10*time.Millisecond), d.what)
}

const everyPart = "rules rules6 sets entries links sysctls program"

// kept lists what the plugin keeps on the host, and what a repair must bring back.
func (d *drift) kept(ctx context.Context, parts string) (string, error) {
	return d.keptOn(ctx, d.h, parts)
}

func (d *drift) keptOn(ctx context.Context, h *hosts.Host, parts string) (string, error) {
	return kept(ctx, h, d.backend, d.net.Bridge, parts)
}

// repairs runs commands that damage parts of what is kept, waits until all is as
// before, and looks that the log says so once per command at most.
func (d *drift) repairs(t *testing.T, parts string, commands ...string) {
	t.Helper()
	what := strings.Join(commands, "; ")
	before, err := d.kept(t.Context(), parts)
	if err != nil {
		t.Fatal(err)
	}
	said := d.said(t)
	for _, c := range commands {
		if out, err := d.h.Exec(t.Context(), "sh", "-c", c); err != nil {
			t.Fatalf("%s: %v %s", c, err, out)
		}
	}
	start := time.Now()
	var now string
	for {
		if now, err = d.kept(t.Context(), parts); err == nil && now == before {
			break
		}
		if time.Since(start) > eventLimit+10*time.Second {
			t.Fatalf("%s: not repaired: %v\n%s", what, err, difference(before, now))
		}
		pause(t, 50*time.Millisecond)
	}
	took := time.Since(start)
	d.count(took, what)
	// The line comes by way of dockerd, a moment later.
	for deadline := time.Now().Add(2 * time.Second); d.said(t) == said && time.Now().Before(deadline); {
		pause(t, 20*time.Millisecond)
	}
	// One look may fall between the families, or while a map is cleared.
	most := max(len(commands), strings.Count(parts, "rules"), 4*strings.Count(parts, "program"))
	if n := d.said(t) - said; n < 1 || n > most {
		t.Errorf("%s: the log tells of %d repairs, want 1:\n%s", what, n, logEnd(d.h, 5))
	}
}

func (d *drift) count(took time.Duration, what string) {
	d.broken++
	if took > d.slowest {
		d.slowest, d.what = took, what
	}
}

// said counts the repairs that the log tells of. One that met the damage half done
// says that it fails, and then that all is well again.
func (d *drift) said(t *testing.T) int {
	t.Helper()
	raw, err := os.ReadFile(d.h.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(raw), "kernel repaired") + strings.Count(string(raw), "kernel matches the records again")
}

// rules flushes each chain, deletes each single rule and each jump, and flushes
// everything.
func (d *drift) rules(t *testing.T) {
	tool := map[bool]string{false: "iptables-" + d.backend + " -w", true: "ip6tables-" + d.backend + " -w"}
	for _, v6 := range []bool{false, true} {
		part := map[bool]string{false: "rules", true: "rules6"}[v6]
		for _, table := range []string{"raw", "filter"} {
			ipt := tool[v6] + " -t " + table
			rules, err := d.h.Exec(t.Context(), "sh", "-c", ipt+" -S")
			if err != nil {
				t.Fatal(err)
			}
			number := map[string]int{}
			for line := range strings.Lines(rules) {
				f := strings.Fields(line)
				if len(f) < 2 {
					continue
				}
				chain := f[1]
				switch {
				case f[0] == "-N" && strings.HasPrefix(chain, "WEFT-"):
					d.repairs(t, part, ipt+" -F "+chain)
				case f[0] == "-A":
					number[chain]++
					// In the short form every other rule; jumps always.
					if strings.HasPrefix(chain, "WEFT-") && (soak() || (number[chain]+d.broken)%2 == 0) || !strings.HasPrefix(chain, "WEFT-") && strings.Contains(line, "-j WEFT-") {
						d.repairs(t, part, fmt.Sprintf("%s -D %s %d", ipt, chain, number[chain]))
					}
				}
			}
		}
		d.overtakes(t, tool[v6])
	}
	d.repairs(t, "rules rules6", tool[false]+" -F", tool[true]+" -F", tool[false]+" -t raw -F", tool[true]+" -t raw -F")
	if d.backend == "nft" {
		// Docker's own rules are gone too, and it needs a restart to make them
		// again: ports are not published until then. Traffic within a network,
		// which is Weft's, needs none.
		d.repairs(t, "rules rules6", "nft flush ruleset")
	}
}

// overtakes puts a rule that would decide first in front of ours.
func (d *drift) overtakes(t *testing.T, tool string) {
	t.Helper()
	const rule = "FORWARD -j ACCEPT"
	if out, err := d.h.Exec(t.Context(), "sh", "-c", tool+" -I "+rule); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	took := eventually(t, eventLimit+10*time.Second, "ours stands first again", func(ctx context.Context) error {
		out, err := d.h.Exec(ctx, "sh", "-c", tool+" -S FORWARD")
		if err == nil && strings.Index(out+"\n", rule+"\n") < strings.Index(out, "-j WEFT-FORWARD") {
			err = errors.New(out)
		}
		return err
	})
	d.count(took, tool+" -I "+rule)
	if out, err := d.h.Exec(t.Context(), "sh", "-c", tool+" -D "+rule); err != nil {
		t.Fatalf("%v %s", err, out)
	}
}

// links deletes, detaches and changes the links.
func (d *drift) links(t *testing.T) {
	vx := strings.Replace(d.net.Bridge, "weftb", "weftx", 1)
	for _, c := range []string{
		"ip link del " + vx,
		"ip link del " + d.net.Bridge,
		"ip link set " + d.veth + " down",
		"ip link set " + d.veth + " nomaster",
		"ip link set " + d.net.Bridge + " down",
		"ip link set " + vx + " down",
		"ip link set " + vx + " nomaster",
		"ip link set " + d.net.Bridge + " mtu 1400",
		"ip link set " + d.net.Bridge + " address 02:00:00:00:00:09",
		"bridge link set dev " + vx + " learning on",
		"bridge link set dev " + vx + " neigh_suppress off",
		"bridge link set dev " + d.veth + " learning on",
		"echo 0 > /proc/sys/net/ipv4/conf/" + d.net.Bridge + "/rp_filter",
	} {
		d.repairs(t, "links entries sysctls", c)
	}
	// The container's link cannot be made anew, but must be plugged in again.
	reach(t, d.one, "10.32.2.10")
	reach(t, d.two, "10.32.1.10")
}

// entries changes, deletes and plants forwarding entries and neighbours.
func (d *drift) entries(t *testing.T) {
	vx := strings.Replace(d.net.Bridge, "weftb", "weftx", 1)
	peer := d.lab.Hosts[1].Address.String()
	for _, c := range []string{
		"bridge fdb replace " + d.remote + " dev " + vx + " dst 192.0.2.99 self permanent",
		"bridge fdb del " + d.remote + " dev " + vx + " self",
		"bridge fdb del " + d.remote + " dev " + vx + " master",
		"bridge fdb del 00:00:00:00:00:00 dev " + vx + " dst " + peer + " self",
		"bridge fdb append 00:00:00:00:00:00 dev " + vx + " dst 192.0.2.99 self permanent",
		"bridge fdb add 02:00:00:00:00:99 dev " + vx + " dst 192.0.2.99 self permanent",
		// A learned entry draws the traffic for a remote container to a local port.
		"bridge fdb replace " + d.remote + " dev " + d.veth + " master dynamic",
		"bridge fdb add 02:00:00:00:00:98 dev " + d.veth + " master static",
		"ip neighbour del 10.32.2.10 dev " + d.net.Bridge,
		"ip neighbour replace 10.32.2.10 dev " + d.net.Bridge + " lladdr 02:00:00:00:00:97 nud permanent",
		"ip neighbour replace 10.32.2.97 dev " + d.net.Bridge + " lladdr 02:00:00:00:00:97 nud permanent",
	} {
		d.repairs(t, "entries", c)
	}
	reach(t, d.one, "10.32.2.10")
}

// program takes the port program off its links, and clears its maps, while containers
// talk both ways: what the program does not know takes the slow path.
func (d *drift) program(t *testing.T) {
	probes := []*hosts.Probe{
		startProbe(t, d.one, d.two, netip.MustParseAddr("10.32.2.10")),
		startProbe(t, d.two, d.one, netip.MustParseAddr("fd00:32::a")),
	}
	before := d.broken
	for _, link := range []string{d.veth, "eth0"} {
		d.repairs(t, "program", "tc filter del dev "+link+" ingress")
		d.repairs(t, "program", "tc qdisc del dev "+link+" clsact")
	}
	const keys = `bpftool -j map dump pinned $m | tr '{' '\n' | sed -n 's/^"key":\[\([^]]*\)\].*/\1/p' | tr -d '"'`
	for _, name := range []string{"ports", "dests", "peers", "counters", "services"} {
		d.repairs(t, "program", "m=$(ls -d /sys/fs/bpf/weft-*/weft_"+name+"); for k in $("+keys+"); do bpftool map delete pinned $m key $(echo $k | tr , ' '); done")
	}
	d.repairs(t, "program", "bpftool map update pinned /sys/fs/bpf/weft-*/weft_settings key 0 0 0 0 value"+strings.Repeat(" 0", 12))
	var sent, lost uint64
	for _, p := range probes {
		r := unbroken(t, p, 4) // two places are taken away, and made again
		sent, lost = sent+r.Sent, lost+r.Lost
	}
	figure(t, "program off its links and maps cleared while flows run, "+d.backend, d.broken-before, "%d of %d packets lost, TCP unbroken", lost, sent)
}

// audited changes on the other host, all at once, what the kernel tells nobody of:
// the slow audit finds it. It returns what waits for that.
func (d *drift) audited(t *testing.T) (wait func(*testing.T)) {
	h := d.lab.Hosts[1]
	const limit = 90 * time.Second
	before, err := d.keptOn(t.Context(), h, everyPart)
	if err != nil {
		t.Fatal(err)
	}
	conf := "/proc/sys/net/%s/conf/" + d.net.Bridge + "/%s"
	damage := []string{
		"ipset flush weft-peers4",
		"ipset add weft-peers6 2001:db8::99",
		"echo 0 > " + fmt.Sprintf(conf, "ipv6", "disable_ipv6"),
		"echo 0 > " + fmt.Sprintf(conf, "ipv4", "arp_ignore"),
	}
	if out, err := h.Exec(t.Context(), "sh", "-c", strings.Join(damage, "\n")); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	start := time.Now()
	done := make(chan error, 1)
	go func() { // other things are damaged meanwhile
		for {
			now, err := d.keptOn(t.Context(), h, everyPart)
			if err == nil && now != before {
				err = errors.New(difference(before, now))
			}
			if err == nil || time.Since(start) > limit+30*time.Second {
				done <- err
				return
			}
			pause(t, time.Second)
		}
	}()
	return func(t *testing.T) {
		if err := <-done; err != nil {
			t.Fatalf("not repaired by the audit: %v", err)
		}
		figure(t, "K1 found by the audit, "+d.backend, len(damage), "%s (target %s)", time.Since(start).Round(time.Second), limit)
	}
}
