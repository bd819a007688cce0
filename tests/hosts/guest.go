package hosts

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// GuestAddress is what a guest is to take on the cable.
var GuestAddress = netip.AddrFrom4([4]byte{192, 0, 2, 100})

// Guest is a virtual machine on the cable, with a kernel of its own and no Docker. Its
// initramfs says what it does.
type Guest struct {
	lab  *Lab
	port string
	cmd  *exec.Cmd
}

// NewGuest makes the cable's end for a guest. What waits there while the guest gets no
// processor is not lost.
func (l *Lab) NewGuest(ctx context.Context) (*Guest, error) {
	g := &Guest{lab: l, port: "h-guest"}
	return g, l.Underlay.script(ctx, "tuntap add dev "+g.port+" mode tap\nlink set "+g.port+" txqueuelen 10000 master "+mainBridge+" up\n")
}

// Start starts the machine, which computes without the processor's help, from a kernel
// and an initramfs, with a disk (/dev/vda). Stop ends it, or the lab's end.
func (g *Guest) Start(ctx context.Context, kernel, initramfs, disk string) error {
	g.cmd = command(ctx, nil, "ip", "netns", "exec", g.lab.Underlay.Namespace, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024", "-display", "none",
		"-serial", "file:"+g.consoleFile(), "-monitor", "unix:"+g.monitor()+",server=on,wait=off",
		"-netdev", "tap,id=cable,ifname="+g.port+",script=no,downscript=no", "-device", "virtio-net-pci,netdev=cable",
		"-drive", "file="+disk+",format=raw,if=virtio",
		"-kernel", kernel, "-initrd", initramfs, "-append", "console=ttyS0 quiet")
	return g.cmd.Start()
}

func (g *Guest) consoleFile() string { return filepath.Join(g.lab.Dir, "guest.console") }
func (g *Guest) monitor() string     { return filepath.Join(g.lab.Dir, "guest.monitor") }

// Console returns what the guest has printed.
func (g *Guest) Console() string {
	raw, err := os.ReadFile(g.consoleFile())
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// Capture records the guest's packets on the cable, also while it starts.
func (g *Guest) Capture(ctx context.Context, filter string) (*Capture, error) {
	return capture(ctx, g.lab.Dir, g.lab.Underlay.Namespace, g.port, filter)
}

// Reset does what the button does: nothing in the guest is asked or told.
func (g *Guest) Reset(ctx context.Context) error {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", g.monitor())
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintln(conn, "system_reset"); err != nil {
		return err
	}
	// It prompts at first, and again when the command is done.
	said := bufio.NewReader(conn)
	for range 2 {
		if _, err := said.ReadString(')'); err != nil {
			return fmt.Errorf("qemu's monitor: %w", err)
		}
	}
	return nil
}

// Stop ends the machine as if its cord was pulled.
func (g *Guest) Stop() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait() // it was killed
}

// MakeDisk makes a file with an empty file system for a guest.
func MakeDisk(ctx context.Context, path string, mebibytes int) error {
	_, err := run(ctx, nil, "mke2fs", strings.Fields(fmt.Sprintf("-q -t ext4 %s %dM", path, mebibytes))...)
	return err
}
