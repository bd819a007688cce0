// Package kernel is dataplane.Kernel on Linux.
//
// Links, forwarding entries, neighbours and sets go by netlink; rules by one
// iptables-restore per family and batch, in the backend (nft or legacy) that
// Docker uses. Whatever is ours is found again by name and alias (links), by name
// (sets, chains) or by what it hangs on (forwarding entries, neighbours, jumps);
// the package remembers nothing that can be read.
//
//	kernel.go    Read, Apply, Recover
//	netlink.go   the socket: batches, dumps
//	link.go      links as the kernel tells them; linkput.go makes, linkgone.go removes them
//	router.go    what makes a link a router's port
//	route.go     routes of our table and the rules that lead to it
//	tunnel.go    WireGuard devices and their peers; userspace.go those of this process,
//	             wgmodule.go those of the kernel
//	program.go   the port program (bpf/); filter.go where it stands; port.go, dest.go and
//	             service.go and counters.go what it knows and tells; programmap.go its maps
//	entry.go     forwarding entries and neighbours
//	set.go       sets
//	rules.go     chains and jumps as iptables-save tells them; restore.go writes them
//	backend.go   which iptables
//	underlay.go  addresses, routes, checksum offload
//	watch.go     outside changes; tunnelwatch.go those of WireGuard devices
//
// It knows nothing of records beyond what a Plan names, and decides nothing.
package kernel

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/dataplane"
	"github.com/weftnet/weft/store"
)

// Config is what New needs. The zero value is usable.
type Config struct {
	Backend  string // of iptables: "nft", "legacy", or "auto" (default) for Docker's
	Checksum string // transmit checksum offload on VXLAN: "on", "off", or "auto" (default)
	// SysNet is where the host's /proc/sys/net can be written (default: that
	// path itself, which is read-only inside a managed plugin). Without it,
	// IPv6 stays enabled on bridges, and Read says so.
	SysNet string
	// WireGuard is "kernel" for the kernel's module, "userspace" for a device in this
	// process, or "auto" (default) for the module where there is one.
	WireGuard string
	// WireGuardKey returns the private key of a public one of this host. nil: it has none.
	WireGuardKey func(public store.WGKey) (private store.WGKey, ok bool)
	Program      *Program     // nil: networks do without
	Flows        bool         // it counts who sends what to whom
	Log          *slog.Logger // default: slog.Default()
}

// Kernel is the network namespace in which New was called. Its methods may be
// called from any goroutine of a process that lives in that namespace as a whole;
// where only a thread does (tests), they must be called on that thread. Two Apply
// at a time are not meant to be.
type Kernel struct {
	cfg    Config
	log    *slog.Logger
	route  *conn // rtnetlink
	strict *conn // rtnetlink that filters dumps
	filter *conn // nfnetlink
	handle *netlink.Handle
	tool   *ethtool.Ethtool
	ns     *os.File // the namespace, for Watch's own thread
	rules  *ruler
	// underlay is the index of the link last answered by Underlay: Watch
	// follows it.
	underlay atomic.Int32
	// noSysctl: a failed write was logged.
	noSysctl atomic.Bool
	tunnels  tunnels
	program  *Program
}

// New opens the kernel of the calling thread's network namespace. It fails when
// the setting names no backend, or when iptables is not installed.
func New(cfg Config) (_ *Kernel, err error) {
	cfg.Backend, cfg.Checksum = cmp.Or(cfg.Backend, "auto"), cmp.Or(cfg.Checksum, "auto")
	cfg.SysNet, cfg.WireGuard = cmp.Or(cfg.SysNet, "/proc/sys/net"), cmp.Or(cfg.WireGuard, "auto")
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if !slices.Contains([]string{"auto", "on", "off"}, cfg.Checksum) {
		return nil, fmt.Errorf("checksum offload %q is not known; use auto, on or off", cfg.Checksum)
	}
	k := &Kernel{cfg: cfg, log: cfg.Log, program: cmp.Or(cfg.Program, NoProgram("not asked for", "")), tunnels: tunnels{own: map[string]*ownDevice{}}}
	k.tunnels.module.open, k.tunnels.module.there = openWGClient, func(device string) bool {
		l, err := k.link(device)
		return err == nil && l.kind == "wireguard"
	}
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	if k.rules, err = newRuler(cfg.Backend, cfg.Log); err != nil {
		return nil, err
	}
	if k.route, err = dial(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	if k.strict, err = dial(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	// Without it (before Linux 4.20) all tables come, and parseRoute sorts them out.
	_ = unix.SetsockoptInt(k.strict.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	if k.filter, err = dial(unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("open nfnetlink: %w", err)
	}
	if k.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if k.tool, err = ethtool.NewEthtool(); err != nil {
		return nil, fmt.Errorf("open ethtool: %w", err)
	}
	if k.tunnels.module.client, err = openWGClient(); err != nil {
		return nil, fmt.Errorf("open WireGuard: %w", err)
	}
	if k.ns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	if err := k.forgetLeft(); err != nil {
		k.log.Warn("connections to tasks that are gone may hang", "err", err)
	}
	if loose, err := os.ReadFile("/proc/sys/net/ipv4/conf/all/rp_filter"); err == nil && string(loose) == "2\n" {
		k.log.Warn("net.ipv4.conf.all.rp_filter is 2: without Weft's rules, containers on Weft networks can send to this host; set it to 0 or 1")
	}
	return k, nil
}

// Close releases the sockets, and ends the WireGuard devices of this process, of which
// the links stay. Calls after it fail.
func (k *Kernel) Close() {
	if k.route != nil {
		k.route.close()
	}
	if k.strict != nil {
		k.strict.close()
	}
	if k.filter != nil {
		k.filter.close()
	}
	if k.handle != nil {
		k.handle.Close()
	}
	if k.tool != nil {
		k.tool.Close()
	}
	k.tunnels.close()
	if k.ns != nil {
		_ = k.ns.Close()
	}
}

// Backend returns the iptables backend in use, "nft" or "legacy", or "" before
// the first Read of the host.
func (k *Kernel) Backend() string { return k.rules.name() }

// UserRules returns how many rules the host's admin has put into DOCKER-USER, as of the
// last Read of the host.
func (k *Kernel) UserRules() int {
	k.rules.mu.Lock()
	defer k.rules.mu.Unlock()
	return k.rules.users
}

// Read implements dataplane.Kernel.
func (k *Kernel) Read(ctx context.Context, v store.VNI) (dataplane.Plan, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if v == store.HostVNI {
		return k.readHost(ctx)
	}
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	p := dataplane.Plan{}
	if err := k.readLinks(p, links, v); err != nil {
		return nil, err
	}
	if err := k.readEntries(p, links, v); err != nil {
		return nil, err
	}
	names := map[int32]string{}
	for _, l := range links {
		names[l.index] = l.name
	}
	if err := k.readRoutes(p, names, v); err != nil {
		return nil, err
	}
	if err := k.readDests(p, names, v); err != nil {
		return nil, err
	}
	if err := k.readServices(p, v); err != nil {
		return nil, err
	}
	return p, nil
}

func (k *Kernel) readHost(ctx context.Context) (dataplane.Plan, error) {
	p := dataplane.Plan{}
	if err := k.readSets(p); err != nil {
		return nil, err
	}
	if err := k.rules.read(ctx, p); err != nil {
		return nil, err
	}
	if err := k.readRules(p); err != nil {
		return nil, err
	}
	if err := k.readTunnels(p); err != nil {
		return nil, err
	}
	if err := k.readProgram(p); err != nil {
		return nil, err
	}
	return p, nil
}

// class says which operations run together.
type class int

const (
	classSet class = iota // also routing rules: one by one
	classRule
	classPeer
	classLink
	classLinkGone
	classRoute
	classEntry
	classDest
)

func classOf(o dataplane.Op) class {
	switch o.Object.(type) {
	case dataplane.Set:
		return classSet
	case dataplane.Chain, dataplane.Jump:
		return classRule
	case dataplane.Route:
		return classRoute
	case dataplane.Neigh, dataplane.FDB:
		return classEntry
	case dataplane.Dest:
		return classDest
	case dataplane.TunnelPeer:
		return classPeer
	case dataplane.RouteRule, dataplane.Program, dataplane.Service:
		return classSet
	}
	if o.Verb == dataplane.Delete {
		return classLinkGone
	}
	return classLink
}

// Apply implements dataplane.Kernel. Neighbouring operations of one class go to
// the kernel together.
func (k *Kernel) Apply(ctx context.Context, ops []dataplane.Op) []*dataplane.OpError {
	var failed []*dataplane.OpError
	for len(ops) > 0 {
		c, n := classOf(ops[0]), 1
		for n < len(ops) && classOf(ops[n]) == c {
			n++
		}
		for _, op := range ops[:n] {
			store.FailPoint(failPoint(op.Verb, op.Object.Key().Kind))
		}
		for i, err := range k.apply(ctx, c, ops[:n], ops[n:]) {
			if err != nil {
				failed = append(failed, &dataplane.OpError{Op: ops[i], Err: err})
			}
		}
		ops = ops[n:]
	}
	return failed
}

// failPoint names the step before operations of the kind go to the kernel.
func failPoint(verb dataplane.Verb, kind dataplane.Kind) string {
	if verb == dataplane.Delete {
		return "kernel.delete." + kind.String()
	}
	return "kernel.put." + kind.String()
}

// FailPoints lists the steps at which a test build can be killed in this package.
func FailPoints() []string {
	var out []string
	for _, verb := range []dataplane.Verb{dataplane.Put, dataplane.Delete} {
		for kind := dataplane.KindSet; kind <= dataplane.KindService; kind++ {
			out = append(out, failPoint(verb, kind))
		}
	}
	return out
}

// apply runs ops, which are all of class c, and returns one error per op. later
// are the operations still to come.
func (k *Kernel) apply(ctx context.Context, c class, ops, later []dataplane.Op) []error {
	errs := make([]error, len(ops))
	if err := ctx.Err(); err != nil {
		return fill(errs, err)
	}
	switch c {
	case classRule:
		return k.rules.apply(ctx, ops)
	case classPeer:
		return k.applyPeers(ctx, ops)
	case classLinkGone:
		return k.deleteLinks(ops)
	case classRoute:
		return k.applyRoutes(ops)
	case classEntry:
		return k.applyEntries(ops, later)
	case classDest:
		return k.applyDests(ops)
	}
	for i, op := range ops {
		if errs[i] = ctx.Err(); errs[i] != nil {
			continue
		}
		switch o := op.Object.(type) {
		case dataplane.Set:
			errs[i] = k.applySet(ctx, op.Verb, o)
		case dataplane.RouteRule:
			errs[i] = k.applyRule(ctx, op.Verb, o)
		case dataplane.WireGuard:
			errs[i] = k.putTunnel(o)
		case dataplane.Service:
			errs[i] = orFull(k.applyService(op.Verb, o))
		case dataplane.Program:
			if op.Verb == dataplane.Delete {
				errs[i] = k.deleteProgram()
			} else {
				errs[i] = k.putProgram(o)
			}
		case dataplane.Bridge:
			errs[i] = k.putBridge(o)
		case dataplane.VXLAN:
			errs[i] = k.putVXLAN(o)
		case dataplane.Veth:
			errs[i] = k.putVeth(o)
		default:
			errs[i] = fmt.Errorf("%T is no kernel object", o)
		}
	}
	return errs
}

// fill sets every error that is nil to err.
func fill(errs []error, err error) []error {
	for i := range errs {
		if errs[i] == nil {
			errs[i] = err
		}
	}
	return errs
}

// Networks implements dataplane.Kernel.
func (k *Kernel) Networks(ctx context.Context) ([]store.VNI, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	links, err := k.links()
	if err != nil {
		return nil, err
	}
	var out []store.VNI
	for _, l := range links {
		if v, ok := l.vni(); ok {
			out = append(out, v)
		}
	}
	routes, err := k.routes()
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if !r.odd {
			out = append(out, store.VNI(r.metric))
		}
	}
	if k.program.err == nil {
		known, err := k.program.networks()
		if err != nil {
			return nil, err
		}
		out = append(out, known...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// Recover returns the networks and endpoints that the aliases of our links tell,
// sorted by id: what a host that lost its database can know. Of a joined endpoint
// the sandbox is "?".
func (k *Kernel) Recover(ctx context.Context) ([]store.Network, []store.Endpoint, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	links, err := k.links()
	if err != nil {
		return nil, nil, err
	}
	var networks []store.Network
	var endpoints []store.Endpoint
	for _, l := range links {
		if _, ok := l.vni(); !ok {
			continue
		}
		if n, ok := dataplane.ParseNetworkAlias(l.alias); ok {
			networks = append(networks, n)
		}
		if e, ok := dataplane.ParseEndpointAlias(l.alias); ok {
			endpoints = append(endpoints, e)
		}
	}
	slices.SortFunc(networks, func(a, b store.Network) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(endpoints, func(a, b store.Endpoint) int { return cmp.Compare(a.ID, b.ID) })
	return networks, endpoints, nil
}

// gone reports whether a deletion found nothing to delete.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}
