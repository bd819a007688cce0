// Package dataplane decides what the kernel should hold and makes it so.
//
// A planner turns a store.Snapshot into a Plan (pure). Kernel.Read returns what
// the kernel holds in the same form, only of objects that are ours. Diff names
// the operations between the two, and Loop, the only caller of Kernel.Apply,
// runs them. The package imports nothing of Linux: dataplane/kernel does.
package dataplane

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weftnet/weft/store"
)

// Kind is a kind of kernel object. The order is the order in which objects are
// made; they are removed in reverse. Rules come before the links that they guard.
type Kind int

// The kinds, and how a fresh process knows that one is ours.
const (
	KindSet       Kind = iota // ipset; name is one of SetNames
	KindChain                 // iptables chain with its rules; name begins with "WEFT-"
	KindJump                  // rule in a shared chain that jumps to a chain of ours
	KindRule                  // routing rule; priority and table
	KindBlackhole             // route without a way; table and protocol
	KindProgram               // eBPF program; name of its filter and maps
	KindWireGuard             // link; name and alias
	KindPeer                  // peer of a WireGuard device of ours
	KindBridge                // link; name prefix and alias
	KindVXLAN                 // link; name prefix and alias
	KindVeth                  // host side of an endpoint's link; name prefix and alias
	KindRoute                 // route; table and protocol
	KindNeigh                 // permanent neighbour on a link of ours
	KindFDB                   // static forwarding entry on a link of ours
	KindDest                  // entry in a map of the program
	KindService               // the same
)

var kindNames = [...]string{"set", "chain", "jump", "rule", "blackhole", "program", "wireguard", "peer", "bridge", "vxlan", "veth", "route", "neigh", "fdb", "dest", "service"}

func (k Kind) String() string { return kindNames[k] }

// Key identifies an object in the kernel of one host. It holds no text that would
// have to be built for each of many thousand entries.
type Key struct {
	Kind   Kind
	Name   string // of the link, set, chain or jump
	MAC    store.MAC
	IP     netip.Addr
	Bits   uint8 // length of a route's or rule's prefix
	Master bool
}

// String is for messages.
func (k Key) String() string {
	s := k.Kind.String() + " " + k.Name
	if !k.MAC.IsZero() {
		s += " " + k.MAC.String()
	}
	if k.IP.IsValid() {
		s += " " + k.IP.String()
	}
	if k.IP.IsValid() && (k.Kind == KindRoute || k.Kind == KindBlackhole || k.Kind == KindRule) {
		s += fmt.Sprintf("/%d", k.Bits)
	}
	return s
}

// Object is one kernel object. Exactly the fields of its kind are set, and two
// objects are equal (==) if and only if the kernel need not be changed. String
// is one line that looks like ip, bridge, ipset or iptables-save.
type Object interface {
	Key() Key
	String() string
	object() // only the types of this package
}

// Bridge is a network's bridge. It carries no address, and the host is not part of the
// network, unless it is the network's gateway (Router).
type Bridge struct {
	Name  string
	Alias string // see alias.go; it holds what a rebuild needs
	MAC   store.MAC
	MTU   int
	Up    bool
	// Closed: the host's own stack takes nothing from the bridge even when all
	// rules are gone: rp_filter is strict (no route leads there), arp_ignore is
	// 1 and IPv6 is disabled on it.
	Closed bool
	Router Router
}

// VXLAN is a network's VXLAN device, bound to the underlay's link and address, and a
// port of its bridge if it has one. The device does not learn; nor does its bridge port.
type VXLAN struct {
	Name     string
	Alias    string
	Bridge   string // master; empty on a routed network
	VNI      store.VNI
	Local    netip.Addr
	Underlay string // link name
	Port     uint16 // UDP
	MTU      int
	MAC      store.MAC
	Up       bool
	Suppress bool // bridge port answers ARP and ND from neighbour entries
	// NoChecksum: transmit checksum offload is switched off (kernels and
	// drivers that get the inner checksum wrong).
	NoChecksum bool
}

// Veth is the host's side of an endpoint's link: a port of the bridge that does not
// learn, or on a routed network a link of its own (Router). The container's side is
// named PeerName(Name) until Docker moves it.
type Veth struct {
	Name   string
	Alias  string    // holds endpoint, network, MAC and addresses
	Bridge string    // master; empty on a routed network
	MAC    store.MAC // of the container's side, set at creation
	MTU    int       // of both sides; once Docker has taken one, both keep what they have (Port.MTU)
	Up     bool
	// Joined: the container's side was handed over to Docker, also told by the
	// alias. The link then cannot be made again, only repaired.
	Joined bool
	// Waits: the container's side is still in the host's namespace. Read tells it; it
	// is not compared.
	Waits  bool
	Router Router
	// Hairpin: the bridge sends back what comes from here, as an endpoint needs that
	// reaches itself by a port of the host: with br_netfilter the bridge translates it.
	Hairpin bool
	Program Port
}

// Neigh is a permanent neighbour entry on a link: on a bridge, ARP is answered from it
// locally; on others it spares the host the question.
type Neigh struct {
	Link string
	IP   netip.Addr
	MAC  store.MAC
}

// FDB is a static forwarding entry. With Master it belongs to the bridge of the
// port Link; without, to the VXLAN device Link itself, and Dst is the VTEP. The
// zero MAC with a Dst is head-end replication: one entry per VTEP.
type FDB struct {
	Link   string
	MAC    store.MAC
	Master bool
	Dst    netip.Addr
}

// Set is an ipset of type hash:ip. Members are sorted and joined by a comma, so
// that objects compare.
type Set struct {
	Name    string
	V6      bool
	Members string
}

// Chain is a chain of ours with all its rules, one per line, in the form of
// iptables-save without "-A CHAIN". It is written as a whole. Each rule carries a
// comment "weft <hash> <i>/<n>", by which it is recognised: rules are never parsed
// back. Make one with NewChain; Kernel.Read fills Hash alone.
type Chain struct {
	Table string // "raw", "mangle", "nat" or "filter"
	V6    bool
	Name  string
	Hash  string // of the rules, 12 hex digits
	Rules string // not compared
}

// NewChain returns a chain with the hash of its rules.
func NewChain(table string, v6 bool, name string, rules ...string) Chain {
	text := strings.Join(rules, "\n")
	sum := sha256.Sum256([]byte(table + "\n" + text))
	return Chain{Table: table, V6: v6, Name: name, Hash: hex.EncodeToString(sum[:6]), Rules: text}
}

// Jump is a rule in a shared chain that jumps to a chain of ours. It stands first,
// or behind nothing but jumps to Docker's chains.
type Jump struct {
	Table string
	V6    bool
	From  string // "FORWARD"
	To    string // "WEFT-FORWARD"
}

func (Bridge) object() {}
func (VXLAN) object()  {}
func (Veth) object()   {}
func (Neigh) object()  {}
func (FDB) object()    {}
func (Set) object()    {}
func (Chain) object()  {}
func (Jump) object()   {}

// Key implements Object.
func (o Bridge) Key() Key { return Key{Kind: KindBridge, Name: o.Name} }

// Key implements Object.
func (o VXLAN) Key() Key { return Key{Kind: KindVXLAN, Name: o.Name} }

// Key implements Object.
func (o Veth) Key() Key { return Key{Kind: KindVeth, Name: o.Name} }

// Key implements Object.
func (o Neigh) Key() Key { return Key{Kind: KindNeigh, Name: o.Link, IP: o.IP} }

// Key implements Object. Head-end entries are many per link, the others one per
// MAC.
func (o FDB) Key() Key {
	if o.MAC.IsZero() {
		return Key{Kind: KindFDB, Name: o.Link, IP: o.Dst}
	}
	return Key{Kind: KindFDB, Name: o.Link, MAC: o.MAC, Master: o.Master}
}

// Key implements Object.
func (o Set) Key() Key { return Key{Kind: KindSet, Name: o.Name} }

// Key implements Object.
func (o Chain) Key() Key {
	return Key{Kind: KindChain, Name: family(o.V6) + " " + o.Table + " " + o.Name}
}

// Key implements Object.
func (o Jump) Key() Key {
	return Key{Kind: KindJump, Name: family(o.V6) + " " + o.Table + " " + o.From + " " + o.To}
}

func family(v6 bool) string {
	if v6 {
		return "ip6tables"
	}
	return "iptables"
}

func (o Bridge) String() string {
	s := fmt.Sprintf("link %s bridge mac %s mtu %d %s", o.Name, o.MAC, o.MTU, updown(o.Up))
	if o.Router != (Router{}) {
		s += " " + o.Router.String()
	} else if !o.Closed {
		s += " open-to-host"
	}
	return s + fmt.Sprintf(" alias %q", o.Alias)
}

func (o VXLAN) String() string {
	s := fmt.Sprintf("link %s vxlan id %d local %s dev %s dstport %d%s mac %s mtu %d %s",
		o.Name, o.VNI, o.Local, o.Underlay, o.Port, master(o.Bridge), o.MAC, o.MTU, updown(o.Up))
	if o.Suppress {
		s += " neigh_suppress on"
	}
	if o.NoChecksum {
		s += " tx-checksum off"
	}
	return s + fmt.Sprintf(" alias %q", o.Alias)
}

func (o Veth) String() string {
	s := fmt.Sprintf("link %s veth%s mac %s mtu %d %s", o.Name, master(o.Bridge), o.MAC, o.MTU, updown(o.Up))
	if o.Router != (Router{}) {
		s += " " + o.Router.String()
	}
	if o.Hairpin {
		s += " hairpin on"
	}
	if o.Joined {
		s += " joined"
	}
	if o.Program != (Port{}) {
		s += " " + o.Program.String()
	}
	return s + fmt.Sprintf(" alias %q", o.Alias)
}

func master(bridge string) string {
	if bridge == "" {
		return ""
	}
	return " master " + bridge
}

func updown(up bool) string {
	if up {
		return "up"
	}
	return "down"
}

func (o Neigh) String() string {
	return fmt.Sprintf("neigh %s lladdr %s dev %s permanent", o.IP, o.MAC, o.Link)
}

func (o FDB) String() string {
	mac := o.MAC.String()
	if mac == "" {
		mac = "00:00:00:00:00:00"
	}
	if o.Master {
		return fmt.Sprintf("fdb %s dev %s master static", mac, o.Link)
	}
	return fmt.Sprintf("fdb %s dev %s dst %s self permanent", mac, o.Link, o.Dst)
}

func (o Set) String() string {
	fam := "inet"
	if o.V6 {
		fam = "inet6"
	}
	return fmt.Sprintf("set %s hash:ip %s {%s}", o.Name, fam, o.Members)
}

func (o Chain) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s -t %s -N %s", family(o.V6), o.Table, o.Name)
	for _, r := range o.RuleLines() {
		fmt.Fprintf(&b, "\n\t-A %s %s", o.Name, r)
	}
	return b.String()
}

// RuleLines returns the rules, one each.
func (o Chain) RuleLines() []string {
	if o.Rules == "" {
		return nil
	}
	return strings.Split(o.Rules, "\n")
}

func (o Jump) String() string {
	return fmt.Sprintf("%s -t %s -I %s -j %s", family(o.V6), o.Table, o.From, o.To)
}

// Plan is what the kernel holds, or must hold, for one network or for the host.
type Plan map[Key]Object

// Add puts an object into the plan, in place of one with the same key.
func (p Plan) Add(o Object) { p[o.Key()] = o }

// Sorted returns the objects in the order in which they are made.
func (p Plan) Sorted() []Object {
	return slices.SortedFunc(maps.Values(p), func(a, b Object) int { return compareKeys(a.Key(), b.Key()) })
}

func compareKeys(a, b Key) int {
	return cmp.Or(int(a.Kind)-int(b.Kind), cmp.Compare(a.Name, b.Name), bytes.Compare(a.MAC[:], b.MAC[:]), a.IP.Compare(b.IP), int(a.Bits)-int(b.Bits), bit(a.Master)-bit(b.Master))
}

// String prints the plan, one object a line.
func (p Plan) String() string {
	var b strings.Builder
	for _, o := range p.Sorted() {
		b.WriteString(o.String() + "\n")
	}
	return b.String()
}
