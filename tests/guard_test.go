package tests

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// closedWithoutRules takes rules away while the plugin is stopped, so that nothing
// repairs them, and tries what they forbid.
func (d *drift) closedWithoutRules(t *testing.T) {
	both := func(command string) []string {
		return []string{fmt.Sprintf("iptables-%s -w %s", d.backend, command), fmt.Sprintf("ip6tables-%s -w %s", d.backend, command)}
	}
	macs := []string{bridgeMAC(t, d.h, "app")}
	if got := [2]bool{d.injects(t, true), d.injects(t, false)}; got != [2]bool{true, false} {
		t.Errorf("VXLAN of a peer and of a stranger is accepted: %v, want true, false", got)
	}
	d.findsOpenDoors(t, macs)
	tried, open := 0, []string{}
	for _, c := range []struct {
		what     string
		commands []string
		tunnel   bool // VXLAN from strangers gets in while this is away
		soak     bool // only there: others show as much
	}{
		{what: "filter INPUT chain", commands: both("-F WEFT-INPUT")},
		{what: "filter FORWARD chain", commands: both("-F WEFT-FORWARD"), soak: true},
		{what: "raw chain", commands: both("-t raw -F WEFT-PREROUTING"), soak: true},
		{what: "filter table", commands: both("-F")},
		{what: "raw table", commands: both("-t raw -F"), soak: true},
		// Where bridged frames pass iptables, Docker's FORWARD policy still drops.
		{what: "filter and raw tables", commands: append(both("-F"), both("-t raw -F")...)},
		{what: "filter and raw tables and policies", commands: slices.Concat(both("-P FORWARD ACCEPT"), both("-F"), both("-t raw -F")), tunnel: true},
		{what: "nft ruleset", commands: []string{"nft flush ruleset"}, tunnel: true},
	} {
		if c.soak && !soak() || d.backend != "nft" && strings.HasPrefix(c.what, "nft") {
			continue
		}
		d.stopped(t, func() {
			for _, line := range c.commands {
				if out, err := d.h.Exec(t.Context(), "sh", "-c", line); err != nil {
					t.Fatalf("%s: %v %s", line, err, out)
				}
			}
			tried += closed(t, d.one, "app", d.lab, macs)
			tried++
			if got := d.injects(t, false); got != c.tunnel {
				t.Errorf("without the %s VXLAN from a stranger gets in: %v, want %v", c.what, got, c.tunnel)
			}
			if c.tunnel {
				open = append(open, c.what)
			}
		})
		if slices.Contains(c.commands, both("-P FORWARD ACCEPT")[0]) { // Docker's
			if out, err := d.h.Exec(t.Context(), "sh", "-c", both("-P FORWARD DROP")[0]); err != nil {
				t.Fatalf("%v %s", err, out)
			}
		}
	}
	figure(t, "K4 open while rules are away, "+d.backend, tried,
		"container to host: 0; VXLAN from a stranger: only while both tables are flushed (%s)", strings.Join(open, ", "))
}

// findsOpenDoors opens what the plugin closes, all at once, to see that the trial
// would find it.
func (d *drift) findsOpenDoors(t *testing.T, macs []string) {
	t.Helper()
	conf := "/proc/sys/net/%s/conf/" + d.net.Bridge + "/%s"
	d.stopped(t, func() {
		var script strings.Builder
		for _, v := range []string{"", "6"} {
			fmt.Fprintf(&script, "ip%stables-%s -w -F\n", v, d.backend)
		}
		for _, s := range [][2]string{{"ipv4", "rp_filter"}, {"ipv4", "arp_ignore"}, {"ipv6", "disable_ipv6"}} {
			fmt.Fprintf(&script, "echo 0 > "+conf+"\n", s[0], s[1])
		}
		if out, err := d.h.Exec(t.Context(), "sh", "-c", script.String()); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		if open, tried := openWays(t, d.one, "app", d.lab, macs); len(open) == 0 {
			t.Errorf("with all doors open, none of %d ways is found open", tried)
		} else {
			t.Logf("with all doors open: %s", strings.Join(open, ", "))
		}
	})
}

// stopped runs f while the plugin's process is stopped, and waits for the repair.
func (d *drift) stopped(t *testing.T, f func()) {
	t.Helper()
	before, err := d.kept(t.Context(), "rules rules6 sysctls")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := d.h.PluginPID(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
		f()
	}()
	for start := time.Now(); ; pause(t, 50*time.Millisecond) {
		now, err := d.kept(t.Context(), "rules rules6 sysctls")
		if err == nil && now == before {
			return
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("not repaired: %v\n%s", err, difference(before, now))
		}
	}
}

// injects sends a VXLAN packet for container one to its host and reports whether
// the container gets it: as the peer, or as a stranger on the underlay.
func (d *drift) injects(t *testing.T, peer bool) bool {
	t.Helper()
	from := "/run/netns/" + d.lab.Underlay.Namespace
	if peer {
		from = d.lab.Hosts[1].NetNS()
	}
	return injects(t, from, d.one, "10.32.1.10", d.net.VNI)
}

// injects sends a VXLAN packet for a container, with an address on the network, from a
// network namespace to the container's host, and reports whether the container gets it.
func injects(t *testing.T, from string, to hosts.Container, address string, vni int) bool {
	t.Helper()
	const port = 7100
	var ear net.PacketConn
	err := inside(t, to, func() (err error) {
		ear, err = net.ListenPacket("udp4", fmt.Sprintf("%s:%d", address, port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ear.Close() }()
	mac, err := net.ParseMAC(command(t, to, "cat", "/sys/class/net/"+interfaceOf(t, to, address)+"/address"))
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr(address)
	packet := vxlanPacket(vni, mac, ip.Next(), ip, port)
	err = hosts.InNetNS(from, func() error {
		conn, err := net.Dial("udp4", to.Host.Address.String()+":4797")
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		for range 3 {
			if _, err := conn.Write(packet); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_ = ear.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	_, _, err = ear.ReadFrom(make([]byte, 100))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return err == nil
}

// vxlanPacket is the payload of a VXLAN packet (RFC 7348) with a UDP packet to a
// container in it:
//
//	VXLAN 8 | Ethernet 14 | IPv4 20 | UDP 8 | "in"
func vxlanPacket(vni int, to net.HardwareAddr, source, destination netip.Addr, port uint16) []byte {
	const text = "in"
	p := binary.BigEndian.AppendUint32(nil, 0x08000000)
	p = binary.BigEndian.AppendUint32(p, uint32(vni)<<8)
	p = append(p, to...)
	p = append(p, 0x02, 0, 0, 0, 0, 0x42)
	p = binary.BigEndian.AppendUint16(p, 0x0800)
	ip := []byte{0x45, 0, 0, byte(28 + len(text)), 0, 0, 0, 0, 64, syscall.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, source.AsSlice()...), destination.AsSlice()...)
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	p = append(p, ip...)
	for _, v := range []uint16{port, port, uint16(8 + len(text)), 0} { // no checksum
		p = binary.BigEndian.AppendUint16(p, v)
	}
	return append(p, text...)
}
