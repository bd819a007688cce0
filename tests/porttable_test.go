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
	type ask func(ctx context.Context, address string) (string, error)
	in := func(c hosts.Container, port string) ask {
		return func(ctx context.Context, address string) (string, error) {
			return fetch(ctx, c, net.JoinHostPort(address, port))
		}
	}
	from := func(h *hosts.Host, port string) ask {
		return func(ctx context.Context, address string) (string, error) {
			return hostFetch(ctx, h, net.JoinHostPort(address, port))
		}
	}
	const ours, dockers = "8070", "8071"
	clients := map[string][2]ask{ // where Weft has a part, and where Docker is alone
		"another host":                           {from(b, ours), from(b, dockers)},
		"the host":                               {from(a, ours), from(a, dockers)},
		"the container itself":                   {in(weft, ours), in(own, dockers)},
		"a container of its network":             {in(near, ours), in(ownNear, dockers)},
		"a container of another network":         {in(beside, ours), in(bridge, dockers)},
		"a container on Docker's bridge":         {in(bridge, ours), in(bridge, dockers)},
		"a container on another host":            {in(far, ours), in(far, dockers)},
		"Docker's network, Weft's port":          {in(ownNear, ours), in(ownNear, dockers)},
		"Weft's network, Docker's port":          {in(near, dockers), in(ownNear, dockers)},
		"the published container, Docker's port": {in(weft, dockers), in(ownNear, dockers)},
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
			for i, ask := range pair {
				for range 3 { // names of the hosts may still be on their way
					out, err := ask(t.Context(), address)
					if answers[i] = err == nil && strings.Contains(out, "word"); answers[i] {
						break
					}
				}
			}
			asked++
			word := map[bool]string{true: "answers", false: "-"}
			line := fmt.Sprintf("%-40s %-10s Weft %-8s Docker alone %s", who, what, word[answers[0]], word[answers[1]])
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
