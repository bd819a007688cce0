// Command demo shows Weft at work: two Docker hosts on this machine, the managed
// plugin on both, containers that talk. Every command and its output is real.
// Everything is removed at the end, also after Ctrl-C or a failure.
package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/weftnet/weft/tests/hosts"
	"github.com/weftnet/weft/tests/show"
)

func main() {
	show.Main(func(s *show.Show) error { return demo{s}.run() })
}

// demo is one run.
type demo struct{ *show.Show }

func (d demo) run() error {
	if err := d.Build(); err != nil {
		return err
	}
	d.Title("Two Docker hosts on one cable")
	if err := d.Hosts("alpha", "beta"); err != nil {
		return err
	}
	d.OK("two dockerds, each with its own network, storage and rules")
	a, b := d.Lab.Hosts[0], d.Lab.Hosts[1]
	steps := []func(a, b *hosts.Host) error{d.install, d.network, d.talk, d.publish, d.kill, d.look}
	for _, step := range steps {
		if err := step(a, b); err != nil {
			return err
		}
	}
	return nil
}

func (d demo) install(a, b *hosts.Host) error {
	d.Title("Install the managed plugin on both")
	if err := d.Install("WEFT_JOIN=" + a.Address.String() + "," + b.Address.String()); err != nil {
		return err
	}
	d.OK("plugin created, set and enabled on both hosts")
	return nil
}

func (d demo) network(a, b *hosts.Host) error {
	d.Title("One network, made on both hosts")
	for i, h := range []*hosts.Host{a, b} {
		if err := d.Dockers(h, []string{"network", "create", "-d", hosts.PluginName, "--subnet", "10.32.0.0/16",
			"--ip-range", fmt.Sprintf("10.32.%d.0/24", i+1), "app"}); err != nil {
			return err
		}
	}
	if err := d.Dockers(a, []string{"network", "ls"}); err != nil {
		return err
	}
	d.OK("network app on both hosts, one subnet, an address range for each")
	return nil
}

func (d demo) talk(a, b *hosts.Host) error {
	d.Title("Containers that talk across the hosts")
	if err := d.Dockers(a, []string{"run", "-d", "--name", "web", "--network", "app", "--ip", "10.32.1.10", "-p", "8080:80", hosts.Image,
		"sh", "-c", "mkdir /www; echo hello from web on alpha >/www/index.html; exec httpd -f -p 80 -h /www"}); err != nil {
		return err
	}
	if err := d.Dockers(b, []string{"run", "-d", "--name", "client", "--network", "app", hosts.Image, "sleep", "1000"}); err != nil {
		return err
	}
	if err := d.Expect(b, "0% packet loss", "exec", "client", "ping", "-c", "3", "10.32.1.10"); err != nil {
		return err
	}
	if err := d.Expect(b, "hello from web", "exec", "client", "wget", "-qO-", "http://10.32.1.10/"); err != nil {
		return err
	}
	d.OK("ping and TCP from a container on beta to one on alpha")
	return nil
}

func (d demo) publish(a, b *hosts.Host) error {
	d.Title("A published port")
	if err := d.Expect(a, "8080->80/tcp", "ps"); err != nil {
		return err
	}
	url := "http://" + a.Address.String() + ":8080/"
	out, err := d.Exec(b, "busybox", "wget", "-qO-", url)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "hello from web") {
		return fmt.Errorf("%s answered %q", url, out)
	}
	d.OK("port 8080 of alpha answers from beta and shows in docker ps")
	return nil
}

func (d demo) kill(a, b *hosts.Host) error {
	d.Title("kill -9 the plugin on both hosts while a ping runs")
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	d.Prompt(b.Name, "docker exec client ping -i 0.01 -c 500 10.32.1.10 &")
	go func() {
		out, err := b.Docker(d.Ctx, "exec", "client", "ping", "-q", "-i", "0.01", "-c", "500", "10.32.1.10")
		done <- result{out, err}
	}()
	for _, h := range []*hosts.Host{a, b} {
		if err := d.KillPlugin(h); err != nil {
			return err
		}
	}
	r := <-done
	fmt.Println(r.out)
	if r.err != nil {
		return r.err
	}
	if !strings.Contains(r.out, "500 packets transmitted, 500 packets received") {
		return errors.New("packets were lost while the plugin was dead")
	}
	d.OK("no packet of 500 lost while both plugins were killed")
	return nil
}

func (d demo) look(a, b *hosts.Host) error {
	d.Title("What Weft says")
	for _, args := range [][]string{{"weft", "status"}, {"weft", "peers"}, {"weft", "endpoints"}, {"weft", "audit"}} {
		if _, err := d.Exec(a, args...); err != nil {
			return err
		}
	}
	d.OK("weft status is well, weft audit finds no difference")
	d.Title("Remove it")
	for _, h := range []*hosts.Host{a, b} {
		name := map[string]string{a.Name: "web", b.Name: "client"}[h.Name]
		if err := d.Dockers(h, []string{"rm", "-f", name}, []string{"network", "rm", "app"},
			[]string{"plugin", "disable", hosts.PluginName}, []string{"plugin", "rm", hosts.PluginName}); err != nil {
			return err
		}
		out, err := d.Exec(h, "sh", "-c", "ip -br link; iptables-save | grep -i weft || echo no rules of Weft")
		if err != nil {
			return err
		}
		if strings.Contains(strings.ReplaceAll(out, "no rules of Weft", ""), "weft") || !strings.Contains(out, "no rules of Weft") {
			return fmt.Errorf("links or rules are left on %s: %s", h.Name, out)
		}
	}
	d.OK("containers, network and plugin removed; no link or rule of Weft's is left on the hosts")
	return nil
}
