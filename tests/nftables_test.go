package tests

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestDockerNftables runs beside a Docker that writes its rules by nftables, and takes
// all rules of everybody away, as a reload of a firewall does.
func TestDockerNftables(t *testing.T) {
	t.Parallel()
	engine := engines(t)["newest"]
	lab := newLab(t, 2, func(_ int, o *hosts.HostOptions) {
		o.Engine, o.Flags = engine, []string{"--firewall-backend=nftables"}
		o.Before = []string{"sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"} // this backend leaves it to the user
	})
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	a, b := lab.Hosts[0], lab.Hosts[1]
	if out, err := a.Exec(t.Context(), "nft", "list", "tables"); err != nil || !strings.Contains(out, "docker-bridges") {
		t.Fatalf("Docker does not use nftables: %v: %s", err, out)
	}
	kinds := map[string][]string{"vxlan": nil, "led": {"-o", "gateway=weft"}, "routed": {"-o", "mode=routed"}, "crypt": {"-o", "encrypted"}}
	second := 60
	for name, args := range kinds {
		createNetwork(t, lab, name, second, append([]string{"--gateway", fmt.Sprintf("10.%d.0.1", second)}, args...)...)
		second++
		for i, h := range lab.Hosts {
			run(t, h, name, "--network", name, "-p", fmt.Sprintf("%d:80", 8000+second*10+i))
			serve(t, hosts.Container{Host: h, Name: name}, name)
		}
	}
	all := func() {
		t.Helper()
		for name := range kinds {
			from, to := hosts.Container{Host: a, Name: name}, hosts.Container{Host: b, Name: name}
			reach(t, from, addressOf(t, to, name).String())
			reach(t, to, addressOf(t, from, name).String())
		}
		for name := range kinds {
			port := strings.TrimPrefix(strings.Fields(docker(t, a, "inspect", "--format", "{{range $p, $b := .HostConfig.PortBindings}}{{range $b}}{{.HostPort}}{{end}}{{end}}", name))[0], ":")
			eventually(t, 20*time.Second, "the published port of "+name+" answers", func(ctx context.Context) error {
				out, err := hostFetch(ctx, b, a.Address.String()+":"+port)
				if err == nil && !strings.Contains(out, name) {
					err = fmt.Errorf("it answers %q", out)
				}
				return err
			})
		}
	}
	all()
	reach(t, hosts.Container{Host: a, Name: "led"}, b.Address.String()) // out, masqueraded
	reach(t, hosts.Container{Host: a, Name: "vxlan"}, b.Address.String())
	// A firewall that is loaded anew takes rules of others with it. Docker's own come back
	// with its restart; Weft's by themselves.
	repaired(t, a, "rules rules6", "for f in ip ip6; do for t in filter nat raw mangle; do nft delete table $f $t; done; done 2>/dev/null; true")
	all()
	figure(t, "beside Docker's nftables backend", len(kinds), "kinds of networks: across hosts, published ports and the way out; repaired after all tables were deleted")
}
