package tests

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// answering returns those of the addresses of which a page comes to a container.
func answering(t *testing.T, from hosts.Container, addresses ...string) []string {
	t.Helper()
	out := strings.Fields(command(t, from, "sh", "-c", "for a in "+strings.Join(addresses, " ")+"; do (timeout 3 wget -q -O /dev/null http://$a/ && echo $a) & done; wait"))
	slices.Sort(out)
	return out
}

// internal: from a network without a way out nobody reaches a port that is published on
// his host, by Weft or by Docker; nor does from an internal network of Docker's own.
func (r *routed) internal(t *testing.T) {
	a := r.lab.Hosts[0]
	docker(t, a, "network", "create", "--ipv6", "--subnet", "10.85.0.0/16", "--subnet", "fd00:85::/64", "dockers")
	serve(t, run(t, a, "cweft", "--network", "app", "--ip6", "fd00:80::d1", "-p", "8070:80"), "word")
	serve(t, run(t, a, "cdocker", "--network", "dockers", "-p", "8071:80"), "word")
	ask := func(name string, second int, args ...string) (weft, docks []string) {
		t.Helper()
		gw4, gw6 := fmt.Sprintf("10.%d.0.1", second), fmt.Sprintf("fd00:%d::1", second)
		docker(t, a, append([]string{"network", "create", "--subnet", fmt.Sprintf("10.%d.0.0/16", second), "--gateway", gw4,
			"--ipv6", "--subnet", fmt.Sprintf("fd00:%d::/64", second), "--gateway", gw6}, append(args, name)...)...)
		c := run(t, a, "c"+name, "--network", name)
		for _, a := range answering(t, c, gw4+":8070", "["+gw6+"]:8070", gw4+":8071", "["+gw6+"]:8071") {
			family := "IPv4"
			if strings.HasPrefix(a, "[") {
				family = "IPv6"
			}
			if strings.HasSuffix(a, ":8070") {
				weft = append(weft, family)
			} else {
				docks = append(docks, family)
			}
		}
		docker(t, a, "rm", "--force", c.Name)
		docker(t, a, "network", "rm", name)
		t.Logf("SCORE %s: a container of %s network | runs 4 | reaches Weft's published port by %v, Docker's by %v", r.way, name, weft, docks)
		return weft, docks
	}
	if weft, docks := ask("open", 86, "-d", hosts.PluginName, "-o", r.way); len(weft) != 2 || !slices.Contains(docks, "IPv4") {
		t.Errorf("a network with a way out reaches Weft's published port by %v, Docker's by %v", weft, docks)
	}
	weft, least := ask("dockers-in", 87, "--internal")
	if r.name == "debian" { // which has no rules for IPv6, and a process at the port
		weft = slices.DeleteFunc(weft, func(s string) bool { return s == "IPv6" })
	}
	if len(weft) > 0 || slices.Contains(least, "IPv4") {
		t.Errorf("an internal network of Docker's reaches Weft's published port by %v, Docker's by %v", weft, least)
	}
	for name, args := range map[string][]string{
		"led-in": {"-o", "gateway=weft"}, "routed-in": {"-o", "mode=routed"}, "encrypted-in": {"-o", "encrypted", "-o", "key=" + strings.Repeat("ab", 32)},
	} {
		weft, docks := ask(name, 88, append(args, "-d", hosts.PluginName, "--internal")...)
		if docks = slices.DeleteFunc(docks, func(s string) bool { return slices.Contains(least, s) }); len(weft)+len(docks) > 0 {
			t.Errorf("network %s reaches Weft's published port by %v, and Docker's, which Docker's internal networks do not, by %v", name, weft, docks)
		}
	}
	docker(t, a, "rm", "--force", "cweft", "cdocker")
	docker(t, a, "network", "rm", "dockers")
}

// tellClients answers whoever asks at a port, by TCP and UDP, in the network namespace at
// path, with the client's address.
func tellClients(t *testing.T, path string, port int) {
	t.Helper()
	var l net.Listener
	var p net.PacketConn
	if err := hosts.InNetNS(path, func() (err error) {
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			p, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = l.Close(), p.Close() })
	tell := func(a net.Addr) []byte {
		at, _ := netip.ParseAddrPort(a.String())
		return []byte(at.Addr().Unmap().String())
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			_, _ = c.Read(make([]byte, 10)) // what is unread when it is closed resets it
			_, _ = c.Write(tell(c.RemoteAddr()))
			_ = c.Close()
		}
	}()
	go func() {
		for {
			_, from, err := p.ReadFrom(make([]byte, 10))
			if err != nil {
				return
			}
			_, _ = p.WriteTo(tell(from), from)
		}
	}()
}

// seenAs waits until tellClients at an address answers over the protocol that the client,
// in the network namespace at path, has the wanted address, or any if that is empty.
func seenAs(t *testing.T, path, proto, address, want string) {
	t.Helper()
	eventually(t, 20*time.Second, proto+" "+address+" sees the client as "+want, func(ctx context.Context) error {
		return hosts.InNetNS(path, func() error {
			c, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, proto, address)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err = c.Write([]byte("who")); err != nil {
				return err
			}
			got := make([]byte, 64)
			n, err := c.Read(got)
			if err == nil && want != "" && string(got[:n]) != want {
				err = fmt.Errorf("as %q", got[:n])
			}
			return err
		})
	})
}

// clients: a published port, TCP or UDP, sees the address of its client, and so does
// another host of a container that is not masqueraded.
func (r *routed) clients(t *testing.T) {
	a, b := r.lab.Hosts[0], r.lab.Hosts[1]
	who := run(t, a, "who", "--network", "app", "--ip6", "fd00:80::b2", "-p", "8070:81", "-p", "8070:81/udp", "-p", "[::1]:8073:81", "-p", "[::1]:8073:81/udp", "-p", "82")
	far := run(t, b, "whofar", "--network", "app", "--ip6", "fd00:80::b3")
	path, farPath := netnsOf(t, who), netnsOf(t, far)
	tellClients(t, path, 81)
	tellClients(t, path, 82)
	for _, proto := range []string{"tcp", "udp"} {
		seenAs(t, b.NetNS(), proto, net.JoinHostPort(a.Address.String(), "8070"), b.Address.String())
		seenAs(t, b.NetNS(), proto, net.JoinHostPort(a.Address6.String(), "8070"), b.Address6.String())
		seenAs(t, a.NetNS(), proto, net.JoinHostPort(a.Address.String(), "8070"), a.Address.String())
		seenAs(t, farPath, proto, net.JoinHostPort(a.Address.String(), "8070"), b.Address.String()) // masqueraded there
		seenAs(t, a.NetNS(), proto, "127.0.0.1:8070", "")
		seenAs(t, a.NetNS(), proto, "[::1]:8070", "")
		seenAs(t, a.NetNS(), proto, "[::1]:8073", "")
	}
	out, err := a.Exec(t.Context(), "weft", "ports")
	chosen := regexp.MustCompile(`0\.0\.0\.0:(\d+)->82/tcp`).FindStringSubmatch(out)
	if err != nil || chosen == nil {
		t.Fatalf("weft ports shows no port of Weft's choice: %v\n%s", err, out)
	}
	seenAs(t, b.NetNS(), "tcp", net.JoinHostPort(a.Address.String(), chosen[1]), b.Address.String())

	docker(t, a, "network", "create", "-d", hosts.PluginName, "-o", r.way, "-o", "masquerade=false", "--subnet", "10.86.0.0/16", "--gateway", "10.86.0.1", "bare")
	bare := run(t, a, "whobare", "--network", "bare")
	if _, err := b.Exec(t.Context(), "ip", "route", "add", "10.86.0.0/16", "via", a.Address.String()); err != nil {
		t.Fatal(err)
	}
	tellClients(t, b.NetNS(), 8072)
	for _, proto := range []string{"tcp", "udp"} {
		there := net.JoinHostPort(b.Address.String(), "8072")
		seenAs(t, netnsOf(t, bare), proto, there, addressOf(t, bare, "bare").String())
		seenAs(t, path, proto, there, a.Address.String())
	}
	if _, err := b.Exec(t.Context(), "ip", "route", "del", "10.86.0.0/16", "via", a.Address.String()); err != nil {
		t.Error(err)
	}
	docker(t, a, "rm", "--force", who.Name, bare.Name)
	docker(t, b, "rm", "--force", far.Name)
	docker(t, a, "network", "rm", "bare")
	figure(t, r.way+": addresses of clients on "+r.name, 19, "seen as they are, by TCP and UDP")
}
