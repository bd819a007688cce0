package tests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// projectFile has two services of Compose's on networks of the plugin, as README has
// them: one with an address and an alias, one on both.
const projectFile = `name: shop
services:
  web:
    image: ` + hosts.Image + `
    command: ["sleep", "86400"]
    init: true
    networks: {app: {ipv4_address: 10.57.%[1]d.10, aliases: [front]}}
  client:
    image: ` + hosts.Image + `
    command: ["sleep", "86400"]
    init: true
    depends_on: [web]
    networks: [app, back]
networks:
  app:
    driver: ` + hosts.PluginName + `
    driver_opts: {mtu: "%[2]s"}
    ipam: {config: [{subnet: 10.57.0.0/16, ip_range: 10.57.%[1]d.0/24}]}
  back:
    driver: ` + hosts.PluginName + `
    internal: true
    enable_ipv6: true
    ipam: {driver: ` + hosts.PluginName + `, config: [{subnet: 10.58.0.0/16}, {subnet: "fd00:58::/64"}]}
`

// project writes a Compose file for the host of this number and returns its path.
func project(t *testing.T, number int, mtu string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, projectFile, number, mtu), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// compose runs Compose with the file on the host.
func compose(t *testing.T, h *hosts.Host, file string, args ...string) string {
	t.Helper()
	out, err := h.Compose(t.Context(), file, args...)
	if err != nil {
		t.Fatalf("host %s: %v", h.Name, err)
	}
	return out
}

// composed has the same project on two hosts, changes an option, asks for nonsense, and
// takes all down.
func composed(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	for i, h := range lab.Hosts {
		compose(t, h, project(t, i+1, "1400"), "up", "--detach")
	}
	client := hosts.Container{Host: a, Name: "shop-client-1"}
	for _, name := range []string{"web", "front", "10.57.2.10"} { // the last is on the other host
		reach(t, client, name)
	}
	web := hosts.Container{Host: b, Name: "shop-web-1"}
	if got := addressOf(t, web, "shop_app").String(); got != "10.57.2.10" {
		t.Errorf("the service has the address %s, not the one in the file", got)
	}
	back := networkOf(t, a, "shop_back")
	if !back.Internal || len(back.Subnets) != 2 || back.Subnets[1].Pool != "fd00:58::/64" {
		t.Errorf("weft networks: %+v", back)
	}

	// Compose makes a network again whose options changed. Without the last word it puts
	// the containers on it as they are, without their addresses and aliases.
	compose(t, a, project(t, 1, "1380"), "up", "--detach", "--force-recreate")
	if n := networkOf(t, a, "shop_app"); n.EffectiveMTU != 1380 {
		t.Errorf("after the change: %+v", n)
	}
	reach(t, client, "front")
	reach(t, client, "10.57.2.10")

	_, err := a.Compose(t.Context(), project(t, 1, "1,380"), "up", "--detach")
	if err == nil || !strings.Contains(err.Error(), "1,380") || !strings.Contains(err.Error(), "mtu") {
		t.Errorf("an mtu of 1,380 is refused with: %v", err)
	}

	for i, h := range lab.Hosts {
		compose(t, h, project(t, i+1, "1400"), "down")
		if left := docker(t, h, "network", "ls", "--quiet", "--filter", "name=shop_"); left != "" {
			t.Errorf("host %s: networks are left: %s", h.Name, left)
		}
	}
	figure(t, "Compose: project up, changed, down", 2, "services reach each other by name, alias and address, also across hosts")
}

// swarmProject lets Compose make an attachable network on a manager, which a project
// on another host joins.
const (
	swarmProject = `name: one
services:
  web: {image: ` + hosts.Image + `, command: ["sleep", "86400"], init: true, networks: [app]}
networks:
  app:
    name: shared
    driver: ` + hosts.PluginName + `
    attachable: true
    ipam: {config: [{subnet: 10.71.0.0/16}]}
`
	joinedProject = `name: two
services:
  client: {image: ` + hosts.Image + `, command: ["sleep", "86400"], init: true, networks: [app]}
networks:
  app: {name: shared, external: true}
`
)

// projects runs the two projects on two hosts of the Swarm.
func (s *swarm) projects(t *testing.T) {
	a, b := s.lab.Hosts[0], s.lab.Hosts[1]
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one.yaml"), filepath.Join(dir, "two.yaml")
	for file, text := range map[string]string{one: swarmProject, two: joinedProject} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	compose(t, a, one, "up", "--detach")
	// A network reaches other managers a moment later.
	eventually(t, 30*time.Second, "a project on another host joins the network", func(ctx context.Context) error {
		_, err := b.Compose(ctx, two, "up", "--detach")
		return err
	})
	client := hosts.Container{Host: b, Name: "two-client-1"}
	named(t, client, "web")
	reach(t, client, addressOf(t, hosts.Container{Host: a, Name: "one-web-1"}, "shared").String())
	figure(t, "swarm: Compose projects on two hosts on "+s.name, 1, "the second reaches the first by name; addresses that two have: %d (target 0)", s.duplicates(t, s.lab.Hosts...))
	compose(t, b, two, "down")
	compose(t, a, one, "down")
	s.forgotten(t)
}
