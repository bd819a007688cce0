package kernel

import (
	"context"
	"maps"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// lookShare limits what looks at the devices may take: one part in so many of a
// processor. With thousands of peers they are rarer.
const lookShare = 50

// pollTunnels looks whether somebody changed a device of the kernel's WireGuard, which
// tells nobody of changes. Nobody but this process can change a device in it.
func (w *watch) pollTunnels(ctx context.Context) {
	last := map[string]*tunnelSight{}
	next := time.NewTimer(pollEvery)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		begun := time.Now()
		for _, name := range dataplane.TunnelNames {
			now := w.k.sight(name)
			w.send(w.k.touched(last[name], now)...)
			last[name] = now
		}
		next.Reset(max(pollEvery, lookShare*time.Since(begun)))
	}
}

// tunnelSight is what Read compares of a device, but for what time changes: handshakes,
// counters, and where the peers are.
type tunnelSight struct {
	private wgtypes.Key
	port    int
	peers   map[wgtypes.Key]peerSight
	allowed map[netip.Prefix]wgtypes.Key
}

type peerSight struct {
	preshared wgtypes.Key
	keepalive time.Duration
}

// sight returns what there is of a device of the kernel's WireGuard, or nil.
func (k *Kernel) sight(name string) *tunnelSight {
	if !k.tunnels.module.there(name) {
		return nil
	}
	d, err := k.tunnels.module.look(name)
	if err != nil {
		return nil // it goes or comes, or the next Read tells
	}
	s := &tunnelSight{private: d.PrivateKey, port: d.ListenPort, peers: map[wgtypes.Key]peerSight{}, allowed: map[netip.Prefix]wgtypes.Key{}}
	for _, p := range d.Peers {
		s.peers[p.PublicKey] = peerSight{p.PresharedKey, p.PersistentKeepaliveInterval}
		for _, n := range p.AllowedIPs {
			s.allowed[prefixOf(n)] = p.PublicKey
		}
	}
	return s
}

// touched returns what is to be looked at after a device changed between two sights: the
// host for what is the device's own, a network for the addresses to which it has routes.
// Of our own changes those of peers give a look at the host, and a new endpoint one at
// its network.
func (k *Kernel) touched(was, now *tunnelSight) (out []store.VNI) {
	if was == nil || now == nil {
		return nil // a link came or went, which the kernel tells
	}
	host := was.private != now.private || was.port != now.port || !maps.Equal(was.peers, now.peers)
	moved := map[netip.Prefix]bool{}
	for p, key := range was.allowed {
		if now.allowed[p] != key {
			moved[p] = true
		}
	}
	for p, key := range now.allowed {
		if was.allowed[p] != key {
			moved[p] = true
		}
	}
	if len(moved) == 0 && !host {
		return nil
	}
	routes, err := k.routes()
	if err != nil {
		return []store.VNI{store.HostVNI}
	}
	routed := map[netip.Prefix]bool{}
	for _, r := range routes {
		if moved[r.prefix] {
			out, routed[r.prefix] = append(out, store.VNI(r.metric)), true
		}
	}
	for p := range moved {
		_, allowed := now.allowed[p]
		host = host || allowed && !routed[p] // nobody must be
	}
	if host {
		out = append(out, store.HostVNI)
	}
	return out
}
