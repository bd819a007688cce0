// Command demoencrypted shows an encrypted network: three Docker hosts on this machine,
// one of them behind a NAT, a capture on the cable of each, and what could make
// something leave in the clear: the plugin killed, a key changed, rules flushed. Every
// command and its output is real. Everything is removed at the end, also after Ctrl-C or
// a failure.
package main

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/weftnet/weft/tests/hosts"
	"github.com/weftnet/weft/tests/show"
)

// secret is what the containers tell each other.
const secret = "THE-SECRET-OF-WEFT"

func main() {
	show.Main(func(s *show.Show) error {
		d := &demo{Show: s, address: map[*hosts.Host]string{}}
		return d.run()
	})
}

// demo is one run. The hosts are alpha, beta, and gamma behind a NAT.
type demo struct {
	*show.Show
	address  map[*hosts.Host]string // of its container
	captures []*hosts.Capture
}

func (d *demo) run() error {
	if err := d.Build(); err != nil {
		return err
	}
	d.Title("Three Docker hosts, gamma behind a NAT")
	if err := d.Hosts("alpha", "beta", "gamma/home"); err != nil {
		return err
	}
	d.OK("three dockerds; gamma is reached from outside by " + d.Lab.Hosts[2].Public.String() + " alone")
	for _, step := range []func() error{d.install, d.capture, d.network, d.talk, d.kill, d.rotate, d.flush, d.reveal, d.remove} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) install() error {
	d.Title("Install the managed plugin on all, with a cluster key")
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	a, b, c := d.Lab.Hosts[0], d.Lab.Hosts[1], d.Lab.Hosts[2]
	common := []string{"WEFT_JOIN=" + a.Address.String() + "," + b.Address.String(), "WEFT_KEY=" + hex.EncodeToString(key)}
	for _, h := range d.Lab.Hosts {
		settings := common
		if h == c {
			settings = append(settings, "WEFT_PUBLIC_ADDRESS="+h.Public.String())
		}
		if err := d.InstallOn(h, settings...); err != nil {
			return err
		}
	}
	d.OK("plugin created, set and enabled; gamma was told its public address")
	return nil
}

func (d *demo) capture() error {
	d.Title("Capture everything on each cable")
	for _, h := range d.Lab.Hosts {
		c, err := d.Lab.Underlay.Capture(d.Ctx, h, "ip or ip6")
		if err != nil {
			return err
		}
		d.captures = append(d.captures, c)
	}
	d.OK("tcpdump listens before the first encrypted network is there")
	return nil
}

func (d *demo) network() error {
	d.Title("One encrypted network, made on each host")
	for i, h := range d.Lab.Hosts {
		if err := d.Dockers(h, []string{"network", "create", "-d", hosts.PluginName, "-o", "encrypted", "--subnet", "10.32.0.0/16", "--gateway", "10.32.0.1",
			"--ip-range", fmt.Sprintf("10.32.%d.0/24", i+1), "app"}); err != nil {
			return err
		}
		if err := d.Dockers(h, []string{"run", "-d", "--name", "web", "--network", "app", hosts.Image,
			"sh", "-c", "mkdir /www; echo " + secret + " from " + h.Name + " >/www/index.html; exec httpd -f -p 80 -h /www"}); err != nil {
			return err
		}
		a, err := hosts.Container{Host: h, Name: "web"}.Address(d.Ctx, "app")
		if err != nil {
			return err
		}
		d.address[h] = a.String()
	}
	d.OK("network app with -o encrypted, and a container on each host")
	return nil
}

// all lets every container ask every other one for its page.
func (d *demo) all() error {
	for _, from := range d.Lab.Hosts {
		for _, to := range d.Lab.Hosts {
			if from != to {
				if err := d.until(from, secret+" from "+to.Name, "exec", "web", "timeout", "5", "wget", "-qO-", "http://"+d.address[to]+"/"); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// until repeats a command until its output has want: hosts hear of each other's
// containers within a second or two.
func (d *demo) until(h *hosts.Host, want string, args ...string) error {
	var err error
	for range 20 {
		if err = d.Expect(h, want, args...); err == nil || d.Ctx.Err() != nil {
			return err
		}
		time.Sleep(500 * time.Millisecond)
	}
	return err
}

func (d *demo) talk() error {
	d.Title("Containers that talk across all three")
	if err := d.all(); err != nil {
		return err
	}
	for _, args := range [][]string{{"weft", "status"}, {"weft", "encryption"}, {"weft", "peers"}} {
		if _, err := d.Exec(d.Lab.Hosts[0], args...); err != nil {
			return err
		}
	}
	d.OK("each container reaches each other one, also to and from behind the NAT")
	return nil
}

func (d *demo) kill() error {
	d.Title("kill -9 the plugin, with all its processes")
	if err := d.KillPlugin(d.Lab.Hosts[0]); err != nil {
		return err
	}
	if err := d.all(); err != nil {
		return err
	}
	d.OK("killed, and all containers talk again")
	return nil
}

func (d *demo) rotate() error {
	d.Title("Change a key")
	h := d.Lab.Hosts[1]
	before, err := d.device(h)
	if err != nil {
		return err
	}
	if _, err := d.Exec(h, "weft", "encryption", "rotate"); err != nil {
		return err
	}
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		out, err := h.Exec(d.Ctx, "weft", "encryption")
		if err != nil {
			return err
		}
		now, err := d.device(h)
		if err != nil {
			return err
		}
		if now != before && !strings.Contains(out, "still in use") {
			d.OK("beta has another key; all containers talked while it changed")
			_, err := d.Exec(h, "weft", "encryption")
			return err
		}
		if err := d.all(); err != nil {
			return err
		}
	}
	return errors.New("the key still changes")
}

// device is what weft encryption says of the host's first device, its key among it.
func (d *demo) device(h *hosts.Host) (string, error) {
	out, err := h.Exec(d.Ctx, "weft", "encryption")
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "weftw0 ") {
			return line, err
		}
	}
	return "", errors.Join(err, fmt.Errorf("host %s has no device: %s", h.Name, out))
}

func (d *demo) flush() error {
	d.Title("Flush rules and routes, remove the WireGuard device")
	h := d.Lab.Hosts[0]
	for _, line := range []string{"iptables -F; iptables -t raw -F; iptables -t nat -F", "ip route flush table 4796", "ip link del weftw0"} {
		if _, err := d.Exec(h, "sh", "-c", line); err != nil {
			return err
		}
		if err := d.all(); err != nil {
			return err
		}
	}
	d.OK("taken away one after the other, and repaired")
	return nil
}

func (d *demo) reveal() error {
	d.Title("What was on the cables")
	for i, c := range d.captures {
		lines, err := c.Stop(d.Ctx)
		if err != nil {
			return err
		}
		raw, err := os.ReadFile(c.File)
		if err != nil {
			return err
		}
		wireguard, inside := 0, 0
		for _, l := range lines {
			if strings.Contains(l, ".4798") || strings.Contains(l, ".4799") {
				wireguard++
			}
			if strings.Contains(l, " 10.32.") {
				inside++
			}
		}
		plain := bytes.Count(raw, []byte(secret))
		fmt.Printf("%s: %d packets, %d of WireGuard; the secret in %d, a container's address in %d\n", d.Lab.Hosts[i].Name, len(lines), wireguard, plain, inside)
		if plain+inside > 0 || wireguard == 0 {
			return errors.New("something was plain, or nothing was captured")
		}
	}
	d.OK("WireGuard on every cable, and not one plain byte of the containers")
	return nil
}

func (d *demo) remove() error {
	d.Title("Remove it")
	for _, h := range d.Lab.Hosts {
		if err := d.Dockers(h, []string{"rm", "-f", "web"}, []string{"network", "rm", "app"},
			[]string{"plugin", "disable", hosts.PluginName}, []string{"plugin", "rm", hosts.PluginName}); err != nil {
			return err
		}
		out, err := d.Exec(h, "sh", "-c", "ip -br link; ip rule; iptables-save | grep -i weft || echo no rules of Weft")
		if err != nil {
			return err
		}
		if strings.Contains(strings.ReplaceAll(out, "no rules of Weft", ""), "weft") || strings.Contains(out, "4796") {
			return fmt.Errorf("links or rules are left on %s: %s", h.Name, out)
		}
	}
	d.OK("containers, network and plugin removed; no link, route or rule of Weft's is left on the hosts")
	return nil
}
