package hosts

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Underlay is the cable between the hosts: a network namespace with a bridge and
// a port per host. Addresses are 192.0.2.0/24 and 2001:db8::/64; .1 and ::1 are
// the hosts' default gateway and lead nowhere.
type Underlay struct {
	Namespace string // name for ip netns
	MTU       int
}

const mainBridge = "cable0"

func newUnderlay(ctx context.Context, lab string, mtu int) (*Underlay, error) {
	u := &Underlay{Namespace: lab + "-underlay", MTU: mtu}
	if _, err := run(ctx, nil, "ip", "netns", "add", u.Namespace); err != nil {
		return nil, err
	}
	return u, u.script(ctx, `
link set lo up
link add `+mainBridge+` type bridge
link set `+mainBridge+` up
address add 192.0.2.1/24 dev `+mainBridge+`
address add 2001:db8::1/64 dev `+mainBridge+` nodad
`)
}

// script runs a batch of ip commands in the underlay.
func (u *Underlay) script(ctx context.Context, lines string) error {
	return ipBatch(ctx, u.Namespace, lines)
}

func ipBatch(ctx context.Context, netns, lines string) error {
	cmd := command(ctx, nil, "ip", "-n", netns, "-batch", "-")
	cmd.Stdin = strings.NewReader(lines)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip -n %s -batch: %w: %s", netns, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// connect plugs a host in: eth0 in its namespace.
func (u *Underlay) connect(ctx context.Context, h *Host) error {
	if h.router != nil {
		return h.router.connect(ctx, h)
	}
	mtu := strconv.Itoa(u.MTU)
	err := u.script(ctx, `
link add `+port(h)+` mtu `+mtu+` type veth peer name eth0 mtu `+mtu+` netns `+h.netns+`
link set `+port(h)+` master `+mainBridge+` up
`)
	if err != nil {
		return err
	}
	far := ""
	for _, r := range h.lab.routers {
		if r.plain {
			far += "route add " + r.inside.Masked().String() + " via " + r.Public.String() + "\n"
		}
	}
	return ipBatch(ctx, h.netns, `
link set lo up
address add `+h.Address.String()+`/24 dev eth0
address add `+h.Address6.String()+`/64 dev eth0 nodad
link set eth0 up
route add default via 192.0.2.1
route add default via 2001:db8::1
`+far)
}

// port is the host's on the cable, or that of the router in front of it.
func port(h *Host) string {
	if h.router != nil {
		return "h-" + h.router.Name
	}
	return "h-" + h.Name
}

// Renumber gives the host another IPv4 address on the underlay, as a new lease of
// DHCP does. Address is the new one from then on.
func (h *Host) Renumber(ctx context.Context, to netip.Addr) error {
	err := ipBatch(ctx, h.netns, `
address del `+h.Address.String()+`/24 dev eth0
address add `+to.String()+`/24 dev eth0
route replace default via 192.0.2.1
`)
	if err == nil {
		h.Address = to
	}
	return err
}

// Cut drops everything to and from the host, silently: its link stays up.
func (u *Underlay) Cut(ctx context.Context, h *Host) error {
	_, err := run(ctx, nil, "bridge", "-n", u.Namespace, "link", "set", "dev", port(h), "state", "0")
	return err
}

// Unplug takes the host's link down, which the host sees.
func (u *Underlay) Unplug(ctx context.Context, h *Host) error {
	return u.script(ctx, "link set "+port(h)+" down\n")
}

// Partition splits the hosts: those named in one group reach each other and
// nobody else. Packets inside a group are not touched, and links stay up. A host in
// no group reaches all.
func (u *Underlay) Partition(ctx context.Context, groups ...[]*Host) error {
	for i, from := range groups {
		for j, to := range groups {
			for _, a := range from {
				for _, b := range to {
					if i == j {
						continue
					}
					// br_netfilter shows bridged packets to iptables; it is on in
					// every new namespace.
					for _, program := range []string{"iptables", "ip6tables"} {
						if _, err := run(ctx, nil, "ip", "netns", "exec", u.Namespace, program, "-w", "-A", "FORWARD",
							"-m", "physdev", "--physdev-in", port(a), "--physdev-out", port(b), "-j", "DROP"); err != nil {
							return err
						}
					}
				}
			}
		}
	}
	return nil
}

// Heal undoes every Partition, and Cut and Unplug for the hosts given.
func (u *Underlay) Heal(ctx context.Context, hosts ...*Host) error {
	for _, program := range []string{"iptables", "ip6tables"} {
		if _, err := run(ctx, nil, "ip", "netns", "exec", u.Namespace, program, "-w", "-F", "FORWARD"); err != nil {
			return err
		}
	}
	var b strings.Builder
	for _, h := range hosts {
		out, err := run(ctx, nil, "bridge", "-n", u.Namespace, "-d", "link", "show", "dev", port(h))
		if err != nil {
			return err
		}
		if strings.Contains(out, "state forwarding") {
			continue // leaving the bridge would lose packets
		}
		// Leaving the bridge and joining it again resets the port's state.
		fmt.Fprintf(&b, "link set %s nomaster\nlink set %s master %s up\n", port(h), port(h), mainBridge)
	}
	return u.script(ctx, b.String())
}

// Wire opens a packet socket on the cable's end at the host: frames that are written to it
// arrive there.
func (h *Host) Wire() (fd int, err error) {
	err = InNetNS("/run/netns/"+h.lab.Underlay.Namespace, func() error {
		link, err := net.InterfaceByName(port(h))
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index})
	})
	return fd, err
}

// Capture is a running tcpdump.
type Capture struct {
	File string // pcap, in the lab's folder
	cmd  *exec.Cmd
}

// Capture records the host's packets on the cable that match filter (pcap syntax) until
// Stop; of a host behind a NAT those of its router.
func (u *Underlay) Capture(ctx context.Context, h *Host, filter string) (*Capture, error) {
	return capture(ctx, h.lab.Dir, u.Namespace, port(h), filter)
}

func capture(ctx context.Context, dir, netns, link, filter string) (*Capture, error) {
	f, err := os.CreateTemp(dir, "capture-*.pcap")
	if err != nil {
		return nil, err
	}
	c := &Capture{File: f.Name()}
	if err := f.Close(); err != nil {
		return nil, err
	}
	c.cmd = command(ctx, nil, "ip", "netns", "exec", netns,
		"tcpdump", "-i", link, "-Z", "root", "-n", "-U", "-s", "0", "-w", c.File, filter)
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	// tcpdump writes the file's header once it listens.
	wctx, cancel := context.WithTimeout(ctx, Patience(10*time.Second))
	defer cancel()
	err = waitFor(wctx, 10*time.Millisecond, "tcpdump to listen", func() (bool, error) {
		st, err := os.Stat(c.File)
		return err == nil && st.Size() > 0, err
	})
	if err != nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		return nil, err
	}
	return c, nil
}

// Stop ends the capture and returns its packets as text, a line each.
func (c *Capture) Stop(ctx context.Context) ([]string, error) {
	if err := c.cmd.Process.Signal(syscall.SIGINT); err != nil {
		return nil, err
	}
	_ = c.cmd.Wait() // its exit status says nothing about the file
	out, err := run(ctx, nil, "tcpdump", "-n", "-e", "-r", c.File)
	if err != nil || out == "" {
		return nil, err
	}
	return strings.Split(out, "\n"), nil
}
