// Package store holds what one Weft host knows: its own records and those that
// peers have shared with it, in one bbolt file (DB).
//
// A host works from this database alone; replication (store/gossip) is a task
// beside it. Every record has one owner host, and only the owner writes it; a
// foreign record arrives through Tx.MergeNetworks and Tx.MergeEndpoints.
//
// The package does not talk to Docker, to the kernel or to the network.
package store

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Errors on which callers decide. They are wrapped with the noun they concern.
var (
	ErrNotFound    = errors.New("not found")
	ErrNewerSchema = errors.New("the database was written by a newer version of Weft")
	ErrLocked      = errors.New("the database is in use by another process")
)

// NetworkID is Docker's id of a network: 64 hex digits standalone, 25 base-36
// ones in Swarm. It differs from host to host; the VNI is what hosts share.
type NetworkID string

// OfSwarm reports whether the id is one that Swarm gave.
func (n NetworkID) OfSwarm() bool { return len(n) == 25 }

// EndpointID is Docker's id of an endpoint, unique in the cluster.
type EndpointID string

// HostLink returns the name of the host's side of the endpoint's link. Docker's
// ids are longer than the kernel's 15 characters and not always hex.
func (e EndpointID) HostLink() string {
	sum := sha256.Sum256([]byte(e))
	return hostLinkPrefix + hex.EncodeToString(sum[:5])
}

// ContainerLink returns the name of the container's side of a link, until Docker
// moves and renames it.
func ContainerLink(hostLink string) string {
	return containerLinkPrefix + strings.TrimPrefix(hostLink, hostLinkPrefix)
}

const (
	hostLinkPrefix      = "weftv"
	containerLinkPrefix = "weftc"
)

// HostID names a host: the first 16 bytes of SHA-256 of its public key, in hex.
type HostID string

// VNI is a VXLAN network identifier, 1 to MaxVNI (RFC 7348). It names a network
// across hosts. HostVNI (0) stands for the host as a whole.
type VNI uint32

// Limits of a VNI. Below FirstVNI no VNI is chosen automatically, as Docker's
// own overlay does.
const (
	HostVNI  VNI = 0
	FirstVNI VNI = 4096
	MaxVNI   VNI = 1<<24 - 1
)

// Host is a machine that runs Weft: this one or a peer.
type Host struct {
	ID        HostID     `json:"id"`
	Name      string     `json:"name"`
	PublicKey []byte     `json:"publicKey"` // Ed25519, 32 bytes
	Address   netip.Addr `json:"address"`   // underlay address (VTEP), IPv4 or IPv6
	DataPort  uint16     `json:"dataPort"`  // UDP port of VXLAN and TCP port of the record stream
	Version   string     `json:"version"`   // of the plugin
	Scope     string     `json:"scope"`     // "local" or "global"; empty: a version that does not tell
	Epoch     uint64     `json:"epoch"`     // of the owner's database; another value means "fetch all again"
	// Public is the address by which hosts outside of its own network reach it, behind
	// a NAT that forwards its ports; zero: Address.
	Public netip.Addr `json:"public,omitzero"`
	Tunnel Tunnel     `json:"tunnel,omitzero"`
	MTU    int        `json:"mtu,omitempty"` // of the underlay's link, bytes; 0: not told
}

// Inside reports whether h reaches a peer by the peer's own address, not by that of a NAT
// in front of it: there is none, both are behind it, or the peer is on h's link (near).
func (h Host) Inside(peer Host, near bool) bool {
	return !peer.Public.IsValid() || peer.Public == h.Public || near
}

// AddressOf returns the address by which h reaches a peer, which may be on h's link (near).
func (h Host) AddressOf(peer Host, near bool) netip.Addr {
	if h.Inside(peer, near) {
		return peer.Address
	}
	return peer.Public
}

// WGKey is a key of WireGuard (Curve25519), public or private.
type WGKey [32]byte

// Tunnel is what peers need to encrypt to a host with WireGuard. While a host changes
// its key it has two, and each pair of hosts two ways: one of their first keys, one of
// their last.
type Tunnel struct {
	Keys []WGKey `json:"keys,omitempty"` // public; one or two, none: a version that cannot
	Port uint16  `json:"port,omitempty"` // UDP of the first way; the second has the next port
	Last bool    `json:"last,omitempty"` // traffic takes the second way
}

// Rotating reports whether the host changes its key.
func (t Tunnel) Rotating() bool { return len(t.Keys) > 1 }

// Equal reports whether both tell the same.
func (t Tunnel) Equal(o Tunnel) bool {
	return slices.Equal(t.Keys, o.Keys) && t.Port == o.Port && t.Last == o.Last
}

// Key returns the key of a way, 0 or 1. There must be one.
func (t Tunnel) Key(way int) WGKey {
	if way == 0 {
		return t.Keys[0]
	}
	return t.Keys[len(t.Keys)-1]
}

// String is base64, as wg(8) has it.
func (k WGKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// IsZero reports whether there is no key.
func (k WGKey) IsZero() bool { return k == WGKey{} }

// MarshalText implements encoding.TextMarshaler.
func (k WGKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (k *WGKey) UnmarshalText(text []byte) error {
	b, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil || len(b) != len(k) {
		return fmt.Errorf("%.60q is not a key of %d bytes in base64", text, len(k))
	}
	*k = WGKey(b)
	return nil
}

// Peer is a foreign Host with what we know of its state.
type Peer struct {
	Host
	// DeadSince is when membership lost the host; zero while it is alive.
	DeadSince time.Time `json:"deadSince,omitzero"`
	// Hidden: dead for so long that its records no longer reach the kernel (but see Deaf).
	Hidden bool `json:"hidden,omitempty"`
	// Away: the peer is not on this host's link, though its address is one of that subnet.
	// Networks behind two NATs often have the same private addresses.
	Away bool `json:"away,omitempty"`
	// KeyOf is the host whose WireGuard key the peer tells as one of its own, so that none of
	// its keys was taken over (Tunnel is zero).
	KeyOf HostID `json:"keyOf,omitempty"`
	// Networks is the version of the peer's list of networks that we hold.
	Networks uint64 `json:"networks,omitempty"`
	// Revoked is what the peer has told (Tx.MergeRevocations).
	Revoked []Revocation `json:"revoked,omitempty"`
}

// Modes of a network. VXLAN is the default: a bridge and a VXLAN device per network.
// On a routed network each endpoint's link is a router's port.
const (
	ModeVXLAN  = "vxlan"
	ModeRouted = "routed"
)

// Subnet is one address range of a network, with the addresses that no endpoint
// may have. Both families use it.
type Subnet struct {
	Pool    netip.Prefix            `json:"pool"`
	Gateway netip.Addr              `json:"gateway,omitzero"`
	Aux     map[string]netip.Prefix `json:"aux,omitempty"`
}

// Network is a network on this host, as Docker asked for it. The owner is this
// host: on another host the same network (same VNI) has a record of its own.
type Network struct {
	ID       NetworkID `json:"id"`
	VNI      VNI       `json:"vni"`
	Mode     string    `json:"mode"`          // "vxlan" or "routed"
	MTU      int       `json:"mtu,omitempty"` // bytes; 0 means underlay minus overhead
	Internal bool      `json:"internal,omitempty"`
	Subnets  []Subnet  `json:"subnets"`
	// Encrypted: between hosts it goes by WireGuard alone.
	Encrypted bool `json:"encrypted,omitempty"`
	// GatewayWeft: Weft leads out of the network, not Docker; always so if it is routed.
	GatewayWeft bool `json:"gatewayWeft,omitempty"`
	// NoMasquerade: what leaves a network whose gateway is ours keeps its address.
	NoMasquerade bool `json:"noMasquerade,omitempty"`
	// Unguarded: endpoints may send from any address, and as a router or bridge.
	Unguarded bool `json:"unguarded,omitempty"`
	// SlowPath: all packets go through the host's stack.
	SlowPath bool `json:"slowPath,omitempty"`
	// AnyEthertype: guarded endpoints may send frames that are not IP or ARP.
	AnyEthertype bool              `json:"anyEthertype,omitempty"`
	Ifname       string            `json:"ifname,omitempty"`  // prefix of the interface name in containers
	Options      map[string]string `json:"options,omitempty"` // the -o options as given
	Meet         []netip.Addr      `json:"meet,omitempty"`    // hosts to meet
	// Term of Swarm in which Docker last created it here (driver.Config); 0 elsewhere.
	Term uint64 `json:"term,omitempty"`
	// Key is known to the hosts that may run the network, 32 bytes, or nil: then
	// every host that runs the same VNI and subnets is believed.
	Key []byte `json:"key,omitempty"`
	// Recovered: the record was made from the kernel and lacks what is not there, as
	// options and key.
	Recovered bool `json:"recovered,omitempty"`
}

// Prefixes returns the address ranges of the network in order.
func (n Network) Prefixes() []netip.Prefix {
	out := make([]netip.Prefix, 0, len(n.Subnets))
	for _, s := range n.Subnets {
		out = append(out, s.Pool)
	}
	return out
}

// Routed reports whether hosts route to the network's endpoints: a bridge would need
// frames between hosts.
func (n Network) Routed() bool { return n.Mode == ModeRouted || n.Encrypted }

// OwnGateway reports whether Weft leads out of the network, not Docker.
func (n Network) OwnGateway() bool { return n.Mode == ModeRouted || n.GatewayWeft }

// GatewayOf returns the gateway of the subnet that has the address, or the zero Addr.
func (n Network) GatewayOf(a netip.Addr) netip.Addr {
	for _, s := range n.Subnets {
		if s.Pool.Contains(a) {
			return s.Gateway
		}
	}
	return netip.Addr{}
}

// Gives reports whether an endpoint may have the address: it is in a subnet, and no
// gateway.
func (n Network) Gives(a netip.Addr) bool {
	return slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Pool.Contains(a) }) &&
		!slices.ContainsFunc(n.Subnets, func(s Subnet) bool { return s.Gateway == a })
}

// Foreign returns the first address of the endpoint that the network does not give, or
// the zero Addr.
func (n Network) Foreign(e SharedEndpoint) netip.Addr {
	for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
		if a.IsValid() && !n.Gives(a) {
			return a
		}
	}
	return netip.Addr{}
}

// Shared returns the part of the network that all hosts must agree on.
func (n Network) Shared() SharedNetwork {
	p := n.Prefixes()
	slices.SortFunc(p, comparePrefix)
	return SharedNetwork{VNI: n.VNI, Mode: n.Mode, Encrypted: n.Encrypted, Prefixes: p}
}

// ProofBytes is the length of a proof.
const ProofBytes = sha256.Size

// Proof shows that a host holds the network's key; nil without one. It is of no
// use to another host: who shows it has proved by other means which host he is.
func (n Network) Proof(host HostID) []byte {
	if len(n.Key) == 0 {
		return nil
	}
	mac := hmac.New(sha256.New, n.Key)
	fmt.Fprintf(mac, "weft network 1 %d %s", n.VNI, host) // never fails
	return mac.Sum(nil)
}

// Runs reports whether a peer's network is this one: it agrees, and the peer has
// proved to hold the key.
func (n Network) Runs(o PeerNetwork) bool {
	if n.VNI != o.VNI { // asked for each pair of networks: most end here
		return false
	}
	return n.isRun(n.Shared(), o)
}

// isRun is Runs for many of n, of which shared is n.Shared.
func (n Network) isRun(shared SharedNetwork, o PeerNetwork) bool {
	return shared.Agrees(o.SharedNetwork) && hmac.Equal(n.Proof(o.Owner), o.Proof)
}

// SharedNetwork is what a host tells its peers of a network that it runs.
type SharedNetwork struct {
	VNI       VNI            `json:"vni"`
	Mode      string         `json:"mode"`
	Encrypted bool           `json:"encrypted,omitempty"`
	Prefixes  []netip.Prefix `json:"prefixes"`        // sorted
	Proof     []byte         `json:"proof,omitempty"` // Network.Proof of the host
}

// Agrees reports whether two hosts may run n and o as one network.
func (n SharedNetwork) Agrees(o SharedNetwork) bool {
	return n.VNI == o.VNI && n.Mode == o.Mode && n.Encrypted == o.Encrypted && slices.Equal(n.Prefixes, o.Prefixes)
}

// Endpoint is one container's interface on a network of this host.
type Endpoint struct {
	ID      EndpointID   `json:"id"`
	Network NetworkID    `json:"network"`
	VNI     VNI          `json:"vni"`
	MAC     MAC          `json:"mac"`
	IPv4    netip.Prefix `json:"ipv4,omitzero"`
	IPv6    netip.Prefix `json:"ipv6,omitzero"`
	// OwnMAC: the MAC is ours, so CreateEndpoint answers it (Docker refuses an
	// answer that repeats what it gave).
	OwnMAC  bool              `json:"ownMac,omitempty"`
	Sandbox string            `json:"sandbox,omitempty"` // set by Join
	Left    bool              `json:"left,omitempty"`    // set by Leave: no link any more
	Created time.Time         `json:"created"`           // for people; nothing is decided by it
	Ifname  string            `json:"ifname,omitempty"`
	Options map[string]string `json:"options,omitempty"` // per-endpoint options as given
	Ports   []Port            `json:"ports,omitempty"`   // published, where the gateway is ours
	Seq     uint64            `json:"seq"`               // version of the network at the last change
}

// Port is a port of an endpoint that is published on a port of the host.
type Port struct {
	Proto    string     `json:"proto"`           // "tcp", "udp" or "sctp"
	Port     uint16     `json:"port"`            // of the endpoint
	HostIP   netip.Addr `json:"hostIP,omitzero"` // zero: all addresses of the host; 0.0.0.0 or ::, those of the family
	HostPort uint16     `json:"hostPort"`
}

// String is as docker ps has it: 0.0.0.0:8080->80/tcp.
func (p Port) String() string {
	host := "0.0.0.0"
	if p.HostIP.Is6() {
		host = "[" + p.HostIP.String() + "]"
	} else if p.HostIP.IsValid() {
		host = p.HostIP.String()
	}
	return fmt.Sprintf("%s:%d->%d/%s", host, p.HostPort, p.Port, p.Proto)
}

// Overlaps reports whether two cannot be published on one host.
func (p Port) Overlaps(o Port) bool {
	if p.Proto != o.Proto || p.HostPort != o.HostPort {
		return false
	}
	if !p.HostIP.IsValid() || !o.HostIP.IsValid() || p.HostIP == o.HostIP {
		return true
	}
	return p.HostIP.Is4() == o.HostIP.Is4() && (p.HostIP.IsUnspecified() || o.HostIP.IsUnspecified())
}

// Shared returns the part of the endpoint that peers need.
func (e Endpoint) Shared() SharedEndpoint {
	return SharedEndpoint{ID: e.ID, MAC: e.MAC, IPv4: e.IPv4.Addr(), IPv6: e.IPv6.Addr(), Seq: e.Seq}
}

// SharedEndpoint is what a host tells its peers of an endpoint. The zero Addr
// means that the endpoint has no address of that family. Gone marks a deletion.
type SharedEndpoint struct {
	ID   EndpointID `json:"id"`
	MAC  MAC        `json:"mac,omitzero"`
	IPv4 netip.Addr `json:"ipv4,omitzero"`
	IPv6 netip.Addr `json:"ipv6,omitzero"`
	Seq  uint64     `json:"seq"`
	Gone bool       `json:"gone,omitempty"`
}

// RemoteEndpoint is a peer's endpoint.
type RemoteEndpoint struct {
	Owner HostID `json:"owner"`
	SharedEndpoint
}

// Pool is an address pool that Docker requested from our IPAM driver. Its ID is
// opaque to Docker and carries the address space, so that in Swarm the leader's
// and the node's pool of one subnet are two.
type Pool struct {
	ID     string            `json:"id"`
	Space  string            `json:"space"`
	Prefix netip.Prefix      `json:"prefix"`
	Sub    netip.Prefix      `json:"sub,omitzero"` // --ip-range; addresses are chosen inside it
	Auto   bool              `json:"auto,omitempty"`
	Refs   int               `json:"refs"`          // RequestPool minus ReleasePool
	Next   netip.Addr        `json:"next,omitzero"` // where the search for a free address goes on
	Opts   map[string]string `json:"opts,omitempty"`
	Asked  time.Time         `json:"asked,omitzero"` // when Docker last requested it
	Term   uint64            `json:"term,omitempty"` // in which it did (ipam.Config)
	// Swarm: it is or was the pool of a network of Swarm on this host.
	Swarm bool `json:"swarm,omitempty"`
}

// Lease is an address taken from a Pool. A released address stays as a lease with
// Freed set until the cooling time is over, so that no stale flow reaches a new
// owner.
type Lease struct {
	Pool    string     `json:"pool"`
	Address netip.Addr `json:"address"`
	Kind    string     `json:"kind"` // "gateway", "fixed" (asked for by address) or "auto"
	Taken   time.Time  `json:"taken"`
	Freed   time.Time  `json:"freed,omitzero"`
	Tag     string     `json:"tag,omitempty"` // container name, where the engine tells it
	// Doubt is since when this host leads a Swarm that has not confirmed the lease:
	// Docker may have released it while another manager was the leader.
	Doubt time.Time `json:"doubt,omitzero"`
}

// Allocation is what this host, as leader of a Swarm, has answered for a network.
type Allocation struct {
	ID       NetworkID         `json:"id"`
	VNI      VNI               `json:"vni"`
	Key      []byte            `json:"key"`
	Prefixes []netip.Prefix    `json:"prefixes"` // sorted
	Given    map[string]string `json:"given"`    // the user's options
	Meet     []netip.Addr      `json:"meet,omitempty"`
	Term     uint64            `json:"term,omitempty"` // in which Docker last asked for it (driver.Config)
}

// Node is a host of the Swarm, as Docker tells of it.
type Node struct {
	Address netip.Addr `json:"address"` // which the Swarm advertises
	Self    bool       `json:"self,omitempty"`
	Heard   time.Time  `json:"heard"`          // when Docker last told
	Gone    bool       `json:"gone,omitempty"` // down or removed, it told
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}
