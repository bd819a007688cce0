package tests

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestProgramSwitched switches the port program off and on again, on one host and on
// both, while containers talk on one host and across, bridged and routed.
func TestProgramSwitched(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 2, nil)
	install(t, lab, pluginDir(t, "", "test"))
	a, b := lab.Hosts[0], lab.Hosts[1]
	createNetwork(t, lab, "app", 32)
	createNetwork(t, lab, "routed", 33, "-o", "mode=routed", "--gateway", "10.33.0.1")
	var probes []*hosts.Probe
	for _, network := range []string{"app", "routed"} {
		from := run(t, a, network+"1", "--network", network)
		for j, h := range lab.Hosts {
			to := run(t, h, fmt.Sprintf("%s%d", network, 2+j), "--network", network)
			address := addressOf(t, to, network)
			reach(t, from, address.String())
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			p, err := hosts.StartProbe(ctx, from, to, address)
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			probes = append(probes, p)
		}
	}
	set := func(h *hosts.Host, value string) {
		docker(t, h, "plugin", "disable", "-f", hosts.PluginName)
		docker(t, h, "plugin", "set", hosts.PluginName, "WEFT_PROGRAM="+value)
		docker(t, h, "plugin", "enable", hosts.PluginName)
		clean(t, h)
		filters, err := h.Exec(t.Context(), "sh", "-c", "cd /sys/class/net; for d in weftv* eth0; do tc filter show dev $d ingress; tc filter show dev $d egress; done; ls /sys/fs/bpf")
		if err != nil {
			t.Fatal(err)
		}
		if on := strings.Contains(filters, "weft"); on != (value == "auto") {
			t.Errorf("host %s, WEFT_PROGRAM=%s: filters and maps are %q", h.Name, value, filters)
		}
		if got := view[statusView](t, h, "status").Program; (got == "on") != (value == "auto") {
			t.Errorf("host %s, WEFT_PROGRAM=%s: weft status says %q", h.Name, value, got)
		}
	}
	switched := 0
	for _, step := range []struct {
		host  *hosts.Host
		value string
	}{{a, "off"}, {b, "off"}, {a, "auto"}, {b, "auto"}} {
		set(step.host, step.value)
		switched++
		pause(t, time.Second)
	}
	var sent, lost uint64
	for _, p := range probes {
		r, _ := p.Stop() // what it says is in r.Err
		// The kernel stops a link for some ten milliseconds when it gets or loses its
		// place for filters (qdisc_graft), which is once for a host.
		if r.TCPErr != nil || r.TCPReceived != r.TCPSent || r.Lost > r.Sent/100 {
			t.Errorf("%v: %v", r.Err(), r)
		}
		sent, lost = sent+r.Sent, lost+r.Lost
	}
	figure(t, "port program switched while flows run", switched, "%d of %d packets lost, TCP unbroken", lost, sent)
}
