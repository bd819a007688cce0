package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// killLeader kills dockerd of the leader while tasks on the other hosts talk.
func (d *demo) killLeader() error {
	d.Title("kill -9 the leader's dockerd while tasks on the others talk")
	leader, err := d.Lab.WaitLeader(d.Ctx, nil)
	if err != nil {
		return err
	}
	rest := d.others(leader)
	probe, err := d.probe(rest[0], rest[1])
	if err != nil {
		return err
	}
	d.Prompt(leader.Name, "kill -9 $(cat /run/docker/docker.pid)    # the leader")
	if err := leader.KillDockerd(d.Ctx); err != nil {
		return err
	}
	start := time.Now()
	next, err := d.Lab.WaitLeader(d.Ctx, leader)
	if err != nil {
		return err
	}
	fmt.Printf("%s leads after %.0f s\n", next.Name, time.Since(start).Seconds())
	d.Prompt(next.Name, "docker service scale shop_api=8    # the new leader allocates")
	if _, err := next.Docker(d.Ctx, "service", "scale", "--detach", "shop_api=8"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.Ctx, 2*time.Minute)
	defer cancel()
	tasks, err := next.WaitService(ctx, "shop_api", 8)
	if err != nil {
		return err
	}
	if err := distinct(tasks); err != nil {
		return err
	}
	d.Prompt(leader.Name, "dockerd &    # again")
	if err := leader.StartDockerd(d.Ctx); err != nil {
		return err
	}
	if err := next.WaitNode(ctx, leader, "ready"); err != nil {
		return err
	}
	report, err := probe.Stop()
	fmt.Println(report)
	if err != nil {
		return err
	}
	if _, err := d.Docker(next, "node", "ls"); err != nil {
		return err
	}
	d.Prompt(next.Name, "docker service scale shop_api=4")
	if _, err := next.Docker(d.Ctx, "service", "scale", "--detach", "shop_api=4"); err != nil {
		return err
	}
	if err := d.complete(next); err != nil {
		return err
	}
	n, err := d.reachAll()
	if err != nil {
		return err
	}
	d.OK(fmt.Sprintf("leader killed: no packet of %d lost on the other hosts, no address given twice, the host is back, %d of %d pairs of tasks talk", report.Sent, n, n))
	return nil
}

// probe starts UDP and TCP flows between tasks of web on two hosts.
func (d *demo) probe(from, to *hosts.Host) (*hosts.Probe, error) {
	for _, t := range d.tasks["web"] {
		if t.Host == to.Name {
			d.Prompt(from.Name, "(a UDP packet each millisecond and a TCP connection from web here to web on "+to.Name+")")
			return hosts.StartProbe(d.Ctx, d.task("web", from), d.Lab.Container(t), t.Addresses["app"])
		}
	}
	return nil, fmt.Errorf("no task of web runs on %s", to.Name)
}

// distinct says which address two tasks have.
func distinct(tasks []hosts.Task) error {
	seen := map[string]string{}
	for _, t := range tasks {
		a := t.Addresses["app"].String()
		if other, ok := seen[a]; ok {
			return fmt.Errorf("tasks %s and %s both have %s", other, t.ID, a)
		}
		seen[a] = t.ID
	}
	return nil
}

func (d *demo) drain() error {
	d.Title("Drain a host, and fill it again")
	leader, err := d.Lab.WaitLeader(d.Ctx, nil)
	if err != nil {
		return err
	}
	rest := d.others(leader)
	empty, stays := rest[0], rest[1]
	probe, err := d.probe(leader, stays)
	if err != nil {
		return err
	}
	if _, err := d.Docker(leader, "node", "update", "--availability", "drain", empty.Name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.Ctx, 2*time.Minute)
	defer cancel()
	if err := d.emptied(ctx, leader, empty); err != nil {
		return err
	}
	if err := d.ps(leader); err != nil {
		return err
	}
	if err := d.Dockers(leader, []string{"node", "update", "--availability", "active", empty.Name},
		[]string{"service", "update", "--detach", "--no-resolve-image", "--force", "shop_api"}); err != nil {
		return err
	}
	report, err := probe.Stop()
	fmt.Println(report)
	if err != nil {
		return err
	}
	if err := d.filled(ctx, leader, empty); err != nil {
		return err
	}
	if err := d.ps(leader); err != nil {
		return err
	}
	n, err := d.reachAll()
	if err != nil {
		return err
	}
	d.OK(fmt.Sprintf("%s drained and refilled: no packet of %d lost between the others, %d of %d pairs of tasks talk", empty.Name, report.Sent, n, n))
	return nil
}

// emptied waits until no task of the stack runs on the host.
func (d *demo) emptied(ctx context.Context, asked, h *hosts.Host) error {
	return poll(ctx, "tasks of the stack to leave "+h.Name, func() (bool, error) {
		out, err := h.Docker(ctx, "ps", "--quiet", "--filter", "name=shop_")
		if err != nil || out != "" {
			return false, err
		}
		_, err = asked.WaitService(ctx, "shop_api", services["api"])
		return true, err
	})
}

// filled waits until the update of api is over, the stack is complete and api runs on the
// host.
func (d *demo) filled(ctx context.Context, asked, h *hosts.Host) error {
	return poll(ctx, "tasks of api on "+h.Name, func() (bool, error) {
		state, err := asked.Docker(ctx, "service", "inspect", "--format", "{{.UpdateStatus.State}}", "shop_api")
		if err != nil || state != "completed" {
			return false, err
		}
		err = d.complete(asked)
		return !strings.HasPrefix(d.task("api", h).Name, "no-task"), err
	})
}

// poll asks ok until it says yes or fails, or ctx ends.
func poll(ctx context.Context, what string, ok func() (bool, error)) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := ok(); err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
}

func (d *demo) status() error {
	d.Title("What Weft says")
	for _, args := range [][]string{{"weft", "status"}, {"weft", "peers"}, {"weft", "networks"}} {
		if _, err := d.Exec(d.alpha(), args...); err != nil {
			return err
		}
	}
	for _, h := range d.Lab.Hosts {
		if _, err := d.Exec(h, "weft", "audit", "--settle", "2m"); err != nil {
			return err
		}
	}
	d.OK("weft status is well, weft audit finds no difference on any host")
	return nil
}

func (d *demo) remove() error {
	d.Title("Remove it")
	a := d.alpha()
	if err := d.Dockers(d.Lab.Hosts[1], []string{"rm", "-f", "beside"}); err != nil {
		return err
	}
	if err := d.Dockers(a, []string{"stack", "rm", "shop"}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(d.Ctx, 2*time.Minute)
	defer cancel()
	var last error
	err := poll(ctx, "the tasks to leave the network", func() (bool, error) {
		_, last = a.Docker(ctx, "network", "rm", "app")
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", err, last)
	}
	d.Prompt(a.Name, "docker network rm app")
	fmt.Println("app")
	for _, h := range d.Lab.Hosts {
		if err := d.bare(ctx, h); err != nil {
			return err
		}
	}
	d.OK("stack, network and plugin removed; no link, route or rule of Weft's is left on any host")
	return nil
}

// bare removes the plugin from a host, once it forgot the network, and looks for
// what is left.
func (d *demo) bare(ctx context.Context, h *hosts.Host) error {
	err := poll(ctx, h.Name+" to forget the network", func() (bool, error) {
		out, err := h.Exec(ctx, "weft", "networks", "-o", "json")
		return out == "[]", err
	})
	if err != nil {
		return err
	}
	if err := d.Dockers(h, []string{"plugin", "disable", hosts.PluginName}, []string{"plugin", "rm", hosts.PluginName}); err != nil {
		return err
	}
	out, err := d.Exec(h, "sh", "-c", "{ ip -br link; ip route show table all; iptables-save; ipset list -n; } | grep -ic weft || true")
	if err == nil && out != "0" {
		err = fmt.Errorf("host %s: %s lines of Weft's are left", h.Name, out)
	}
	return err
}
