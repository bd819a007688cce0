package tests

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// Two cluster keys, of which one is wrong.
const (
	rightKey = "0707070707070707070707070707070707070707070707070707070707070707"
	wrongKey = "0808080808080808080808080808080808080808080808080808080808080808"
)

// TestCluster cuts four hosts in halves and heals them, kills one, moves one to
// another address, and gives one a wrong key.
func TestCluster(t *testing.T) {
	t.Parallel()
	lab := newLab(t, 4, nil)
	install(t, lab, pluginDir(t, "", "test"), "WEFT_KEY="+rightKey)
	createNetwork(t, lab, "app", 32)
	for _, h := range lab.Hosts {
		meets(t, h, len(lab.Hosts)-1)
		// No --subnet and no vni: all hosts find the same.
		docker(t, h, "network", "create", "-d", hosts.PluginName, "--ipam-driver", hosts.PluginName, "--subnet", "10.33.0.0/16", "churn")
	}
	c := &cluster{lab: lab}
	for i, h := range lab.Hosts {
		c.containers = append(c.containers, run(t, h, "fixed", "--network", "app", "--ip", fmt.Sprintf("10.32.%d.10", i+1)))
	}
	for _, from := range c.containers {
		for i := range c.containers {
			reach(t, from, fmt.Sprintf("10.32.%d.10", i+1))
		}
	}
	t.Run("partition", c.partition)
	t.Run("dead peer", c.deadPeer)
	t.Run("address", c.otherAddress)
	t.Run("wrong key", c.wrongKey)
	for _, h := range lab.Hosts {
		clean(t, h)
	}
}

// cluster is four hosts with a container each, 10.32.<number>.10.
type cluster struct {
	lab        *hosts.Lab
	containers []hosts.Container
}

// partition cuts the hosts in halves while containers come and go on all of them.
func (c *cluster) partition(t *testing.T) {
	cut := 10 * time.Second
	if soak() {
		cut = time.Minute
	}
	all := c.lab.Hosts
	var probes []*hosts.Probe
	for i := 0; i < len(all); i += 2 {
		p, err := hosts.StartProbe(t.Context(), c.containers[i], c.containers[i+1], netip.MustParseAddr(fmt.Sprintf("10.32.%d.10", i+2)))
		if err != nil {
			t.Fatal(err)
		}
		probes = append(probes, p)
	}
	churn := startChurn(t, c.lab, "churn")
	if err := c.lab.Underlay.Partition(t.Context(), all[:2], all[2:]); err != nil {
		t.Fatal(err)
	}
	pause(t, cut)
	silent(t, c.containers[0], "10.32.3.10") // it is cut
	const both = "10.32.9.9"
	for _, h := range []*hosts.Host{all[0], all[2]} {
		run(t, h, "both", "--network", "app", "--ip", both)
	}
	if err := c.lab.Underlay.Heal(t.Context(), all...); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	good, bad := churn.stop()
	for _, h := range all {
		removeOthers(t, h, "fixed", "both")
	}
	agreed := c.agree(t, start)
	reach(t, c.containers[0], "10.32.3.10")
	reached := time.Since(start)
	tells(t, all[0], both+" (endpoint ", " on host "+all[2].Name+")", "addresses that two have")
	tells(t, all[2], both+" (endpoint ", " on host "+all[0].Name+")", "addresses that two have")
	for i, used := range map[int]*hosts.Host{1: all[0], 3: all[2]} { // each goes on with the one that it knew
		id := view[statusView](t, used, "status").Host.ID
		tells(t, all[i], both+" (endpoint ", fmt.Sprintf(" on host %s %.12s, which is used, ", used.Name, id))
	}
	docker(t, all[2], "rm", "--force", "both")
	for _, h := range all {
		untold(t, h, "addresses that two have")
	}
	docker(t, all[0], "rm", "--force", "both")
	var sent, lost uint64
	for _, p := range probes {
		r := lossless(t, p)
		sent, lost = sent+r.Sent, lost+r.Lost
	}
	if bad > 0 {
		t.Errorf("%d of %d containers could not start", bad, good+bad)
	}
	figure(t, "M1 half of four hosts cut off for "+cut.String(), 1,
		"inside the halves %d of %d packets lost (target 0); %d containers came and went, %d starts failed; all agree %s after the heal (target 10 s), across after %s",
		lost, sent, good, bad, agreed.Round(100*time.Millisecond), reached.Round(100*time.Millisecond))
}

// agree waits until every host knows the same endpoints and holds them in its
// kernel, and returns how long after start that was.
func (c *cluster) agree(t *testing.T, start time.Time) time.Duration {
	t.Helper()
	eventually(t, 60*time.Second, "all hosts agree", func(ctx context.Context) error {
		first := ""
		for _, h := range c.lab.Hosts {
			var all []string
			for _, e := range view[[]endpointView](t, h, "endpoints") {
				if e.State == "hidden" {
					return fmt.Errorf("host %s hides %+v", h.Name, e)
				}
				all = append(all, fmt.Sprintln(e.VNI, e.ID, e.Host, e.IPv4, e.MAC))
			}
			slices.Sort(all)
			text := strings.Join(all, "")
			if first == "" {
				first = text
			}
			if text != first {
				return errors.New(difference(first, text))
			}
			if out, err := h.Exec(ctx, "weft", "audit", "--docker=false"); err != nil {
				return fmt.Errorf("%w %s", err, out)
			}
		}
		return nil
	})
	return time.Since(start)
}

// deadPeer kills dockerd and plugin of one host. Its containers go on, and so does
// their traffic; the other hosts say that it is silent.
func (c *cluster) deadPeer(t *testing.T) {
	a, d := c.lab.Hosts[0], c.lab.Hosts[3]
	pid, err := d.PluginParent(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.KillDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	eventually(t, time.Minute, "host a sees that d is silent", func(context.Context) error {
		for _, p := range view[[]peerView](t, a, "peers") {
			if p.Name == "d" && !p.Alive {
				return nil
			}
		}
		return errors.New("d is alive")
	})
	figure(t, "M2 a dead host is told", 1, "%s after its end", time.Since(start).Round(100*time.Millisecond))
	tells(t, a, "silent hosts: d")
	reach(t, c.containers[0], "10.32.4.10")
	if err := d.StartDockerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	docker(t, d, "start", "fixed")
	for _, h := range c.lab.Hosts {
		meets(t, h, len(c.lab.Hosts)-1)
	}
	c.agree(t, start)
	reach(t, c.containers[0], "10.32.4.10")
}

// tells waits until weft status names a problem with the words.
func tells(t *testing.T, h *hosts.Host, words ...string) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("weft status on %s tells of %q", h.Name, words), func(context.Context) error {
		var all []string
		for _, p := range view[statusView](t, h, "status").Problems {
			all = append(all, p.Text+" "+p.Remedy)
		}
		for _, w := range words {
			if !strings.Contains(strings.Join(all, "\n"), w) {
				return fmt.Errorf("it tells %q", all)
			}
		}
		return nil
	})
}

// untold waits until weft status does not tell of something any more.
func untold(t *testing.T, h *hosts.Host, words string) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("weft status on %s no longer tells of %q", h.Name, words), func(context.Context) error {
		for _, p := range view[statusView](t, h, "status").Problems {
			if strings.Contains(p.Text, words) {
				return errors.New(p.Text)
			}
		}
		return nil
	})
}

// otherAddress gives one host another address on the underlay, as a new lease of
// DHCP does.
func (c *cluster) otherAddress(t *testing.T) {
	h := c.lab.Hosts[2]
	const moved = "192.0.2.112"
	start := time.Now()
	ipBatch(t, h.NetNS(), "address del "+h.Address.String()+"/24 dev eth0\naddress add "+moved+"/24 dev eth0\nroute replace default via 192.0.2.1\n")
	for _, i := range []int{0, 1, 3} {
		reach(t, c.containers[i], "10.32.3.10")
		reach(t, c.containers[2], fmt.Sprintf("10.32.%d.10", i+1))
	}
	took := time.Since(start)
	eventually(t, 30*time.Second, "host a knows the address", func(context.Context) error {
		for _, p := range view[[]peerView](t, c.lab.Hosts[0], "peers") {
			if p.Name == "c" && p.Address.String() == moved && p.Alive {
				return nil
			}
		}
		return errors.New("weft peers does not show it")
	})
	c.agree(t, start)
	figure(t, "M5 a host's address changes", 1, "its containers are reached from 3 hosts, and reach them, after %s (target 5 s)", took.Round(100*time.Millisecond))
}

// wrongKey gives one host another cluster key, and then the right one.
func (c *cluster) wrongKey(t *testing.T) {
	a, d := c.lab.Hosts[0], c.lab.Hosts[3]
	set := func(key string) {
		docker(t, d, "plugin", "disable", "--force", hosts.PluginName)
		docker(t, d, "plugin", "set", hosts.PluginName, "WEFT_KEY="+key)
		docker(t, d, "plugin", "enable", hosts.PluginName)
	}
	set(wrongKey)
	tells(t, d, "WEFT_KEY")
	tells(t, a, "silent hosts: d")
	for _, p := range view[[]peerView](t, d, "peers") {
		if p.Alive {
			t.Errorf("with a wrong key host d hears %+v", p)
		}
	}
	set(rightKey)
	for _, h := range c.lab.Hosts {
		meets(t, h, len(c.lab.Hosts)-1)
	}
	figure(t, "wrong cluster key", 1, "refused, and said on both sides")
}
