package kernel_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestEncryptedTraffic has two hosts with the planner's output for an encrypted network:
// containers talk across, nothing of it is seen between, also while a key changes, and
// after the device was removed. In a guest with the kernel's module (WEFT_GUEST) that
// does it, else Weft's own.
func TestEncryptedTraffic(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{false, true} {
		t.Run(map[bool]string{false: "stack", true: "program"}[on], func(t *testing.T) { encryptedTraffic(t, on) })
	}
}

func encryptedTraffic(t *testing.T, on bool) {
	a, b, seen, plain := encryptedPair(t, on)
	program := func() {
		a.program(t, a, b)
		b.program(t, a, b)
	}
	talk := func(what string) {
		t.Helper()
		echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
		echo(t, b.containers[0], a.containers[0], a.endpoints[0].IPv6.Addr())
		if t.Failed() {
			t.Fatal(what)
		}
	}
	talk("at first")
	a.Do(func() {
		all, err := a.k.Tunnels(t.Context())
		if err != nil || len(all) != 1 || len(all[0].Peers) != 1 || all[0].Peers[0].Received == 0 || !all[0].Peers[0].Talks() {
			t.Errorf("state of the device: %+v, %v", all, err)
		} else if guest := os.Getenv("WEFT_GUEST") != ""; all[0].Module != guest {
			t.Errorf("the kernel's module encrypts: %t, want %t", all[0].Module, guest)
		} else if at := all[0].Peers[0].Handshake; at.Nanosecond() == 0 {
			t.Errorf("the handshake was at %v: a change of keys waits for those after a moment, which whole seconds hide", at)
		}
	})
	if on { // nothing passes the stack any more
		for _, m := range []*machine{a, b} {
			m.Run(t, "iptables -I FORWARD -j DROP\nip6tables -I FORWARD -j DROP")
		}
		talk("past the stack")
		for _, m := range []*machine{a, b} {
			m.Run(t, "iptables -D FORWARD -j DROP\nip6tables -D FORWARD -j DROP")
		}
	}
	old, next := kerneltest.TunnelOf(a.self.ID, 2).Keys[0], kerneltest.TunnelOf(a.self.ID, 2).Keys[1]
	for _, step := range []store.Tunnel{
		{Keys: []store.WGKey{old, next}}, {Keys: []store.WGKey{old, next}, Last: true},
		{Keys: []store.WGKey{next, next}, Last: true}, {Keys: []store.WGKey{next, next}}, {Keys: []store.WGKey{next}},
	} {
		step.Port = kerneltest.TunnelPort
		a.self.Tunnel = step
		program()
		awaitHandshakes(t, a)
		talk("while the key changes")
	}
	a.Run(t, "ip link del weftw0")
	program()
	talk("after the device was removed")
	if seen.Load() == 0 || plain.Load() != 0 {
		t.Errorf("%d frames seen between the hosts, %d of them plain", seen.Load(), plain.Load())
	}
	t.Logf("SCORE encrypted traffic | runs 7 | %d of %d frames plain (target 0)", plain.Load(), seen.Load())
}

// encryptedPair makes two hosts with a container each on an encrypted network, with the
// port program or without, and counts what is seen between them.
func encryptedPair(t *testing.T, on bool) (a, b *machine, seen, plain *atomic.Int64) {
	t.Helper()
	fabric := kerneltest.NewPlace(t)
	fabric.Run(t, "ip link add fabric type bridge\nip link set fabric up\niptables -P FORWARD ACCEPT")
	a, b = newMachineWith(t, fabric, 1, false, loaded(t, on)), newMachineWith(t, fabric, 2, false, loaded(t, on))
	seen, plain = watch(t, fabric)
	for i, m := range []*machine{a, b} {
		m.encrypted, m.self.Tunnel = true, kerneltest.TunnelOf(m.self.ID, 1)
		m.endpoint(10 + i)
		m.Run(t, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\niptables -P FORWARD DROP\nip6tables -P FORWARD DROP")
	}
	program := func() {
		a.program(t, a, b)
		b.program(t, a, b)
	}
	program()
	for _, m := range []*machine{a, b} {
		m.start(t)
		m.containers[0].Run(t, `ip route add 10.9.0.1 dev eth0
			ip route add 10.9.0.0/25 via 10.9.0.1
			ip -6 route add fd09::1 dev eth0
			ip -6 route add fd09::/65 via fd09::1`)
	}
	program() // they have joined
	return a, b, seen, plain
}

// A peer that is heard from elsewhere than its record says, as when a NAT in front of it
// takes another port, is sought where it was heard, also after a repair.
func TestRoamedPeerStaysWhereItWasHeard(t *testing.T) {
	a, b, _, _ := encryptedPair(t, true)
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
	endpoint := func() (at netip.AddrPort) {
		a.Do(func() {
			all, err := a.k.Tunnels(t.Context())
			if err != nil || len(all) != 1 || len(all[0].Peers) != 1 {
				t.Errorf("state of the device: %+v, %v", all, err)
				return
			}
			at = all[0].Peers[0].Endpoint
		})
		return at
	}
	// What still comes to the old port must not be the first that the NAT sees.
	b.Run(t, fmt.Sprintf("iptables -t raw -I PREROUTING -p udp --dport %[1]d -j DROP\niptables -t nat -A POSTROUTING -p udp --sport %[1]d -j SNAT --to-source 192.0.2.2:31000", kerneltest.TunnelPort))
	b.Do(func() {
		if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			t.Error(err)
		}
	})
	moved := netip.MustParseAddrPort("192.0.2.2:31000")
	for tries := 0; endpoint() != moved; tries++ {
		if tries == 100 {
			t.Fatalf("the peer is sought at %s, and heard from %s", endpoint(), moved)
		}
		b.containers[0].Do(func() {
			if c, err := net.Dial("udp", netip.AddrPortFrom(a.endpoints[0].IPv4.Addr(), 7000).String()); err == nil {
				_, _ = c.Write([]byte("hello")) // nobody answers yet
				_ = c.Close()
			}
		})
		time.Sleep(50 * time.Millisecond)
	}
	b.Run(t, fmt.Sprintf("iptables -t raw -D PREROUTING -p udp --dport %d -j DROP", kerneltest.TunnelPort))
	a.Run(t, "ip route flush table 4796\nip -6 route flush table 4796")
	a.program(t, a, b)
	if at := endpoint(); at != moved {
		t.Errorf("after a repair the peer is sought at %s, and was heard from %s", at, moved)
	}
	echo(t, a.containers[0], b.containers[0], b.endpoints[0].IPv4.Addr())
}

// awaitHandshakes waits until each way of the machine was answered.
func awaitHandshakes(t *testing.T, m *machine) {
	t.Helper()
	for range 100 {
		done := true
		m.Do(func() {
			all, err := m.k.Tunnels(t.Context())
			if err != nil {
				t.Error(err)
			}
			for _, d := range all {
				for _, p := range d.Peers {
					done = done && p.Talks()
				}
			}
		})
		if done {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Error("a way is not answered")
}

// watch counts the frames on the fabric, and those in which echo's words stand plain.
func watch(t *testing.T, fabric *kerneltest.Place) (seen, plain *atomic.Int64) {
	t.Helper()
	seen, plain = new(atomic.Int64), new(atomic.Int64)
	fd, err := -1, error(nil)
	fabric.Do(func() {
		const all = uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8) // in network order
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	})
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	}
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				continue // nothing for a moment
			}
			seen.Add(1)
			if bytes.Contains(buf[:n], []byte("hello")) {
				plain.Add(1)
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		_ = unix.Close(fd)
	})
	return seen, plain
}

// withoutModule: the guest is the one place where the kernel has WireGuard.
func withoutModule(t *testing.T) {
	t.Helper()
	kerneltest.Need(t, "no-wireguard", os.Getenv("WEFT_GUEST") == "", "needs a kernel without WireGuard's module; the guest's has it")
}

// A device of the wrong kind is refused with the reason.
func TestWireGuardIsRefused(t *testing.T) {
	withoutModule(t)
	k := newKernel(t, kernel.Config{WireGuard: "kernel"})
	refused(t, k, "modprobe wireguard")
	socket, err := net.ListenPacket("udp", fmt.Sprintf(":%d", kerneltest.TunnelPort))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	refused(t, open(t, kernel.Config{}), "is in use by another program")
}

// The device that Weft's own WireGuard left is not gone on with where the setting forbids
// that.
func TestKernelWireGuardRefusesWhatOwnLeft(t *testing.T) {
	withoutModule(t)
	before := newKernel(t, kernel.Config{})
	examples := kerneltest.Examples()
	e := examples[slices.IndexFunc(examples, func(e kerneltest.Example) bool { return e.Name == "encrypted" })]
	passHost(t, before, e.HostPlan())
	before.Close()
	if _, err := netlink.LinkByName(dataplane.TunnelNames[0]); err != nil {
		t.Fatal("Weft's own WireGuard left nothing: ", err)
	}
	after := open(t, kernel.Config{WireGuard: "kernel"})
	for range 2 {
		refused(t, after, "modprobe wireguard")
	}
	if all, err := after.Tunnels(t.Context()); len(all) > 0 || err != nil {
		t.Errorf("devices that work: %+v, %v", all, err)
	}
}

// refused makes what a host with an encrypted network needs: of all that, the device
// alone must fail, with the reason.
func refused(t *testing.T, k *kernel.Kernel, why string) {
	t.Helper()
	examples := kerneltest.Examples()
	e := examples[slices.IndexFunc(examples, func(e kerneltest.Example) bool { return e.Name == "encrypted" })]
	have, err := k.Read(t.Context(), store.HostVNI)
	if err != nil {
		t.Fatal(err)
	}
	told := false
	for _, err := range k.Apply(t.Context(), dataplane.Diff(e.HostPlan(), have)) {
		switch err.Op.Object.(type) {
		case dataplane.WireGuard:
			told = strings.Contains(err.Error(), why)
			t.Log(err)
		case dataplane.TunnelPeer:
		default:
			t.Error(err)
		}
	}
	if !told {
		t.Errorf("not told: %s", why)
	}
}
