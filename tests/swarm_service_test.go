package tests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// services starts replicated and global services, with published ports and on
// several networks.
func (s *swarm) services(t *testing.T) {
	a, b, c := s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
	s.network(t, "front", 36)
	s.network(t, "back", 37, "--ipam-driver", hosts.PluginName)
	web := s.service(t, "web", 3, "--mode", "global", "--network", "front", "--publish", "mode=host,target=80,published=8080")
	db := s.service(t, "db", 3, "--network", "back")
	api := s.service(t, "api", 3, "--network", "front", "--network", "back")
	spread(t, web, a, b, c)
	spread(t, api, a, b, c)
	s.mesh(t, "front", append(slices.Clone(web), api...))
	s.mesh(t, "back", append(slices.Clone(db), api...))
	resolves(t, s.lab.Container(web[0]), "api", "front", api)
	resolves(t, s.lab.Container(api[1]), "db", "back", db)
	resolves(t, s.lab.Container(api[1]), "web", "front", web)
	silent(t, s.lab.Container(web[0]), db[0].Addresses["back"].String())
	beside := run(t, b, "beside", "--network", "front")
	reach(t, beside, "api")
	for _, h := range s.lab.Hosts {
		word := onHost(web, h)[0].Container[:12]
		fetches(t, a.NetNS(), "http://"+h.Address.String()+":8080/", word)
	}
	figure(t, "swarm: addresses that two have, services on "+s.name, 1, "%d of %d tasks (target 0)", s.duplicates(t, a, b, c), len(web)+len(db)+len(api))
	for _, h := range s.lab.Hosts {
		clean(t, h)
	}
	docker(t, b, "rm", "--force", "beside")
	s.removeServices(t, "web", "db", "api")
	s.removeNetworks(t, "front", "back")
	s.forgotten(t)
}

// oneAnswer is how many addresses fit into one answer of Docker's name server over UDP.
const oneAnswer = 25

// updates changes a service while it runs, and scales it up and down.
func (s *swarm) updates(t *testing.T) {
	most, rounds := 15, 1
	if soak() {
		most, rounds = 100, 5
	}
	a := s.lab.Hosts[0]
	s.network(t, "app", 38)
	s.network(t, "more", 39, "--ipam-driver", hosts.PluginName)
	s.service(t, "web", 3, "--network", "app")
	s.mesh(t, "more", s.update(t, "web", 3, "--network-add", "more"))
	now := s.update(t, "web", 3, "--network-rm", "more")
	s.mesh(t, "app", now)
	if _, ok := now[0].Addresses["more"]; ok {
		t.Errorf("a task is still on the network that was taken away: %+v", now[0])
	}
	now = s.update(t, "web", 3, "--force")
	s.mesh(t, "app", now)
	seen := run(t, a, "seen", "--network", "app")
	resolves(t, seen, "web", "app", now)

	duplicates, slowest := 0, time.Duration(0)
	for range rounds {
		start := time.Now()
		docker(t, a, "service", "scale", "--detach", fmt.Sprintf("web=%d", most))
		up := s.tasks(t, a, "web", most)
		slowest = max(slowest, time.Since(start))
		duplicates += s.duplicates(t, s.lab.Hosts...)
		if most <= oneAnswer {
			resolves(t, seen, "web", "app", up)
		}
		docker(t, a, "service", "scale", "--detach", "web=0")
		s.tasks(t, a, "web", 0)
	}
	figure(t, "swarm: scale 0 to "+fmt.Sprint(most)+" to 0 on "+s.name, rounds, "slowest %s up; addresses that two have: %d (target 0)", slowest.Round(100*time.Millisecond), duplicates)
	docker(t, a, "rm", "--force", "seen")
	s.removeServices(t, "web")
	s.removeNetworks(t, "app", "more")
	s.forgotten(t)
}

// drain empties a host and fills it again, while the others talk.
func (s *swarm) drain(t *testing.T) {
	a, b, c := s.lab.Hosts[0], s.lab.Hosts[1], s.lab.Hosts[2]
	s.network(t, "app", 40)
	web := s.service(t, "web", 6, "--network", "app")
	s.mesh(t, "app", web)
	from, to := onHost(web, a)[0], onHost(web, b)[0]
	probe := startProbe(t, s.lab.Container(from), s.lab.Container(to), to.Addresses["app"])
	docker(t, a, "node", "update", "--availability", "drain", "c")
	eventually(t, 60*time.Second, "host c is empty", func(ctx context.Context) error {
		now, err := a.WaitService(ctx, "web", 6)
		if err == nil && len(onHost(now, c)) > 0 {
			err = fmt.Errorf("it has %+v", onHost(now, c))
		}
		if err == nil && len(view[[]networkView](t, c, "networks")) > 0 {
			err = errors.New("it has the network")
		}
		return err
	})
	docker(t, a, "node", "update", "--availability", "active", "c")
	report := lossless(t, probe)
	now := s.update(t, "web", 6, "--force")
	spread(t, now, s.lab.Hosts...)
	s.mesh(t, "app", now)
	figure(t, "swarm: host drained and refilled on "+s.name, 1, "%d of %d packets between the others lost (target 0)", report.Lost, report.Sent)
	for _, h := range s.lab.Hosts {
		clean(t, h)
	}
	s.removeServices(t, "web")
	s.removeNetworks(t, "app")
	s.forgotten(t)
}

// composeFile has each service on Weft, a network of its own, a secret and a config.
const composeFile = `version: "3.8"
x-task: &task
  image: ` + hosts.Image + `
  command: ["sh", "-c", "hostname >/srv/index.html; exec httpd -f -p 80 -h /srv"]
  stop_signal: SIGKILL
services:
  web:
    <<: *task
    networks: [app]
    deploy: {mode: global, endpoint_mode: dnsrr}
  api:
    <<: *task
    networks: {app: {aliases: [backend]}, inner: {}}
    secrets: [word]
    configs: [{source: note, target: /srv/note}]
    deploy: {replicas: 2, endpoint_mode: dnsrr}
  db:
    <<: *task
    networks: [inner]
    deploy: {replicas: 1, endpoint_mode: dnsrr}
networks:
  app: {external: true}
  inner:
    driver: ` + hosts.PluginName + `
    driver_opts: {mtu: "1400"}
    ipam: {driver: "` + hosts.PluginName + `", config: [{subnet: 10.42.0.0/24}]}
secrets: {word: {file: ./word}}
configs: {note: {file: ./note}}
`

// stacks deploys a Compose file and removes it, again and again. The network that
// the stack uses is made and removed with it.
func (s *swarm) stacks(t *testing.T) {
	rounds := 1
	if soak() {
		rounds = 200
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"stack.yml": composeFile, "word": "whisper", "note": "note"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.stack(t, filepath.Join(dir, "stack.yml"), true)
	before := inventories(t, s.lab.Hosts...)
	start := time.Now()
	for range rounds {
		s.stack(t, filepath.Join(dir, "stack.yml"), false)
	}
	took := time.Since(start)
	for i, h := range s.lab.Hosts {
		unleaked(t, h, before[i])
	}
	figure(t, "swarm: stack deployed and removed on "+s.name, rounds, "nothing left on 3 hosts; %s a round", (took / time.Duration(rounds)).Round(100*time.Millisecond))
}

// stack is one round: deploy, look, remove.
func (s *swarm) stack(t *testing.T, file string, look bool) {
	t.Helper()
	a := s.lab.Hosts[0]
	s.network(t, "app", 41)
	docker(t, a, "stack", "deploy", "--resolve-image", "never", "--compose-file", file, "shop")
	web, api, db := s.tasks(t, a, "shop_web", 3), s.tasks(t, a, "shop_api", 2), s.tasks(t, a, "shop_db", 1)
	s.duplicates(t, s.lab.Hosts...)
	s.mesh(t, "app", append(slices.Clone(web), api...))
	if look {
		s.mesh(t, "shop_inner", append(slices.Clone(db), api...))
		c := s.lab.Container(api[0])
		resolves(t, c, "web", "app", web)
		resolves(t, c, "db", "shop_inner", db)
		resolves(t, s.lab.Container(web[2]), "backend", "app", api)
		if got := command(t, c, "cat", "/run/secrets/word", "/srv/note"); got != "whispernote" {
			t.Errorf("secret and config read %q", got)
		}
		if out := command(t, c, "ip", "link"); !strings.Contains(out, "mtu 1400") {
			t.Errorf("driver_opts did not reach the task: %s", out)
		}
	}
	docker(t, a, "stack", "rm", "shop")
	s.removeNetworks(t, "app")
	s.forgotten(t)
	s.stackGone(t, "shop_inner")
}

// stackGone waits until the network of a removed stack is gone.
func (s *swarm) stackGone(t *testing.T, network string) {
	t.Helper()
	eventually(t, 20*time.Second, "the stack's network is gone", func(ctx context.Context) error {
		out, err := s.lab.Hosts[0].Docker(ctx, "network", "ls", "--quiet", "--filter", "name="+network)
		if err == nil && out != "" {
			err = fmt.Errorf("network %s is still there", network)
		}
		return err
	})
}
