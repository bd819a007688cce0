package kernel

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

const (
	// A session is renewed every two minutes while it is used, and keepalives use it
	// (WireGuard's paper, section 6.1): after three the peer does not answer.
	talkTime      = 3 * time.Minute
	keepaliveTime = 25 * time.Second
)

// tunnels are the WireGuard devices of the host.
type tunnels struct {
	module wgModule
	mu     sync.Mutex // guards own
	own    map[string]*ownDevice
}

func (t *tunnels) close() {
	t.module.close()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.own {
		d.close()
	}
	clear(t.own)
}

// end ends the device of this process that has the link, if there is one.
func (t *tunnels) end(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d := t.own[name]; d != nil {
		d.close()
		delete(t.own, name)
	}
}

// running returns the device of this process that has the link, or nil.
func (t *tunnels) running(name string) *ownDevice {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.own[name]
	if d == nil || d.over() {
		return nil
	}
	return d
}

// configure changes a device, wherever it is.
func (t *tunnels) configure(name string, c wgtypes.Config) error {
	if d := t.running(name); d != nil {
		return d.configure(c)
	}
	return t.module.do(name, func(m wgClient) error { return m.ConfigureDevice(name, c) })
}

// device returns the state of a device, wherever it is, or os.ErrNotExist: its process
// is gone, or there is no such link.
func (t *tunnels) device(name string) (out *wgtypes.Device, err error) {
	if d := t.running(name); d != nil {
		return d.state()
	}
	err = t.module.do(name, func(m wgClient) (err error) {
		out, err = m.Device(name)
		return err
	})
	return out, err
}

// devices returns the state of those of dataplane.TunnelNames that there are.
func (t *tunnels) devices() (map[int]*wgtypes.Device, error) {
	out := map[int]*wgtypes.Device{}
	for i, name := range dataplane.TunnelNames {
		d, err := t.device(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("WireGuard device %s: %w", name, err)
		}
		out[i] = d
	}
	return out, nil
}

// hasModule reports whether the kernel's module is loaded.
func hasModule() bool {
	_, err := netlink.GenlFamilyGet("wireguard")
	return err == nil
}

// putTunnel makes a WireGuard device or changes it.
func (k *Kernel) putTunnel(o dataplane.WireGuard) error {
	private, ok := store.WGKey{}, false
	if k.cfg.WireGuardKey != nil {
		private, ok = k.cfg.WireGuardKey(o.Public)
	}
	if !ok {
		return fmt.Errorf("this host does not hold the private key of %s", o.Public)
	}
	l, err := k.own(o.Name)
	if err != nil {
		return err
	}
	userspace, module := k.cfg.WireGuard == "userspace", k.cfg.WireGuard == "kernel" || hasModule()
	if l != nil && (l.kind == "wireguard" && userspace || l.kind == "tun" && !userspace && k.tunnels.running(o.Name) == nil && module) {
		if err := k.remove(o.Name); err != nil {
			return err
		}
		l = nil
	}
	if l == nil {
		k.tunnels.end(o.Name) // it may not have noticed yet that its link is gone
	}
	if l == nil && !userspace {
		err = k.build(o.Name, create(o.Name, "wireguard", nil, mtuAttr(o.MTU)), change(o.Name, aliasAttr(dataplane.TunnelAlias)))
		switch {
		case errors.Is(err, unix.EOPNOTSUPP) && k.cfg.WireGuard == "kernel":
			return errors.New("this kernel has no WireGuard (modprobe wireguard), and WEFT_WIREGUARD=kernel forbids the one of Weft; set it to auto")
		case errors.Is(err, unix.EOPNOTSUPP):
			userspace = true
		case err != nil:
			return err
		}
	}
	if (userspace || l != nil && l.kind == "tun") && k.tunnels.running(o.Name) == nil {
		if err := k.startOwn(o); err != nil {
			return err
		}
	}
	key, port := wgtypes.Key(private), int(o.Port)
	c := wgtypes.Config{PrivateKey: &key, ListenPort: &port}
	if d, err := k.tunnels.device(o.Name); err == nil && d.ListenPort == port {
		c.ListenPort = nil // a device in this process would open its sockets anew
	}
	if err := k.tunnels.configure(o.Name, c); err != nil {
		return explainPort(o, err)
	}
	if err := k.route.do(change(o.Name, aliasAttr(dataplane.TunnelAlias), mtuAttr(o.MTU))); err != nil {
		return err
	}
	if err := k.raise(o.Name, false, o.Up); err != nil {
		return explainPort(o, err)
	}
	if d := k.tunnels.running(o.Name); d != nil {
		if err := d.up(o.MTU); err != nil {
			return explainPort(o, err)
		}
	}
	return k.guide(o.Name, o.Program)
}

// guide makes the port program stand on a WireGuard device, or takes it off.
func (k *Kernel) guide(name string, on bool) error {
	l, err := k.link(name)
	if err != nil {
		return err
	}
	if on && k.program.err == nil {
		return k.attach(l.index, onTunnel)
	}
	return k.detach(l.index)
}

// guided reports whether the port program stands on a WireGuard device as this process
// would put it, or at all if this process has none.
func (k *Kernel) guided(index int32) (bool, error) {
	if k.program.err != nil {
		return k.left(index)
	}
	return k.stands(index, onTunnel)
}

func explainPort(o dataplane.WireGuard, err error) error {
	if errors.Is(err, unix.EADDRINUSE) || err != nil && strings.Contains(err.Error(), unix.EADDRINUSE.Error()) {
		return fmt.Errorf("UDP port %d of WireGuard is in use by another program on this host; end it, or set WEFT_WIREGUARD_PORT: %w", o.Port, err)
	}
	return err
}

// readTunnels adds the WireGuard devices with their peers. A link whose process is gone
// has no key.
func (k *Kernel) readTunnels(p dataplane.Plan) error {
	var routed map[netip.Prefix]bool
	for _, name := range dataplane.TunnelNames {
		l, err := k.link(name)
		if errors.Is(err, errNoLink) || err == nil && !l.isTunnel() {
			continue
		}
		if err != nil {
			return err
		}
		o := dataplane.WireGuard{Name: name, MTU: l.mtu, Up: l.up}
		if o.Program, err = k.guided(l.index); err != nil {
			return err
		}
		d, err := k.tunnels.device(name)
		if errors.Is(err, os.ErrNotExist) {
			p.Add(o)
			continue
		}
		if err != nil {
			return fmt.Errorf("WireGuard device %s: %w", name, err)
		}
		o.Public, o.Port = store.WGKey(d.PublicKey), uint16(d.ListenPort)
		p.Add(o)
		if routed == nil {
			if routed, err = k.tunnelRoutes(); err != nil {
				return err
			}
		}
		for _, peer := range d.Peers {
			t := dataplane.TunnelPeer{Device: name, Public: store.WGKey(peer.PublicKey), Talks: talks(peer)}
			if peer.Endpoint != nil {
				t.Endpoints = unmapped(peer.Endpoint).String()
			}
			t.Stray = len(strays(peer, routed)) > 0
			t.Odd = peer.PresharedKey != wgtypes.Key{} || peer.PersistentKeepaliveInterval != keepaliveTime
			p.Add(t)
		}
	}
	return nil
}

func talks(p wgtypes.Peer) bool {
	return !p.LastHandshakeTime.IsZero() && time.Since(p.LastHandshakeTime) < talkTime
}

func unmapped(a *net.UDPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// tunnelRoutes returns the prefixes that our routes lead to a WireGuard device.
func (k *Kernel) tunnelRoutes() (map[netip.Prefix]bool, error) {
	out, indexes := map[netip.Prefix]bool{}, map[int32]bool{}
	for _, name := range dataplane.TunnelNames {
		if l, err := k.link(name); err == nil {
			indexes[l.index] = true
		}
	}
	all, err := k.routes()
	for _, r := range all {
		if indexes[r.link] {
			out[r.prefix] = true
		}
	}
	return out, err
}

// strays returns what a peer is allowed without a route.
func strays(p wgtypes.Peer, routed map[netip.Prefix]bool) (out []net.IPNet) {
	for _, n := range p.AllowedIPs {
		if !routed[prefixOf(n)] {
			out = append(out, n)
		}
	}
	return out
}

func prefixOf(n net.IPNet) netip.Prefix {
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// applyPeers makes, changes or removes peers.
func (k *Kernel) applyPeers(ctx context.Context, ops []dataplane.Op) []error {
	errs := make([]error, len(ops))
	var have map[dataplane.Key]wgtypes.Peer
	var routed map[netip.Prefix]bool
	// What is there is read once: with it for each of many silent peers, of which each
	// pass tries another endpoint, a pass would take their number squared.
	if slices.ContainsFunc(ops, func(op dataplane.Op) bool { return op.Old != nil }) {
		var err error
		if have, routed, err = k.peers(); err != nil {
			return fill(errs, err)
		}
	}
	for i, op := range ops {
		if errs[i] = ctx.Err(); errs[i] != nil {
			continue
		}
		o := op.Object.(dataplane.TunnelPeer)
		switch peer, there := have[o.Key()]; {
		case op.Verb == dataplane.Delete:
			errs[i] = k.tunnels.configure(o.Device, wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: wgtypes.Key(o.Public), Remove: true}}})
			if errors.Is(errs[i], os.ErrNotExist) {
				errs[i] = nil
			}
		case there:
			errs[i] = k.bury(o.Device, strays(peer, routed))
			if errs[i] == nil {
				errs[i] = k.putPeer(o, &peer)
			}
		default:
			errs[i] = k.putPeer(o, nil)
		}
	}
	return errs
}

// peers returns the peers of all devices, and the prefixes that our routes lead there.
func (k *Kernel) peers() (map[dataplane.Key]wgtypes.Peer, map[netip.Prefix]bool, error) {
	devices, err := k.tunnels.devices()
	if err != nil {
		return nil, nil, err
	}
	out := map[dataplane.Key]wgtypes.Peer{}
	for i, d := range devices {
		for _, p := range d.Peers {
			out[dataplane.TunnelPeer{Device: dataplane.TunnelNames[i], Public: store.WGKey(p.PublicKey)}.Key()] = p
		}
	}
	routed, err := k.tunnelRoutes()
	return out, routed, err
}

// putPeer makes a peer, or changes the one that is there.
func (k *Kernel) putPeer(o dataplane.TunnelPeer, old *wgtypes.Peer) error {
	var candidates []netip.AddrPort
	for text := range strings.SplitSeq(o.Endpoints, ",") {
		if a, err := netip.ParseAddrPort(text); err == nil {
			candidates = append(candidates, a)
		}
	}
	next := 0
	switch {
	case old == nil:
	case talks(*old):
		candidates = nil // it is where its packets come from, whatever was recorded
	case old.Endpoint != nil:
		next = slices.Index(candidates, unmapped(old.Endpoint)) + 1
	}
	every, none := keepaliveTime, wgtypes.Key{}
	c := wgtypes.PeerConfig{PublicKey: wgtypes.Key(o.Public), PersistentKeepaliveInterval: &every, PresharedKey: &none}
	if len(candidates) > 0 {
		c.Endpoint = net.UDPAddrFromAddrPort(candidates[next%len(candidates)])
	}
	return k.tunnels.configure(o.Device, wgtypes.Config{Peers: []wgtypes.PeerConfig{c}})
}

// allowed returns who may send from each address, by device.
func (k *Kernel) allowed() (map[netip.Prefix][2]store.WGKey, error) {
	devices, err := k.tunnels.devices()
	if err != nil {
		return nil, err
	}
	out := map[netip.Prefix][2]store.WGKey{}
	for i, d := range devices {
		for _, p := range d.Peers {
			for _, n := range p.AllowedIPs {
				keys := out[prefixOf(n)]
				keys[i] = store.WGKey(p.PublicKey)
				out[prefixOf(n)] = keys
			}
		}
	}
	return out, nil
}

// allow lets the peers of routes send from their prefixes. A prefix that another peer
// of the device has moves in one step.
func (k *Kernel) allow(ops []dataplane.Op) error {
	for i, name := range dataplane.TunnelNames {
		byPeer := map[store.WGKey][]net.IPNet{}
		for _, op := range ops {
			if o := op.Object.(dataplane.Route); op.Verb == dataplane.Put && !o.Peers[i].IsZero() {
				byPeer[o.Peers[i]] = append(byPeer[o.Peers[i]], ipNet(o.Prefix))
			}
		}
		var c wgtypes.Config
		for key, nets := range byPeer {
			c.Peers = append(c.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(key), AllowedIPs: nets})
		}
		if len(c.Peers) == 0 {
			continue
		}
		if err := k.tunnels.configure(name, c); err != nil {
			return fmt.Errorf("WireGuard device %s: %w", name, err)
		}
	}
	return nil
}

// forbid takes the prefixes of routes from the peers that had them.
func (k *Kernel) forbid(ops []dataplane.Op) error {
	if !slices.ContainsFunc(ops, func(op dataplane.Op) bool { return peersBefore(op) != [2]store.WGKey{} }) {
		return nil
	}
	have, err := k.allowed()
	if err != nil {
		return err
	}
	for i, name := range dataplane.TunnelNames {
		var nets []net.IPNet
		for _, op := range ops {
			p := op.Object.(dataplane.Route).Prefix
			if gone := peersBefore(op)[i]; !gone.IsZero() && have[p][i] == gone {
				nets = append(nets, ipNet(p))
			}
		}
		if err := k.bury(name, nets); err != nil {
			return err
		}
	}
	return nil
}

// bury takes prefixes from whoever has them on a device. WireGuard has no such request
// before Linux 6.16, and to write the rest of a peer's list anew would leave it without
// any for a moment: so a peer that is nobody gets them, and is removed.
func (k *Kernel) bury(device string, nets []net.IPNet) error {
	if len(nets) == 0 {
		return nil
	}
	var nobody wgtypes.Key
	_, _ = rand.Read(nobody[:]) // never fails
	return k.tunnels.configure(device, wgtypes.Config{Peers: []wgtypes.PeerConfig{
		{PublicKey: nobody, AllowedIPs: nets}, {PublicKey: nobody, Remove: true}}})
}

// Tunnel is the state of a WireGuard device.
type Tunnel struct {
	Name   string
	Module bool // the kernel's; else a device in this process
	Public store.WGKey
	Port   uint16
	Peers  []TunnelPeer
}

// TunnelPeer is the state of a peer of a device.
type TunnelPeer struct {
	Public    store.WGKey
	Endpoint  netip.AddrPort // in use
	Handshake time.Time      // last; zero: none
	Received  int64          // bytes
	Sent      int64          // bytes
	Allowed   int            // prefixes
}

// Talks reports whether the peer answered lately.
func (p TunnelPeer) Talks() bool {
	return talks(wgtypes.Peer{LastHandshakeTime: p.Handshake})
}

// Tunnels returns the state of this host's WireGuard devices.
func (k *Kernel) Tunnels(ctx context.Context) ([]Tunnel, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	devices, err := k.tunnels.devices()
	if err != nil {
		return nil, err
	}
	var out []Tunnel
	for i, name := range dataplane.TunnelNames {
		d, ok := devices[i]
		if !ok {
			continue
		}
		t := Tunnel{Name: name, Module: k.tunnels.running(name) == nil, Public: store.WGKey(d.PublicKey), Port: uint16(d.ListenPort)}
		for _, p := range d.Peers {
			peer := TunnelPeer{Public: store.WGKey(p.PublicKey), Handshake: p.LastHandshakeTime, Received: p.ReceiveBytes, Sent: p.TransmitBytes, Allowed: len(p.AllowedIPs)}
			if p.Endpoint != nil {
				peer.Endpoint = unmapped(p.Endpoint)
			}
			t.Peers = append(t.Peers, peer)
		}
		out = append(out, t)
	}
	return out, nil
}
