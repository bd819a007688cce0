package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// ways are the kinds of networks whose MTU differs, with what they add to a packet over
// IPv4.
var ways = []struct {
	name     string
	second   int // of the subnet
	overhead int
	args     []string
}{
	{"vxlan", 70, 50, nil},
	{"routed", 71, 0, []string{"-o", "mode=routed"}},
	{"routed-six", 74, 50, []string{"-o", "mode=routed"}}, // IPv6 over an IPv4 underlay takes a tunnel
	{"encrypted", 72, 60, []string{"-o", "encrypted"}},
	{"encrypted-routed", 73, 60, []string{"-o", "encrypted", "-o", "mode=routed"}},
}

// TestMTU sends the largest packets that may not be fragmented, on underlays of three
// sizes.
func TestMTU(t *testing.T) {
	t.Parallel()
	for _, mtu := range []int{1280, 1500, 9000} {
		t.Run(strconv.Itoa(mtu), func(t *testing.T) { fullSize(t, mtu) })
	}
}

func fullSize(t *testing.T, mtu int) {
	lab := newLabMTU(t, mtu, 2, nil)
	install(t, lab, pluginDir(t, "", "test"), clusterKey)
	a, b := lab.Hosts[0], lab.Hosts[1]
	arrived := 0
	for _, w := range ways {
		fits := mtu - w.overhead
		args := append([]string{"--gateway", fmt.Sprintf("10.%d.0.1", w.second)}, w.args...)
		six := append([]string{"--ipv6", "--subnet", fmt.Sprintf("fd00:%d::/64", w.second)}, args...)
		if fits < 1280 {
			_, err := a.Docker(t.Context(), append([]string{"network", "create", "-d", hosts.PluginName, "--subnet", fmt.Sprintf("10.%d.0.0/16", w.second)}, append(six, "too-small")...)...)
			if err == nil || !strings.Contains(err.Error(), "IPv6 needs packets of 1280 bytes") {
				t.Errorf("%s with IPv6 on an underlay of %d: %v", w.name, mtu, err)
			}
			if w.name == "routed-six" {
				continue // without IPv6 it is the one before
			}
		} else if w.name != "routed" {
			args = six
		}
		createNetwork(t, lab, w.name, w.second, args...)
		onA, onB := []string{"--network", w.name}, []string{"--network", w.name}
		far := fmt.Sprintf("fd00:%d::b1", w.second)
		dual := fits >= 1280 && w.name != "routed"
		if dual { // hosts with Docker's IPAM need ranges or addresses of their own
			onA, onB = append(onA, "--ip6", fmt.Sprintf("fd00:%d::a1", w.second)), append(onB, "--ip6", far)
		}
		from, to := run(t, a, w.name, onA...), run(t, b, w.name, onB...)
		all := []netip.Addr{addressOf(t, to, w.name)}
		if dual {
			all = append(all, netip.MustParseAddr(far))
		}
		for _, at := range all {
			reach(t, from, at.String())
			arrived += largest(t, from, to, at, fits)
		}
	}
	figure(t, fmt.Sprintf("packets of full size with DF on an underlay of %d", mtu), arrived, "all arrived; one byte more is refused to the sender")
	if mtu == 1500 {
		smaller(t, lab)
	}
}

// largest sends a packet of exactly the MTU, and one that is larger by a byte.
func largest(t *testing.T, from, to hosts.Container, at netip.Addr, mtu int) int {
	t.Helper()
	headers := 28
	if at.Is6() {
		headers = 48
	}
	if err := whole(t, from, to, at, mtu-headers); err != nil {
		t.Errorf("from %s to %s: %d bytes do not arrive: %v", from.Name, at, mtu, err)
		return 0
	}
	if err := whole(t, from, to, at, mtu-headers+1); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("from %s to %s: %d bytes are sent: %v", from.Name, at, mtu+1, err)
	}
	return 1
}

// whole sends a datagram with so many bytes that must not be fragmented.
func whole(t *testing.T, from, to hosts.Container, at netip.Addr, size int) error {
	t.Helper()
	var in, out *net.UDPConn
	if err := inside(t, to, func() (err error) {
		in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 7001)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := inside(t, from, func() (err error) {
		out, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 7001)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	return arrives(out, in, at.Is6(), size)
}

// smaller gives the second host a link with a smaller MTU, and then the former one: new
// containers on both hosts get what fits, and running ones are told.
func smaller(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	for _, w := range ways {
		serve(t, hosts.Container{Host: b, Name: w.name}, "word")
		command(t, hosts.Container{Host: b, Name: w.name}, "dd", "if=/dev/zero", "of=/srv/big", "bs=1M", "count=1")
	}
	told := 0
	for _, mtu := range []int{1400, 1500} {
		if _, err := b.Exec(t.Context(), "ip", "link", "set", "eth0", "mtu", strconv.Itoa(mtu)); err != nil {
			t.Fatal(err)
		}
		for _, w := range ways {
			fits := mtu - w.overhead
			for _, h := range lab.Hosts {
				eventually(t, 20*time.Second, fmt.Sprintf("host %s knows the MTU of network %s", h.Name, w.name), func(context.Context) error {
					for _, n := range view[[]networkView](t, h, "networks") {
						if n.Subnets[0].Pool == fmt.Sprintf("10.%d.0.0/16", w.second) && n.EffectiveMTU != fits {
							return fmt.Errorf("it is %d", n.EffectiveMTU)
						}
					}
					return nil
				})
			}
			onA, onB := hosts.Container{Host: a, Name: w.name}, hosts.Container{Host: b, Name: w.name}
			served := addressOf(t, onB, w.name).String()
			if out := command(t, onA, "sh", "-c", "timeout 20 wget -q -O - http://"+served+"/big | wc -c"); strings.TrimSpace(out) != "1048576" {
				t.Errorf("network %s: a running container gets %s bytes of 1 MiB over a link of %d", w.name, out, mtu)
			}
			told += follows(t, onA, onB, w.name, w.second, fits) + follows(t, onB, onA, w.name, w.second, fits)
			if mtu == 1400 {
				fresh(t, a, b, w.name, w.second, fits)
			}
		}
	}
	figure(t, "underlay of one host becomes smaller, and larger again", told, "running containers send what fits, and more is refused; new ones get what fits")
}

// follows waits until a running container can send packets of the MTU, and is refused
// longer ones, and returns to how many addresses.
func follows(t *testing.T, from, to hosts.Container, network string, second, fits int) int {
	t.Helper()
	all := []netip.Addr{addressOf(t, to, network)}
	if network != "routed" {
		all = append(all, netip.MustParseAddr(fmt.Sprintf("fd00:%d::%s1", second, to.Host.Name)))
	}
	for _, at := range all {
		headers := 28
		if at.Is6() {
			headers = 48
		}
		eventually(t, 20*time.Second, fmt.Sprintf("%s on %s sends %d bytes to %s, and no more", from.Name, from.Host.Name, fits, at), func(context.Context) error {
			if err := inside(t, from, forgetMTU); err != nil {
				t.Fatal(err)
			}
			switch err := whole(t, from, to, at, fits-headers+1); {
			case err == nil:
				return fmt.Errorf("%d bytes arrive", fits+1)
			case !errors.Is(err, syscall.EMSGSIZE):
				return err
			}
			return whole(t, from, to, at, fits-headers)
		})
	}
	return len(all)
}

// forgetMTU takes away what Linux was told of ways, which it keeps for ten minutes.
func forgetMTU() error {
	for _, family := range []string{"-4", "-6"} {
		if out, err := exec.Command("ip", family, "route", "flush", "cache").CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s route flush cache: %w: %s", family, err, out)
		}
	}
	return nil
}

// fresh starts containers, whose interfaces have the MTU.
func fresh(t *testing.T, a, b *hosts.Host, network string, second, fits int) {
	t.Helper()
	onA, onB := []string{"--network", network}, []string{"--network", network}
	if network != "routed" {
		onA, onB = append(onA, "--ip6", fmt.Sprintf("fd00:%d::a2", second)), append(onB, "--ip6", fmt.Sprintf("fd00:%d::b2", second))
	}
	from, to := run(t, a, "new-"+network, onA...), run(t, b, "new-"+network, onB...)
	at := addressOf(t, to, network)
	reach(t, from, at.String())
	largest(t, from, to, at, fits)
}
