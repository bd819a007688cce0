package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/store"
)

// encryptionReply answers GET /v1/encryption.
type encryptionReply struct {
	Devices []tunnelReply     `json:"devices"` // none: this host runs no encrypted network
	KeyMade time.Time         `json:"keyMade"`
	Changes bool              `json:"changes"` // the key is being changed
	Peers   []tunnelPeerReply `json:"peers"`   // hosts that run an encrypted network of this one
	Revoked []revokedReply    `json:"revoked,omitempty"`
}

// revokedReply is a host of which hosts want nothing more.
type revokedReply struct {
	ID   store.HostID `json:"id"`
	Name string       `json:"name,omitempty"` // where it is known
	Self bool         `json:"self,omitempty"`
}

// tunnelReply is a WireGuard device of this host.
type tunnelReply struct {
	Name   string      `json:"name"`
	Module bool        `json:"module"` // the kernel's; else Weft's own
	Key    store.WGKey `json:"key"`    // public
	Port   uint16      `json:"port"`
}

// tunnelPeerReply is a way to a peer.
type tunnelPeerReply struct {
	Host      string         `json:"host"`
	ID        store.HostID   `json:"id"`
	State     string         `json:"state"`            // "on", "waits" (for an answer), or why not
	Device    string         `json:"device,omitempty"` // "" while there is none
	Key       store.WGKey    `json:"key,omitzero"`
	KeyOf     store.HostID   `json:"keyOf,omitempty"` // whose key it tells as its own, so that there is no way
	Endpoint  netip.AddrPort `json:"endpoint,omitzero"`
	Handshake time.Time      `json:"handshake,omitzero"` // the last one
	Received  int64          `json:"received"`           // bytes
	Sent      int64          `json:"sent"`
	Addresses int            `json:"addresses"` // that it may send from
}

func (s *services) encryption(ctx context.Context) (encryptionReply, error) {
	keys := s.rotator.keys.state()
	r := encryptionReply{Devices: []tunnelReply{}, Peers: []tunnelPeerReply{}, KeyMade: keys.Keys[len(keys.Keys)-1].Made, Changes: len(keys.Keys) > 1}
	devices, err := s.kernel.Tunnels(ctx)
	if err != nil {
		return r, err
	}
	for _, d := range devices {
		r.Devices = append(r.Devices, tunnelReply{Name: d.Name, Module: d.Module, Key: d.Public, Port: d.Port})
	}
	host, err := s.db.HostSnapshot()
	if err != nil {
		return r, err
	}
	names := map[store.HostID]string{}
	if err := s.db.View(func(tx *store.Tx) error {
		all, err := tx.Peers()
		for _, p := range all {
			names[p.ID] = p.Name
		}
		return err
	}); err != nil {
		return r, err
	}
	for _, p := range dataplane.TunnelPeers(host, s.loop.Underlay()) {
		r.Peers = append(r.Peers, tunnelsTo(p, keyOwner(p.KeyOf, host.Self.ID, names), devices)...)
	}
	r.Revoked, err = s.revoked()
	return r, err
}

// way returns in words how packets go to a peer: of routed networks, and of encrypted
// ones if they share any; and whether some go in VXLAN.
func way(self store.Host, p store.Peer, own []store.Network, nets []store.PeerNetwork, u dataplane.Underlay) (text string, vxlan bool) {
	plain, crypt := false, false
	for _, n := range own {
		for _, o := range nets {
			if n.Runs(o) {
				crypt, plain = crypt || n.Encrypted, plain || !n.Encrypted
				vxlan = vxlan || dataplane.InVXLAN(n, self, p, u)
			}
		}
	}
	switch text = dataplane.Way(self, p, u); {
	case crypt && plain && text != "wireguard":
		text += ",wireguard"
	case crypt:
		text = "wireguard"
	}
	return text, vxlan
}

// silentTunnels says of the peers to which a tunnel leads whether they answer there, or
// why none leads.
func silentTunnels(peers []peerReply, r encryptionReply) {
	answers, none := map[store.HostID]bool{}, map[store.HostID]string{}
	for _, t := range r.Peers {
		answers[t.ID] = answers[t.ID] || t.State == "on"
		if t.KeyOf != "" {
			none[t.ID] = t.State
		}
	}
	for i, p := range peers {
		if on, there := answers[p.ID]; there && !on {
			peers[i].Way += " (" + cmp.Or(none[p.ID], "no answer") + ")"
		}
	}
}

// keyOwner returns in words the host whose WireGuard key a peer tells.
func keyOwner(id, self store.HostID, names map[store.HostID]string) string {
	if id == self {
		return "this host"
	}
	return "host " + cmp.Or(names[id], short(id))
}

func (s *services) revoked() (out []revokedReply, err error) {
	self := s.db.Self()
	err = s.db.View(func(tx *store.Tx) error {
		all, err := tx.Revocations()
		for _, r := range all {
			if !r.Out() {
				continue
			}
			v := revokedReply{ID: r.Host, Self: r.Host == self.ID}
			if p, err := tx.Peer(r.Host); err == nil {
				v.Name = p.Name
			}
			out = append(out, v)
		}
		return err
	})
	return out, err
}

// revoke takes a host, by name or the beginning of its id, out of all networks of this
// host and of those with which it shares an encrypted network; or back in.
func (s *services) revoke(ctx context.Context, host string, out bool) (revokedReply, error) {
	var r revokedReply
	var found []revokedReply
	err := s.db.Update(ctx, func(tx *store.Tx) error {
		peers, err := tx.Peers()
		if err != nil {
			return err
		}
		known, err := tx.Revocations()
		if err != nil {
			return err
		}
		for _, p := range peers {
			found = append(found, revokedReply{ID: p.ID, Name: p.Name})
		}
		for _, k := range known { // also one that was forgotten since
			if !slices.ContainsFunc(found, func(f revokedReply) bool { return f.ID == k.Host }) {
				found = append(found, revokedReply{ID: k.Host})
			}
		}
		if found = called(found, host); len(found) != 1 {
			return fmt.Errorf("%d other hosts are called %.80q or have an id that begins so; weft peers lists them: %w", len(found), host, store.ErrNotFound)
		}
		r = found[0]
		return tx.Revoke(r.ID, out)
	})
	if err == nil {
		s.log.Warn("host revoked or restored by command", "host", r.ID, "name", r.Name, "revoked", out)
	}
	return r, err
}

// called returns the hosts that a user means by a name or id, or else those whose id
// begins so: of a host called c the ids of others may.
func called(all []revokedReply, host string) (out []revokedReply) {
	var begin []revokedReply
	for _, h := range all {
		switch {
		case host == "": // hosts that were forgotten have no name
		case h.Name == host || string(h.ID) == host:
			out = append(out, h)
		case strings.HasPrefix(string(h.ID), host):
			begin = append(begin, h)
		}
	}
	if len(out) == 0 {
		return begin
	}
	return out
}

// tunnelsTo returns the ways to a peer: two while a key changes. of is in words whose key it
// tells, if that is another's.
func tunnelsTo(p store.Peer, of string, devices []kernel.Tunnel) (out []tunnelPeerReply) {
	none := tunnelPeerReply{Host: p.Name, ID: p.ID, State: "waits for its device", KeyOf: p.KeyOf}
	switch {
	case p.KeyOf != "":
		none.State = "refused, it tells the key of " + of
		return append(out, none)
	case len(p.Tunnel.Keys) == 0:
		none.State = fmt.Sprintf("its version (%s) cannot encrypt", p.Version)
		return append(out, none)
	}
	for way, name := range dataplane.TunnelNames {
		for _, d := range devices {
			for _, t := range d.Peers {
				if d.Name != name || t.Public != p.Tunnel.Key(way) {
					continue
				}
				r := none
				r.State = "waits for its answer"
				if t.Talks() {
					r.State = "on"
				}
				r.Device, r.Key, r.Endpoint, r.Handshake = name, t.Public, t.Endpoint, t.Handshake
				r.Received, r.Sent, r.Addresses = t.Received, t.Sent, t.Allowed
				out = append(out, r)
			}
		}
	}
	if len(out) == 0 {
		out = append(out, none)
	}
	return out
}

// changeKey asks for a new key of this host.
func (s *services) changeKey() error {
	if s.rotator.keys.state().rotates() {
		return errors.New("the WireGuard key of this host is being changed already; weft encryption shows it")
	}
	select {
	case s.rotator.ask <- struct{}{}:
	default: // asked for, and not begun yet
	}
	return nil
}
