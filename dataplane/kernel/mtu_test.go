package kernel_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane/kerneltest"
	"github.com/weftnet/weft/store"
)

// TestRunningContainersFollowTheMTU has the link of one host become smaller and larger
// again while containers run, which keep the MTU of their interfaces: TCP goes on, what is
// too long is refused to its sender, and what fits arrives, with the port program's maps
// and without the destinations among them.
func TestRunningContainersFollowTheMTU(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{store.ModeVXLAN, store.ModeRouted, encryptedMode} {
		// Both families on an IPv4 underlay: a routed network's IPv6 takes VXLAN.
		overhead := map[string]int{store.ModeVXLAN: 50, store.ModeRouted: 50, encryptedMode: 60}[mode]
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/known %t", mode, known), func(t *testing.T) {
				all := fastHosts(t, mode, [2]bool{true, true})
				a, b := all[0], all[1]
				link := func(mtu int) {
					b.Run(t, fmt.Sprintf("ip link set under0 mtu %d", mtu))
					b.self.MTU, b.under.MTU = mtu, mtu
					for _, m := range all {
						m.program(t, all...)
						if !known {
							m.k.ClearMap(t, "weft_dests")
						}
						for _, c := range m.containers {
							c.Run(t, "ip -4 route flush cache\nip -6 route flush cache") // Linux keeps what it was told for ten minutes
						}
					}
				}
				for _, mtu := range []int{1400, 1500} {
					link(mtu)
					for _, ip := range []func(e store.Endpoint) netip.Prefix{
						func(e store.Endpoint) netip.Prefix { return e.IPv4 },
						func(e store.Endpoint) netip.Prefix { return e.IPv6 },
					} {
						for _, way := range []struct {
							from, to *machine
							sender   int
						}{{a, b, 0}, {b, a, 0}, {a, a, 1}} {
							at := ip(way.to.endpoints[0]).Addr()
							from, to := way.from.containers[way.sender], way.to.containers[0]
							echo(t, from, to, at)
							if err := whole(t, from, to, at, mtu-overhead+1); !errors.Is(err, syscall.EMSGSIZE) {
								t.Errorf("link of %d: %d bytes to %s: %v", mtu, mtu-overhead+1, at, err)
							}
							if err := whole(t, from, to, at, mtu-overhead); err != nil {
								t.Errorf("link of %d: %d bytes to %s: %v", mtu, mtu-overhead, at, err)
							}
						}
					}
				}
				for _, m := range all {
					sum, err := m.k.Counters()
					if err != nil {
						t.Error(err)
					}
					for reason, n := range sum.Dropped {
						t.Errorf("%s: %d frames dropped: %s", m.self.ID, n, reason)
					}
				}
			})
		}
	}
}

// whole sends a packet of so many bytes that must not be fragmented, a few times: the
// first is lost where only the answer to it tells that it was too long.
func whole(t *testing.T, from, to *kerneltest.Place, address netip.Addr, mtu int) error {
	t.Helper()
	headers, level, option := 28, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if address.Is6() {
		headers, level, option = 48, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	var in net.PacketConn
	var out net.Conn
	var err error
	to.Do(func() { in, err = net.ListenPacket("udp", netip.AddrPortFrom(address, 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		err2 := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, unix.IP_PMTUDISC_DO) })
		return errors.Join(err, err2)
	}}
	from.Do(func() { out, err = dialer.Dial("udp", in.LocalAddr().String()) })
	if err != nil {
		_ = in.Close()
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), out.Close() }()
	for range 10 {
		if _, err = out.Write(make([]byte, mtu-headers)); err != nil {
			return err
		}
		_ = in.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		var n int
		if n, _, err = in.ReadFrom(make([]byte, 1<<16)); err == nil {
			if n != mtu-headers {
				return fmt.Errorf("%d bytes arrive of %d", n, mtu-headers)
			}
			return nil
		}
	}
	return err
}
