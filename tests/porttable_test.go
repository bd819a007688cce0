package tests

import (
	"context"
	"fmt"
	"net"
	"sort"
	"strings"
	"testing"

	"github.com/weftnet/weft/tests/hosts"
)

// portTable publishes one port by Weft and one by Docker's own bridge, and asks both
// from every kind of client by every address of the host. Whoever Docker answers, Weft
// must answer.
func (r *routed) portTable(t *testing.T) {
	a, b := r.lab.Hosts[0], r.lab.Hosts[1]
	docker(t, a, "network", "create", "-d", hosts.PluginName, "-o", r.way, "--subnet", "10.84.0.0/16", "--gateway", "10.84.0.1", "beside")
	docker(t, a, "network", "create", "--ipv6", "--subnet", "10.85.0.0/16", "--subnet", "fd00:85::/64", "dockers")
	weft := run(t, a, "pweft", "--network", "app", "--ip6", "fd00:80::70", "-p", "8070:80")
	near := run(t, a, "pnear", "--network", "app", "--ip6", "fd00:80::71")
	own := run(t, a, "pdocker", "--network", "dockers", "-p", "8071:80")
	ownNear := run(t, a, "pdockernear", "--network", "dockers")
	beside, bridge := run(t, a, "pbeside", "--network", "beside"), run(t, a, "pbridge")
	far := run(t, b, "pfar", "--network", "app", "--ip6", "fd00:80::72")
	for _, c := range []hosts.Container{weft, own} {
		serve(t, c, "word")
	}
	type asks func(ctx context.Context, address string) (string, error)
	in := func(c hosts.Container) asks {
		return func(ctx context.Context, address string) (string, error) { return fetch(ctx, c, address) }
	}
	from := func(h *hosts.Host) asks {
		return func(ctx context.Context, address string) (string, error) { return hostFetch(ctx, h, address) }
	}
	clients := map[string][2]asks{ // to Weft's port, to Docker's
		"another host":                     {from(b), from(b)},
		"the host":                         {from(a), from(a)},
		"the container itself":             {in(weft), in(own)},
		"a container of its network":       {in(near), in(ownNear)},
		"a container of another network":   {in(beside), in(bridge)},
		"a container on Docker's bridge":   {in(bridge), in(bridge)},
		"a container on another host":      {in(far), in(far)},
		"Docker's network, the other port": {in(ownNear), in(near)},
	}
	targets := map[string]string{"IPv4": a.Address.String(), "127.0.0.1": "127.0.0.1", "IPv6": a.Address6.String(), "::1": "::1"}
	var lines []string
	asked, worse := 0, 0
	for who, pair := range clients {
		for what, address := range targets {
			if (what == "127.0.0.1" || what == "::1") && who != "the host" {
				continue
			}
			answers := [2]bool{}
			for i, port := range []string{"8070", "8071"} {
				for range 3 { // names of the hosts may still be on their way
					out, err := pair[i](t.Context(), net.JoinHostPort(address, port))
					if answers[i] = err == nil && strings.Contains(out, "word"); answers[i] {
						break
					}
				}
			}
			asked++
			word := map[bool]string{true: "answers", false: "-"}
			line := fmt.Sprintf("%-34s %-10s Weft %-8s Docker's bridge %s", who, what, word[answers[0]], word[answers[1]])
			if answers[1] && !answers[0] {
				worse++
				t.Errorf("only Docker answers: %s", line)
			}
			lines = append(lines, line)
		}
	}
	sort.Strings(lines)
	t.Log("published ports on " + r.name + ", " + r.way + ":\n" + strings.Join(lines, "\n"))
	figure(t, r.way+": published ports beside Docker's bridge on "+r.name, asked, "answered by Docker alone: %d (target 0)", worse)
	for _, h := range r.lab.Hosts {
		removeOthers(t, h, "app00", "app01", "app10", "app11")
	}
	docker(t, a, "network", "rm", "beside", "dockers")
}
