package main

import (
	"net/netip"
	"time"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/dataplane/kernel"
	"github.com/weftnet/weft/ipam"
	"github.com/weftnet/weft/store"
)

// What the admin socket answers, as JSON. The commands print the same.

// statusReply answers GET /v1/status.
type statusReply struct {
	Problems  []problem     `json:"problems"` // first of all; empty when all is well
	Version   string        `json:"version"`
	Started   time.Time     `json:"started"`
	Ready     bool          `json:"ready"`           // calls are served
	Stage     string        `json:"stage"`           // what the process does now, in words
	Error     string        `json:"error,omitempty"` // why it cannot serve
	Host      store.Host    `json:"host,omitzero"`
	Underlay  underlayReply `json:"underlay,omitzero"`
	IPTables  string        `json:"iptables,omitempty"`  // backend in use
	Program   string        `json:"program,omitempty"`   // "on", or why the port program is off
	Answered  []netip.Addr  `json:"answered,omitempty"`  // virtual addresses of services of which hosts are told
	Lent      bool          `json:"lent,omitempty"`      // the plugin may ask Docker
	UserRules int           `json:"userRules,omitempty"` // in DOCKER-USER
	Scope     string        `json:"scope"`
	Swarm     swarmReply    `json:"swarm,omitzero"`
	Join      []string      `json:"join"`
	Encrypted bool          `json:"encrypted"` // gossip and records
	Records   recordCounts  `json:"records"`
	Loop      loopReply     `json:"loop,omitzero"`
	Tunnels   []tunnelReply `json:"tunnels,omitempty"` // WireGuard devices
	Rebuilt   string        `json:"rebuilt,omitempty"`
}

// swarmReply is what Docker has told of the Swarm's hosts.
type swarmReply struct {
	Self       netip.Addr   `json:"self,omitzero"`        // address that this host advertises
	Discovered []netip.Addr `json:"discovered,omitempty"` // of the others
	Gone       []netip.Addr `json:"gone,omitempty"`       // of those, that are down
}

// problem is one thing that is wrong, and what to do about it.
type problem struct {
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
	Advice bool   `json:"advice,omitempty"` // nothing is broken, but could be better
	// Network of Swarm that it is about, or "": Docker does not tell the plugin when a
	// network goes that was refused.
	Network store.NetworkID `json:"network,omitempty"`
}

type underlayReply struct {
	Address    netip.Addr `json:"address,omitzero"`
	Link       string     `json:"link,omitempty"`
	MTU        int        `json:"mtu,omitempty"`
	NoChecksum string     `json:"noChecksum,omitempty"` // why VXLAN checksum offload is off
}

type loopReply struct {
	Passes   uint64            `json:"passes"`
	Ops      uint64            `json:"ops"`
	Failures uint64            `json:"failures"`
	Repaired map[string]uint64 `json:"repaired,omitempty"`
}

// recordCounts counts what the database holds.
type recordCounts struct {
	Networks    int `json:"networks"`
	Endpoints   int `json:"endpoints"`
	Remote      int `json:"remote"`
	PeersAlive  int `json:"peersAlive"`
	PeersDead   int `json:"peersDead"`
	PeersHidden int `json:"peersHidden"`
	Pools       int `json:"pools"`
	Leases      int `json:"leases"`
	Cooling     int `json:"cooling"`
}

// networkReply is one entry of GET /v1/networks.
type networkReply struct {
	store.Network
	Bridge       string                  `json:"bridge"`
	EffectiveMTU int                     `json:"effectiveMtu"`
	Endpoints    int                     `json:"endpoints"`
	Remote       int                     `json:"remote"`
	Peers        []string                `json:"peers"`              // names of hosts that run it
	Disagree     []string                `json:"disagree,omitempty"` // hosts that run the VNI with other subnets
	Alike        []string                `json:"alike,omitempty"`    // networks of hosts with the same subnets and another VNI
	Twice        []string                `json:"twice,omitempty"`    // addresses that endpoints of two living hosts have
	Services     []string                `json:"services,omitempty"` // of Swarm, with a virtual address
	Crowded      []string                `json:"crowded,omitempty"`  // services with more tasks than a virtual address can have
	Status       dataplane.NetworkStatus `json:"status"`
}

// endpointReply is one entry of GET /v1/endpoints: this host's and its peers'.
type endpointReply struct {
	ID      store.EndpointID `json:"id"`
	VNI     store.VNI        `json:"vni"`
	Network store.NetworkID  `json:"network"`
	Host    string           `json:"host"`
	Local   bool             `json:"local"`
	State   string           `json:"state"` // "made", "joined", "missing" (its link), "left"; of a peer "remote", "hidden"
	MAC     store.MAC        `json:"mac"`
	IPv4    netip.Addr       `json:"ipv4,omitzero"`
	IPv6    netip.Addr       `json:"ipv6,omitzero"`
	Link    string           `json:"link,omitempty"` // host's side
	Sandbox string           `json:"sandbox,omitempty"`
	Ports   []store.Port     `json:"ports,omitempty"`   // published by Weft
	Program *kernel.Counters `json:"program,omitempty"` // what the port program has counted of what it sent
}

// peerReply is one entry of GET /v1/peers.
type peerReply struct {
	store.Peer
	Alive    bool        `json:"alive"`
	InSync   bool        `json:"inSync"`
	LastErr  string      `json:"lastErr,omitempty"`
	Cut      bool        `json:"cut,omitempty"` // others hear it, but from here no way leads to it
	Via      netip.Addr  `json:"via"`           // by which this host reaches it: its address, or that of the NAT in front of it
	Networks []store.VNI `json:"networks"`
	VXLAN    bool        `json:"vxlan,omitempty"` // packets of a network that both run go to it in VXLAN
	Way      string      `json:"way"`             // of routed networks: "direct" (a plain route) or "vxlan"; of encrypted ones "wireguard", with " (no answer)" while the peer gives none there, or " (refused, …)"
}

// poolReply is one entry of GET /v1/ipam.
type poolReply = ipam.PoolStatus

// planReply answers GET /v1/plan?network=…: one line per object or operation.
type planReply struct {
	Network store.NetworkID `json:"network,omitempty"` // empty for the host, or when only the kernel has it
	VNI     store.VNI       `json:"vni"`
	Want    []string        `json:"want"`
	Have    []string        `json:"have"`
	Ops     []string        `json:"ops"`
}

// forgetReply answers POST /v1/forget.
type forgetReply struct {
	Network store.NetworkID `json:"network"`
	VNI     store.VNI       `json:"vni"`
	Pools   []string        `json:"pools"` // that went with it
}

// auditReply answers GET /v1/audit.
type auditReply struct {
	Differences []difference `json:"differences"`
}

// difference is one thing in which two of Docker, records and kernel differ.
type difference struct {
	Between string          `json:"between"`           // "records, kernel", "Docker, records" or "Docker, leases"
	Network store.NetworkID `json:"network,omitempty"` // empty for the host
	VNI     store.VNI       `json:"vni"`
	Text    string          `json:"text"`
}

// flowReply is one entry of GET /v1/flows: what a container of this host has sent to one
// address. The answers are another flow, of their sender's host.
type flowReply struct {
	VNI            store.VNI       `json:"vni"`
	Network        store.NetworkID `json:"network,omitempty"`
	Source         flowEnd         `json:"source"`
	Destination    flowEnd         `json:"destination"`
	Virtual        netip.Addr      `json:"virtual,omitzero"`         // virtual address that was asked; the destination is the task's
	VirtualService string          `json:"virtualService,omitempty"` // its service
	Protocol       string          `json:"protocol"`                 // "tcp", …, or its number
	Port           uint16          `json:"port,omitempty"`           // the lower one of both
	Verdict        kernel.Verdict  `json:"verdict"`                  // "fast", "slow", "dropped: …"
	Packets        uint64          `json:"packets"`
	Bytes          uint64          `json:"bytes"`
	First          time.Time       `json:"first"`
	Last           time.Time       `json:"last"`
}

// flowEnd is one end of a flow: an address, what the records know of it, and what the
// command learns from Docker.
type flowEnd struct {
	Address   netip.Addr        `json:"address"`
	Pretends  bool              `json:"pretends,omitempty"` // it is not the endpoint's
	Endpoint  store.EndpointID  `json:"endpoint,omitempty"`
	Host      string            `json:"host,omitempty"`
	Local     bool              `json:"local,omitempty"`
	Container string            `json:"container,omitempty"` // or a service's task
	Service   string            `json:"service,omitempty"`   // of Swarm or Compose
	Labels    map[string]string `json:"labels,omitempty"`
}

// versionReply answers GET /v1/version.
type versionReply struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}

// adminError is the answer to a request that failed.
type adminError struct {
	Error string `json:"error"`
}
