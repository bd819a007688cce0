package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
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

// smaller gives the second host a link with a smaller MTU: new containers on both have
// one that fits, and TCP of running ones goes on.
func smaller(t *testing.T, lab *hosts.Lab) {
	a, b := lab.Hosts[0], lab.Hosts[1]
	for _, w := range ways {
		serve(t, hosts.Container{Host: b, Name: w.name}, "word")
		command(t, hosts.Container{Host: b, Name: w.name}, "dd", "if=/dev/zero", "of=/srv/big", "bs=1M", "count=1")
	}
	if _, err := b.Exec(t.Context(), "ip", "link", "set", "eth0", "mtu", "1400"); err != nil {
		t.Fatal(err)
	}
	for _, w := range ways {
		for _, h := range lab.Hosts {
			eventually(t, 20*time.Second, "host "+h.Name+" knows the smaller MTU of network "+w.name, func(context.Context) error {
				for _, n := range view[[]networkView](t, h, "networks") {
					if n.Subnets[0].Pool == fmt.Sprintf("10.%d.0.0/16", w.second) && n.EffectiveMTU != 1400-w.overhead {
						return fmt.Errorf("it is %d", n.EffectiveMTU)
					}
				}
				return nil
			})
		}
		onA, onB := []string{"--network", w.name}, []string{"--network", w.name}
		if w.name != "routed" {
			onA, onB = append(onA, "--ip6", fmt.Sprintf("fd00:%d::a2", w.second)), append(onB, "--ip6", fmt.Sprintf("fd00:%d::b2", w.second))
		}
		from, to := run(t, a, "new-"+w.name, onA...), run(t, b, "new-"+w.name, onB...)
		at := addressOf(t, to, w.name)
		reach(t, from, at.String())
		largest(t, from, to, at, 1400-w.overhead)
		if w.name == "vxlan" {
			continue // what runs on a bridge keeps its MTU, and nobody between can tell it
		}
		old := hosts.Container{Host: a, Name: w.name}
		served := addressOf(t, hosts.Container{Host: b, Name: w.name}, w.name).String()
		if out := command(t, old, "sh", "-c", "timeout 20 wget -q -O - http://"+served+"/big | wc -c"); strings.TrimSpace(out) != "1048576" {
			t.Errorf("network %s: a running container gets %s bytes of 1 MiB over the smaller link", w.name, out)
		}
	}
	figure(t, "underlay of one host becomes smaller", len(ways), "both hosts give new containers what fits")
}
