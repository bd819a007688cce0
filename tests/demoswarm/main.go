// Command demoswarm shows Weft under Docker Swarm: three Docker hosts on this
// machine in a Swarm, a stack of three services on one Weft network, the leader
// killed, a host drained and refilled. Every command and its output is real.
// Everything is removed at the end, also after Ctrl-C or a failure.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/weftnet/weft/tests/hosts"
	"github.com/weftnet/weft/tests/show"
)

func main() {
	show.Main(func(s *show.Show) error {
		d := &demo{Show: s}
		return d.run()
	})
}

// demo is one run. The hosts are alpha, beta and gamma, all of them managers.
type demo struct {
	*show.Show
	tasks map[string][]hosts.Task // by service of the stack
}

// services of the stack and their tasks.
var services = map[string]int{"web": 3, "api": 4, "db": 2}

func (d *demo) run() error {
	if err := d.Build(); err != nil {
		return err
	}
	d.Title("Three Docker hosts on one cable")
	if err := d.Hosts("alpha", "beta", "gamma"); err != nil {
		return err
	}
	d.OK("three dockerds, each with its own network, storage and rules")
	for _, step := range []func() error{d.install, d.swarm, d.network, d.deploy, d.talk, d.beside, d.killLeader, d.drain, d.status, d.remove} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) alpha() *hosts.Host { return d.Lab.Hosts[0] }

func (d *demo) install() error {
	d.Title("Install the managed plugin on all, with scope global")
	if err := d.Install("WEFT_SCOPE=global"); err != nil {
		return err
	}
	d.OK("plugin created, set to WEFT_SCOPE=global and enabled on three hosts; no host was told of another")
	return nil
}

func (d *demo) swarm() error {
	d.Title("One Swarm of three managers")
	a := d.alpha()
	if _, err := d.Docker(a, "swarm", "init", "--advertise-addr", a.Address.String()); err != nil {
		return err
	}
	token, err := d.Docker(a, "swarm", "join-token", "-q", "manager")
	if err != nil {
		return err
	}
	for _, h := range d.Lab.Hosts[1:] {
		if _, err := d.Docker(h, "swarm", "join", "--token", token, "--advertise-addr", h.Address.String(), a.Address.String()); err != nil {
			return err
		}
	}
	for _, h := range d.Lab.Hosts {
		if err := a.WaitNode(d.Ctx, h, "ready"); err != nil {
			return err
		}
	}
	if _, err := d.Docker(a, "node", "ls"); err != nil {
		return err
	}
	d.OK("the hosts are a Swarm")
	return nil
}

func (d *demo) network() error {
	d.Title("One network, made on a manager")
	if err := d.Dockers(d.alpha(), []string{"network", "create", "-d", hosts.PluginName, "--attachable", "--subnet", "10.32.0.0/16", "app"},
		[]string{"network", "ls", "--filter", "name=app"}); err != nil {
		return err
	}
	d.OK("network app, made once for all hosts")
	return nil
}

// stack is the Compose file. Its services answer HTTP with the name of the host on
// which the task runs.
const stack = `version: "3.8"
x-task: &task
  image: ` + hosts.Image + `
  command: ["sh", "-c", "echo $$NAME on $$HOST >/srv/index.html; exec httpd -f -p 80 -h /srv"]
  stop_signal: SIGKILL
  networks: [app]
services:
  web:
    <<: *task
    environment: ["NAME=web", "HOST={{.Node.Hostname}}"]
    deploy: {mode: global, endpoint_mode: dnsrr}
  api:
    <<: *task
    environment: ["NAME=api", "HOST={{.Node.Hostname}}"]
    deploy: {replicas: 4, endpoint_mode: dnsrr}
  db:
    <<: *task
    environment: ["NAME=db", "HOST={{.Node.Hostname}}"]
    deploy: {replicas: 2, endpoint_mode: dnsrr}
networks:
  app: {external: true}
`

func (d *demo) deploy() error {
	d.Title("A stack of three services on it")
	file := filepath.Join(d.Lab.Dir, "stack.yml")
	if err := os.WriteFile(file, []byte(stack), 0o600); err != nil {
		return err
	}
	d.Prompt(d.alpha().Name, "cat stack.yml")
	fmt.Print(stack)
	d.Prompt(d.alpha().Name, "docker stack deploy --resolve-image never --compose-file stack.yml shop")
	out, err := d.alpha().Docker(d.Ctx, "stack", "deploy", "--resolve-image", "never", "--compose-file", file, "shop")
	fmt.Println(out)
	if err != nil {
		return err
	}
	if err := d.complete(d.alpha()); err != nil {
		return err
	}
	if err := d.ps(d.alpha()); err != nil {
		return err
	}
	d.OK("9 tasks of web, api and db run, on all hosts")
	return nil
}

// complete waits until every service has its tasks, as the host sees it.
func (d *demo) complete(h *hosts.Host) error {
	ctx, cancel := context.WithTimeout(d.Ctx, 2*time.Minute)
	defer cancel()
	d.tasks = map[string][]hosts.Task{}
	for name, n := range services {
		tasks, err := h.WaitService(ctx, "shop_"+name, n)
		if err != nil {
			return err
		}
		d.tasks[name] = tasks
	}
	return nil
}

func (d *demo) ps(h *hosts.Host) error {
	_, err := d.Docker(h, "stack", "ps", "shop", "--filter", "desired-state=running", "--format", "table {{.Name}}\t{{.Node}}\t{{.CurrentState}}")
	return err
}

// talk lets a task on each host reach every service by name, and every task by
// address.
func (d *demo) talk() error {
	d.Title("Tasks reach each other by name, on all hosts")
	for _, h := range d.Lab.Hosts {
		c := d.task("web", h)
		for _, name := range []string{"web", "api", "db"} {
			if err := d.Expect(h, name+" on ", "exec", c.Name[:12], "wget", "-qO-", "http://"+name+"/"); err != nil {
				return err
			}
		}
	}
	n, err := d.reachAll()
	if err != nil {
		return err
	}
	d.OK(fmt.Sprintf("each service by name from each host; %d of %d pairs of tasks by address", n, n))
	return nil
}

// task returns the container of one task of a service on a host.
func (d *demo) task(service string, h *hosts.Host) hosts.Container {
	for _, t := range d.tasks[service] {
		if t.Host == h.Name {
			return d.Lab.Container(t)
		}
	}
	return hosts.Container{Host: h, Name: "no-task-of-" + service}
}

// reachAll pings every task from every task, and returns how many pairs that were.
func (d *demo) reachAll() (int, error) {
	var addresses []string
	for _, tasks := range d.tasks {
		for _, t := range tasks {
			addresses = append(addresses, t.Addresses["app"].String())
		}
	}
	pairs := 0
	for _, tasks := range d.tasks {
		for _, t := range tasks {
			if _, err := d.Lab.Container(t).Exec(d.Ctx, "sh", "-c",
				"for a in "+strings.Join(addresses, " ")+"; do ping -q -c 1 -W 2 $a >/dev/null || { echo no answer from $a; exit 1; }; done"); err != nil {
				return pairs, fmt.Errorf("task on %s: %w", t.Host, err)
			}
			pairs += len(addresses)
		}
	}
	return pairs, nil
}

func (d *demo) beside() error {
	d.Title("docker run beside them")
	b := d.Lab.Hosts[1]
	if err := d.Dockers(b, []string{"run", "-d", "--name", "beside", "--network", "app", hosts.Image, "sleep", "1000"}); err != nil {
		return err
	}
	if err := d.Expect(b, "db on ", "exec", "beside", "wget", "-qO-", "http://db/"); err != nil {
		return err
	}
	if err := d.Expect(d.alpha(), "0% packet loss", "exec", d.task("web", d.alpha()).Name[:12], "ping", "-c", "2", "beside"); err != nil {
		return err
	}
	d.OK("a container of docker run reaches the services, and they reach it by name")
	return nil
}

// others returns the hosts but one.
func (d *demo) others(but *hosts.Host) (rest []*hosts.Host) {
	for _, h := range d.Lab.Hosts {
		if h != but {
			rest = append(rest, h)
		}
	}
	return rest
}
