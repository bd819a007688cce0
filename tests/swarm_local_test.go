package tests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// TestSwarmScopeLocal uses Swarm with the default scope: each host has the
// configuration of a network, a network of the Swarm is made from it, and each host
// chooses its addresses itself.
func TestSwarmScopeLocal(t *testing.T) {
	t.Parallel()
	for name, engine := range engines(t) {
		if name != "debian" && !soak() {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			newSwarm(t, engine, false).scopeLocal(t)
		})
	}
}

func (s *swarm) scopeLocal(t *testing.T) {
	a := s.lab.Hosts[0]
	for i, h := range s.lab.Hosts {
		config := []string{"network", "create", "--config-only", "--subnet", "10.50.0.0/16", "-o", "mtu=1400", "-o", "vni=5050"}
		docker(t, h, append(slices.Clone(config), "--ip-range", fmt.Sprintf("10.50.%d.0/24", i+1), "app-config")...)
		docker(t, h, "network", "create", "--config-only", "--ipam-driver", hosts.PluginName, "--subnet", "10.51.0.0/16", "-o", "vni=5051", "own-config")
	}
	for _, name := range []string{"app", "own"} {
		docker(t, a, "network", "create", "-d", hosts.PluginName, "--scope", "swarm", "--attachable", "--config-from", name+"-config", name)
	}
	web := s.service(t, "web", 6, "--network", "app")
	api := s.service(t, "api", 6, "--network", "own")
	spread(t, web, s.lab.Hosts...)
	spread(t, api, s.lab.Hosts...)
	s.meshByName(t, "web", web)
	s.meshByName(t, "api", api)
	s.duplicates(t, s.lab.Hosts...)
	beside := run(t, s.lab.Hosts[2], "beside", "--network", "app")
	reach(t, beside, "web")
	if out := command(t, beside, "ip", "link"); !strings.Contains(out, "mtu 1400") {
		t.Errorf("the options of the configuration did not arrive: %s", out)
	}
	// A host's own network has nothing to do with the Swarm.
	docker(t, s.lab.Hosts[1], "network", "create", "-d", hosts.PluginName, "--subnet", "10.52.0.0/24", "mine")
	one, two := run(t, s.lab.Hosts[1], "mine1", "--network", "mine"), run(t, s.lab.Hosts[1], "mine2", "--network", "mine")
	reach(t, one, addressOf(t, two, "mine").String())
	for _, h := range s.lab.Hosts {
		clean(t, h)
	}
	docker(t, s.lab.Hosts[1], "rm", "--force", "mine1", "mine2")
	docker(t, s.lab.Hosts[1], "network", "rm", "mine")
	docker(t, s.lab.Hosts[2], "rm", "--force", "beside")
	s.removeServices(t, "web", "api")
	s.removeNetworks(t, "app", "own")
	for _, h := range s.lab.Hosts {
		removeUnused(t, h, "app-config", "own-config")
	}
	s.forgotten(t)
	t.Run("both families", s.bothFamilies)
	s.nothingLeft(t)
	figure(t, "swarm: scope local, networks from configurations on "+s.name, 1, "%d tasks on 3 hosts reach each other by name and address; nothing left", len(web)+len(api))
}

// meshByName waits until every task finds all tasks of its service by name, and
// reaches them: Swarm itself does not know the addresses that a host chose.
func (s *swarm) meshByName(t *testing.T, name string, tasks []hosts.Task) {
	t.Helper()
	for _, task := range tasks {
		c := s.lab.Container(task)
		eventually(t, 30*time.Second, fmt.Sprintf("task %.8s on host %s reaches all of %s", task.ID, task.Host, name), func(ctx context.Context) error {
			// A name server that knows no AAAA makes nslookup fail.
			out, _ := c.Host.Docker(ctx, "exec", c.Name, "nslookup", "-type=a", "tasks."+name, "127.0.0.11")
			found := addressLine.FindAllStringSubmatch(out, -1)
			if len(found) != len(tasks) {
				return fmt.Errorf("it finds %d: %s", len(found), out)
			}
			for _, m := range found {
				if _, err := c.Exec(ctx, "ping", "-c", "1", "-W", "1", m[1]); err != nil {
					return errors.Join(fmt.Errorf("no answer from %s", m[1]), err)
				}
			}
			return nil
		})
	}
}
