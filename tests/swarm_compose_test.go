package tests

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// composeHeads are forms of the same file, the newest first: Compose's current
// specification, what of it docker stack takes today, and its schema of old. Of
// Docker's commands, 28.2 takes the second: it needs no version, but refuses the
// specification's name at the top, content and environment of configs and secrets,
// and of a network enable_ipv6 and an ipam with more than driver and subnets. 20.10
// takes the third alone ("unsupported Compose file version: 1.0"), up to 3.9. Either
// command does on either engine.
var composeHeads = []struct{ name, text string }{
	{"the current specification", "name: mall\nconfigs: {note: {content: note}}\n"},
	{"no version", "configs: {note: {file: ./note}}\n"},
	{"version 3.8", "version: \"3.8\"\nconfigs: {note: {file: ./note}}\n"},
}

// composeBody is the rest of the file. TURN is a number that changes the service.
const composeBody = `services:
  web:
    image: ` + hosts.Image + `
    command: ["sh", "-c", "hostname >/srv/index.html; exec httpd -f -p 80 -h /srv"]
    stop_signal: SIGKILL
    environment: {TURN: "${TURN}"}
    networks: {app: {aliases: [backend]}}
    configs: [{source: note, target: /srv/note}]
    secrets: [word]
    deploy:
      replicas: 3
      endpoint_mode: dnsrr
      update_config: {parallelism: 1, order: start-first, delay: 0s, monitor: 1s}
      rollback_config: {parallelism: 1, order: stop-first}
networks:
  app:
    driver: ` + hosts.PluginName + `
    attachable: true
    driver_opts: {mtu: "1400"}
    ipam: {driver: default, config: [{subnet: 10.70.0.0/24}]}
secrets: {word: {file: ./word}}
`

// compose deploys a stack as today's specification has it with every Docker command
// of the machine in turn: each updates, task by task, what the one before it made.
func (s *swarm) compose(t *testing.T) {
	a, b := s.lab.Hosts[0], s.lab.Hosts[1]
	dir := t.TempDir()
	for name, text := range map[string]string{"word": "whisper", "note": "note"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	commands := dockerCommands(t)
	if len(commands) == 1 {
		commands = append(commands, commands[0])
	}
	var old []hosts.Task
	var beside hosts.Container
	for turn, path := range commands {
		form := s.deploy(t, a, path, dir, turn)
		now := s.replaced(t, "mall_web", old, 3)
		if turn == 0 {
			beside = run(t, b, "beside", "--network", "mall_app")
		}
		s.mesh(t, "mall_app", now)
		resolves(t, beside, "backend", "mall_app", now)
		reach(t, beside, "web")
		for _, task := range now {
			if got := command(t, s.lab.Container(task), "cat", "/run/secrets/word", "/srv/note"); got != "whispernote" {
				t.Errorf("secret and config read %q", got)
			}
		}
		if out := command(t, s.lab.Container(now[0]), "ip", "link"); !strings.Contains(out, "mtu 1400") {
			t.Errorf("driver_opts did not reach the task: %s", out)
		}
		version, err := exec.CommandContext(t.Context(), path, "--version").Output()
		if err != nil {
			t.Fatal(err)
		}
		figure(t, "swarm: Compose file on "+s.name, turn+1, "%s takes: %s; addresses that two have: %d (target 0)",
			strings.Split(strings.TrimSpace(string(version)), ",")[0], form, s.duplicates(t, s.lab.Hosts...))
		old = now
	}
	docker(t, b, "rm", "--force", "beside")
	docker(t, a, "stack", "rm", "mall")
	s.forgotten(t)
	s.stackGone(t, "mall_app")
}

// dockerCommands returns the Docker commands of the machine, each once.
func dockerCommands(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		path, err := filepath.EvalSymlinks(filepath.Join(dir, "docker"))
		if err == nil && !slices.Contains(all, path) {
			all = append(all, path)
		}
	}
	return all
}

// deploy hands the stack's file to the command in the newest form that it takes, and
// returns the form's name.
func (s *swarm) deploy(t *testing.T, h *hosts.Host, path, dir string, turn int) string {
	t.Helper()
	file := filepath.Join(dir, "stack.yml")
	for _, head := range composeHeads {
		if err := os.WriteFile(file, []byte(head.text+composeBody), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := h.DockerCommand(t.Context(), "stack", "deploy", "--resolve-image", "never", "--compose-file", file, "mall")
		cmd.Path, cmd.Env = path, append(cmd.Env, fmt.Sprintf("TURN=%d", turn))
		out, err := cmd.CombinedOutput()
		switch {
		case err == nil:
			return head.name
		case strings.Contains(string(out), "Additional property"), strings.Contains(string(out), "unsupported Compose file version"):
			t.Logf("%s, %s: %s", path, head.name, out)
		default:
			t.Fatalf("%s, %s: %v: %s", path, head.name, err, out)
		}
	}
	t.Fatalf("%s takes no form of the file", path)
	return ""
}

// families makes networks of several subnets. Swarm's leader gives a task one
// address of a network, from any of them. So IPv4 subnets work, and all tasks reach
// each other; with IPv6 each host would make up the address of the other family, as
// engine 20.10 does, and two have the same: Weft refuses it. The newest engine fails
// by itself with Docker's address management, and before it asks Weft; so does 29.1.
func (s *swarm) families(t *testing.T) {
	a, b := s.lab.Hosts[0], s.lab.Hosts[1]
	version := docker(t, a, "version", "--format", "{{.Server.Version}}")
	if strings.HasPrefix(version, "29.1.") && os.Getenv("CI") == "" {
		t.Skipf("Docker %s finds no network of the Swarm any more once there is one with IPv6 that it cannot allocate", version)
	}
	create := func(name string, args ...string) string {
		return docker(t, a, append(append([]string{"network", "create", "-d", hosts.PluginName, "--attachable"}, args...), name)...)
	}
	create("wide", "--subnet", "10.71.0.0/24", "--subnet", "10.71.1.0/24")
	create("own", "--subnet", "10.72.0.0/24", "--subnet", "10.72.1.0/24", "--ipam-driver", hosts.PluginName)
	six := []string{create("six", "--ipv6", "--subnet", "10.73.0.0/24", "--subnet", "fd00:73::/64"),
		create("ownsix", "--ipv6", "--subnet", "10.74.0.0/24", "--subnet", "fd00:74::/64", "--ipam-driver", hosts.PluginName)}
	leader := s.leader(t, nil)
	var waiting []string
	for _, name := range []string{"six", "ownsix"} {
		_, err := a.Docker(t.Context(), serviceCreate(name, "--network", name)...)
		switch {
		case err == nil:
			waiting = append(waiting, name)
		case !strings.Contains(err.Error(), "network "+name+" not found"): // as Docker 29 says until it is allocated
			t.Fatal(err)
		}
	}
	s.shown(t, "wide")
	s.shown(t, "own")
	for _, id := range six {
		eventually(t, 30*time.Second, "the leader does not allocate network "+id, func(context.Context) error {
			log, err := os.ReadFile(leader.LogFile())
			if err == nil && !strings.Contains(string(log), "Failed allocation for network "+id) {
				err = fmt.Errorf("it does not say so in %s", leader.LogFile())
			}
			return err
		})
	}
	refused := six[1:]
	if strings.HasPrefix(version, "20.10.") {
		refused = six
	}
	for _, id := range refused {
		tells(t, leader, "Swarm network "+id[:12]+" is not allocated, and its tasks wait: subnet fd00:7")
	}
	tells(t, s.followers(t)[0], "network ownsix is not allocated by the Swarm's leader, "+leader.Name)

	one := run(t, a, "one", "--network", "wide", "--ip", "10.71.0.9")
	two := run(t, b, "two", "--network", "wide", "--ip", "10.71.1.9")
	reach(t, one, "10.71.1.9")
	reach(t, two, "10.71.0.9")
	web := s.service(t, "web", 6, "--network", "own")
	spread(t, web, s.lab.Hosts...)
	s.mesh(t, "own", web)
	first := 0
	for _, task := range web {
		if strings.HasPrefix(task.Addresses["own"].String(), "10.72.0.") {
			first++
		}
	}
	// Without --subnet, Docker's leader or Weft's chooses one.
	create("any")
	create("ownany", "--ipam-driver", hosts.PluginName)
	for _, name := range []string{"any", "ownany"} {
		s.shown(t, name)
		tasks := s.service(t, "on"+name, 3, "--mode", "global", "--network", name)
		s.mesh(t, name, tasks)
		beside := run(t, b, "beside"+name, "--network", name)
		reach(t, beside, tasks[0].Addresses[name].String())
	}
	for _, name := range waiting {
		tasks, err := a.Tasks(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			if task.State == "running" {
				t.Errorf("a task runs on a network with IPv6: %+v", task)
			}
		}
	}
	figure(t, "swarm: networks of several subnets on "+s.name, 1, "of 6 tasks %d in one IPv4 subnet, %d in the other, all reach each other; addresses that two have: %d (target 0); IPv6 refused",
		first, len(web)-first, s.duplicates(t, s.lab.Hosts...))
	for _, h := range s.lab.Hosts {
		clean(t, h)
	}
	docker(t, a, "rm", "--force", "one")
	docker(t, b, "rm", "--force", "two", "besideany", "besideownany")
	s.removeServices(t, append(waiting, "web", "onany", "onownany")...)
	s.removeNetworks(t, "wide", "own", "six", "ownsix", "any", "ownany")
	s.forgotten(t)
}

// bothFamilies makes networks with IPv4 and IPv6 from configurations of the hosts:
// each host then gives out both addresses itself.
func (s *swarm) bothFamilies(t *testing.T) {
	networks := []string{"six", "ownsix"}
	for i, h := range s.lab.Hosts {
		config := []string{"network", "create", "--config-only", "--ipv6"}
		docker(t, h, append(slices.Clone(config), "-o", "vni=5073", "--subnet", "10.75.0.0/16", "--ip-range", fmt.Sprintf("10.75.%d.0/24", i+1),
			"--subnet", "fd00:75::/64", "--ip-range", fmt.Sprintf("fd00:75::%d:0/112", i+1), "six-config")...)
		docker(t, h, append(slices.Clone(config), "-o", "vni=5074", "--ipam-driver", hosts.PluginName,
			"--subnet", "10.76.0.0/16", "--subnet", "fd00:76::/64", "ownsix-config")...)
	}
	seen := map[string]bool{}
	for _, name := range networks {
		docker(t, s.lab.Hosts[0], "network", "create", "-d", hosts.PluginName, "--scope", "swarm", "--attachable", "--config-from", name+"-config", name)
		var all []hosts.Container
		for _, task := range s.service(t, "web-"+name, 3, "--mode", "global", "--network", name) {
			all = append(all, s.lab.Container(task))
		}
		for _, h := range s.lab.Hosts {
			all = append(all, run(t, h, "at-"+name, "--network", name))
		}
		var addresses []string
		for _, c := range all {
			text := docker(t, c.Host, "inspect", "--format", fmt.Sprintf("{{with index .NetworkSettings.Networks %q}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}", name), c.Name)
			both := strings.Fields(text)
			if len(both) != 2 {
				t.Fatalf("%s on host %s has the addresses %q", c.Name, c.Host.Name, text)
			}
			addresses = append(addresses, both...)
		}
		for _, address := range addresses {
			if seen[address] {
				t.Errorf("two have %s", address)
			}
			seen[address] = true
		}
		for _, from := range all {
			reachAll(t, from, addresses)
		}
	}
	figure(t, "swarm: IPv4 and IPv6 from configurations on "+s.name, 1, "%d addresses, each reached by all on its network; that two have: 0 (target 0)", len(seen))
	for _, name := range networks {
		for _, h := range s.lab.Hosts {
			docker(t, h, "rm", "--force", "at-"+name)
		}
		s.removeServices(t, "web-"+name)
		s.removeNetworks(t, name)
		for _, h := range s.lab.Hosts {
			removeUnused(t, h, name+"-config")
		}
	}
	s.forgotten(t)
}
