package kernel

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	wgconn "golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane"
)

const tunDevice = "/dev/net/tun"

// ownDevice is a WireGuard device in this process. Its link stays when the process ends:
// then it takes packets, and drops them.
type ownDevice struct {
	dev *device.Device
	tun *steadyTUN
}

// steadyTUN hides from the device that its link goes up and down and changes its MTU:
// the device would close its sockets, and open others in the namespace of another
// thread.
type steadyTUN struct {
	tun.Device
	mtu     atomic.Int64
	changed chan struct{} // cap 1: mtu is another one
	events  chan tun.Event
}

func (t *steadyTUN) MTU() (int, error)        { return int(t.mtu.Load()), nil }
func (t *steadyTUN) Events() <-chan tun.Event { return t.events }

// tell tells the device of changes of the MTU, and of nothing else, until it is closed.
func (t *steadyTUN) tell() {
	defer close(t.events)
	for {
		select {
		case _, open := <-t.Device.Events():
			if !open {
				return
			}
		case <-t.changed:
			t.events <- tun.EventMTUUpdate
		}
	}
}

// tunQueue is how many packets wait for the device's process while it gets no processor,
// as on a busy host: as many as the kernel's module lets wait. Of full TCP segments more
// would be a second of delay.
const tunQueue = 1024

// startOwn makes the link of a device of this process, or takes the one that a former
// process left, and starts the device.
func (k *Kernel) startOwn(o dataplane.WireGuard) error {
	k.tunnels.end(o.Name)
	f, err := k.openTUN(o.Name)
	if err != nil {
		return err
	}
	// A read of a link that is down would end the device.
	if err := errors.Join(k.route.do(change(o.Name, mtuAttr(o.MTU))), k.raise(o.Name, false, true)); err != nil {
		return errors.Join(err, f.Close())
	}
	raw, err := tun.CreateTUNFromFile(f, o.MTU)
	if err != nil {
		return errors.Join(fmt.Errorf("link %s: %w", o.Name, err), f.Close())
	}
	t := &steadyTUN{Device: raw, changed: make(chan struct{}, 1), events: make(chan tun.Event, 1)}
	t.mtu.Store(int64(o.MTU))
	go t.tell()
	log := &device.Logger{
		Verbosef: func(format string, args ...any) { k.log.Debug("wireguard", "text", fmt.Sprintf(format, args...)) },
		Errorf:   func(format string, args ...any) { k.log.Debug("wireguard", "text", fmt.Sprintf(format, args...)) },
	}
	d := &ownDevice{dev: device.NewDevice(t, wgconn.NewDefaultBind(), log), tun: t}
	k.tunnels.mu.Lock()
	defer k.tunnels.mu.Unlock()
	k.tunnels.own[o.Name] = d
	return nil
}

// openTUN opens the link. It outlives this process only once its alias says whose it is.
func (k *Kernel) openTUN(name string) (*os.File, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("this kernel has no WireGuard, and %s, with which Weft would do without, cannot be opened (modprobe wireguard, or modprobe tun): %w", tunDevice, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tunDevice, err)
	}
	fail := func(what string, err error) (*os.File, error) {
		return nil, errors.Join(fmt.Errorf("link %s: %s: %w", name, what, err), unix.Close(fd))
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fail("name", err)
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fail("make", err)
	}
	if err := k.route.do(change(name, aliasAttr(dataplane.TunnelAlias), queueAttr(tunQueue))); err != nil {
		return fail("alias", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fail("keep", err)
	}
	// Only now: a file without a link is at once ready to fail, for Go's poller.
	return os.NewFile(uintptr(fd), tunDevice), nil
}

func (d *ownDevice) close() { d.dev.Close() }

// over reports whether the device has ended: somebody removed its link.
func (d *ownDevice) over() bool {
	select {
	case <-d.dev.Wait():
		return true
	default:
		return false
	}
}

// up opens the sockets.
func (d *ownDevice) up(mtu int) error {
	if d.tun.mtu.Swap(int64(mtu)) != int64(mtu) {
		select {
		case d.tun.changed <- struct{}{}:
		default: // told already
		}
	}
	return d.dev.Up()
}

// configure speaks the protocol of https://www.wireguard.com/xplatform/#configuration-protocol.
func (d *ownDevice) configure(c wgtypes.Config) error {
	var b bytes.Buffer
	if c.PrivateKey != nil {
		fmt.Fprintf(&b, "private_key=%s\n", hex.EncodeToString(c.PrivateKey[:]))
	}
	if c.ListenPort != nil {
		fmt.Fprintf(&b, "listen_port=%d\n", *c.ListenPort)
	}
	for _, p := range c.Peers {
		fmt.Fprintf(&b, "public_key=%s\n", hex.EncodeToString(p.PublicKey[:]))
		if p.Remove {
			b.WriteString("remove=true\n")
			continue
		}
		if p.Endpoint != nil {
			fmt.Fprintf(&b, "endpoint=%s\n", p.Endpoint)
		}
		if p.PresharedKey != nil {
			fmt.Fprintf(&b, "preshared_key=%s\n", hex.EncodeToString(p.PresharedKey[:]))
		}
		if p.PersistentKeepaliveInterval != nil {
			fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", int(p.PersistentKeepaliveInterval.Seconds()))
		}
		for _, n := range p.AllowedIPs {
			fmt.Fprintf(&b, "allowed_ip=%s\n", prefixOf(n))
		}
	}
	return d.dev.IpcSetOperation(&b)
}

// state asks the device in the same protocol.
func (d *ownDevice) state() (*wgtypes.Device, error) {
	var b bytes.Buffer
	if err := d.dev.IpcGetOperation(&b); err != nil {
		return nil, err
	}
	out := &wgtypes.Device{}
	var p *wgtypes.Peer
	lines := bufio.NewScanner(&b)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "=")
		if name == "public_key" {
			key, err := hexKey(value)
			if err != nil {
				return nil, err
			}
			out.Peers = append(out.Peers, wgtypes.Peer{PublicKey: key})
			p = &out.Peers[len(out.Peers)-1]
			continue
		}
		if err := stateField(out, p, name, value); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return out, lines.Err()
}

// stateField takes over one line of a device's state; p is the peer that it is about.
func stateField(out *wgtypes.Device, p *wgtypes.Peer, name, value string) error {
	number, numberErr := strconv.ParseInt(value, 10, 64)
	switch name {
	case "private_key":
		key, err := hexKey(value)
		out.PrivateKey, out.PublicKey = key, key.PublicKey()
		return err
	case "listen_port":
		out.ListenPort = int(number)
		return numberErr
	}
	if p == nil {
		return nil
	}
	switch name {
	case "preshared_key":
		key, err := hexKey(value)
		p.PresharedKey = key
		return err
	case "persistent_keepalive_interval":
		p.PersistentKeepaliveInterval = time.Duration(number) * time.Second
		return numberErr
	case "endpoint":
		at, err := netip.ParseAddrPort(value)
		p.Endpoint = net.UDPAddrFromAddrPort(at)
		return err
	case "last_handshake_time_sec":
		if number != 0 {
			p.LastHandshakeTime = time.Unix(number, 0)
		}
		return numberErr
	case "last_handshake_time_nsec": // comes after the seconds
		p.LastHandshakeTime = p.LastHandshakeTime.Add(time.Duration(number))
		return numberErr
	case "rx_bytes":
		p.ReceiveBytes = number
		return numberErr
	case "tx_bytes":
		p.TransmitBytes = number
		return numberErr
	case "allowed_ip":
		prefix, err := netip.ParsePrefix(value)
		p.AllowedIPs = append(p.AllowedIPs, ipNet(prefix))
		return err
	}
	return nil
}

func hexKey(text string) (k wgtypes.Key, err error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(k) {
		return k, fmt.Errorf("the device's answer has a key of %d bytes", len(b))
	}
	return wgtypes.Key(b), nil
}
