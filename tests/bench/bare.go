package main

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weftnet/weft/tests/hosts"
)

// bareMTU is what WireGuard leaves of the underlay.
const bareMTU = 1440

// bare connects the two hosts by a WireGuard device each, by wireguard-go's own program:
// what Weft's encrypted networks are measured against. It has a cgroup of its own, as a
// plugin and a container have: the scheduler shares the processor out among cgroups first,
// and threads of one do without some of the switches (1.78 Gbit/s for 1.64 with two cores).
func (s *setup) bare() (path, error) {
	program := filepath.Join(s.plugin, "wireguard-go")
	if out, err := exec.CommandContext(s.ctx, "go", "build", "-o", program, "golang.zx2c4.com/wireguard").CombinedOutput(); err != nil {
		return path{}, fmt.Errorf("build wireguard-go: %w: %s", err, out)
	}
	var keys [2]*ecdh.PrivateKey
	for i := range keys {
		k, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return path{}, err
		}
		keys[i] = k
	}
	for i, h := range []*hosts.Host{s.a, s.b} {
		other := []*hosts.Host{s.b, s.a}[i]
		cmd := h.Command(s.ctx, program, "-f", "bare0")
		cmd.WaitDelay = time.Second
		if err := cmd.Start(); err != nil {
			return path{}, err
		}
		s.started = append(s.started, cmd)
		if err := h.Confine(cmd.Process.Pid, "wireguard-go"); err != nil {
			return path{}, err
		}
		config := fmt.Sprintf("set=1\nprivate_key=%s\nlisten_port=51999\npublic_key=%s\nendpoint=%s\nallowed_ip=10.40.0.0/24\n\n",
			hex.EncodeToString(keys[i].Bytes()), hex.EncodeToString(keys[1-i].PublicKey().Bytes()), netip.AddrPortFrom(other.Address, 51999))
		if err := s.configure(fmt.Sprintf("/proc/%d/root/run/wireguard/bare0.sock", cmd.Process.Pid), config); err != nil {
			return path{}, err
		}
		if _, err := h.Exec(s.ctx, "sh", "-ec", fmt.Sprintf("ip addr add 10.40.0.%d/24 dev bare0; ip link set bare0 mtu %d up", i+1, bareMTU)); err != nil {
			return path{}, err
		}
	}
	return path{"bare wireguard-go", s.a.NetNS(), s.b.NetNS(), netip.MustParseAddr("10.40.0.2")}, nil
}

// configure speaks WireGuard's configuration protocol once the socket is there.
func (s *setup) configure(socket, config string) error {
	var conn net.Conn
	var err error
	for range 50 {
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, config); err != nil {
		return err
	}
	answer := make([]byte, 64)
	n, err := conn.Read(answer)
	if err == nil && !strings.HasPrefix(string(answer[:n]), "errno=0") {
		err = fmt.Errorf("wireguard-go answers %q", answer[:n])
	}
	return err
}

// end ends the programs that were started, by their ids.
func (s *setup) end() {
	for _, c := range s.started {
		_ = c.Process.Signal(os.Interrupt)
		_ = c.Wait() // killed with the lab, if it does not end
	}
}
