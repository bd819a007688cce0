// Package driver is the NetworkDriver: it turns Docker's calls into records and
// waits until the kernel holds them.
//
// A call checks its request against the records in one transaction, writes the
// record, and calls Syncer. If that fails, the record that this call made is
// deleted again, and the data plane removes what is left: there is no undo code.
// Calls are idempotent by id, since Docker repeats them after a crash and asks for
// clean-up only once. Nothing here calls Docker.
//
// The protocol is described in moby daemon/libnetwork/docs/remote.md.
package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// Syncer makes the kernel match the records.
type Syncer interface {
	// Sync returns nil when the kernel holds the endpoint, or with no endpoint
	// the network itself; otherwise it says what is in the way.
	Sync(ctx context.Context, v store.VNI, e store.EndpointID) error
	// Missing returns the joined endpoints whose link is gone.
	Missing(v store.VNI) []store.EndpointID
	// Untaken returns the joined endpoints whose link Docker has not taken.
	Untaken(v store.VNI) []store.EndpointID
}

// Route is a route of the host that a network must not overlap.
type Route struct {
	Prefix netip.Prefix
	Link   string
}

// VXLAN is a VXLAN device of somebody else on this host.
type VXLAN struct {
	Name string
	VNI  store.VNI
	Port uint16
}

// Config is what a Driver works with. All fields but Term, Doubt, Refuse, Fits and Hold are needed.
type Config struct {
	DB *store.DB
	// Refuse returns why this host must not make anything new now, or nil.
	Refuse func() error
	// Fits returns why this host cannot run a network, or nil. nil: all fit.
	Fits func(store.Network) error
	// Keyed: this host has a cluster key, so no stranger is among the peers.
	Keyed bool
	// Term returns a number that is another one whenever Docker begins to ask anew for
	// all that its Swarm has, or 0 before. What it has not asked for since then is not
	// known to count: a manager that becomes the leader again may have missed the end of
	// networks. nil: there is one term.
	Term func() uint64
	// Doubt reports whether Docker may ask for nothing in this term, since only the plugin
	// is new to it. nil: it asks.
	Doubt  func() bool
	Sync   Syncer
	Routes func(context.Context) ([]Route, error)
	VXLANs func(context.Context) ([]VXLAN, error)
	// Hold binds a port of the host ("tcp", "udp", "sctp") until it is closed, so that no
	// process takes it; to is where the rules lead. nil: ports are not held.
	Hold func(proto string, at, to netip.AddrPort) (io.Closer, error)
	Log  *slog.Logger
}

// Driver answers the calls of the NetworkDriver protocol. Its methods may run at the
// same time.
type Driver struct {
	Config
	refusedMu sync.Mutex // guards what follows
	refused   map[store.NetworkID]Refusal
	// repeated is the term in which Docker was last seen to repeat what it has, as it
	// does when this host becomes the leader.
	repeated atomic.Uint64

	heldMu sync.Mutex // guards what follows
	held   map[store.EndpointID][]io.Closer
}

// New returns a driver.
func New(c Config) *Driver { return &Driver{Config: c} }

// GetCapabilities says whether Swarm's managers allocate networks (scope global) or
// each host makes its own (local, which is the only answer that works standalone on
// every engine). Either way networks reach other hosts.
func GetCapabilities(scope string) Capabilities {
	return Capabilities{Scope: scope, ConnectivityScope: network.GlobalScope}
}

// CreateNetwork records a network and makes its bridge, its VXLAN device and the
// rules.
func (d *Driver) CreateNetwork(ctx context.Context, r network.CreateNetworkRequest) (struct{}, error) {
	err := d.createNetwork(ctx, r)
	if id := store.NetworkID(r.NetworkID); id.OfSwarm() { // else its user is told
		d.noteRefusal(id, true, err)
	}
	if err != nil {
		err = fmt.Errorf("create network: %w", err)
	}
	return struct{}{}, err
}

func (d *Driver) createNetwork(ctx context.Context, r network.CreateNetworkRequest) error {
	n, err := parseNetwork(r)
	if err == nil {
		err = d.refuse()
	}
	if err == nil {
		err = d.unfit(n)
	}
	if err != nil {
		return err
	}
	made, err := d.addNetwork(ctx, &n)
	if err != nil {
		return err
	}
	store.FailPoint("driver.CreateNetwork.written")
	if err := d.Sync.Sync(ctx, n.VNI, ""); err != nil {
		if made {
			err = errors.Join(err, d.forget(func(tx *store.Tx) error { return tx.DeleteNetwork(n.ID) }))
		}
		return fmt.Errorf("vni %d: %w", n.VNI, err)
	}
	store.FailPoint("driver.CreateNetwork.synced")
	return nil
}

// unfit returns why this host cannot run the network.
func (d *Driver) unfit(n store.Network) error {
	if n.Encrypted && len(n.Key) == 0 && !d.Keyed {
		return errors.New("option encrypted: this host has no cluster key, so a stranger on the underlay could be taken for a host of the network; set WEFT_KEY_FILE on all hosts, or give the network a key with -o key=")
	}
	return d.fits(n)
}

func (d *Driver) fits(n store.Network) error {
	if d.Fits == nil {
		return nil
	}
	return d.Fits(n)
}

func (d *Driver) refuse() error {
	if d.Refuse == nil {
		return nil
	}
	return d.Refuse()
}

// addNetwork writes the record unless the same one is there. n gets its VNI.
func (d *Driver) addNetwork(ctx context.Context, n *store.Network) (made bool, err error) {
	routes, err := d.Routes(ctx)
	if err != nil {
		return false, fmt.Errorf("routes of the host: %w", err)
	}
	foreign, err := d.VXLANs(ctx)
	if err != nil {
		return false, fmt.Errorf("VXLAN devices of the host: %w", err)
	}
	store.FailPoint("driver.CreateNetwork.checked")
	if n.ID.OfSwarm() {
		n.Term = d.term()
	}
	put := func(tx *store.Tx) error {
		self := d.DB.Self().Address
		others := slices.DeleteFunc(slices.Clone(n.Meet), func(a netip.Addr) bool { return a == self })
		if err := tx.Meet(others, time.Now()); err != nil {
			return err
		}
		return tx.PutNetwork(*n)
	}
	err = d.DB.Update(ctx, func(tx *store.Tx) error {
		old, err := tx.Network(n.ID)
		if err == nil {
			if n.VNI == 0 {
				n.VNI = old.VNI
			}
			if completes(old, *n) {
				return put(tx)
			}
			if !reflect.DeepEqual(normal(old), normal(*n)) {
				return fmt.Errorf("network %s exists with subnets %v and options %v, not %v and %v; remove it first",
					n.ID, old.Prefixes(), Shown(old.Options), n.Prefixes(), Shown(n.Options))
			}
			if old.Term == n.Term && maps.Equal(old.Options, n.Options) {
				return nil
			}
			return put(tx)
		}
		if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err := checkClashes(tx, *n, routes, d.DB.Self().Name); err != nil {
			return err
		}
		if err := chooseVNI(tx, n, foreign, d.DB.Self().DataPort); err != nil {
			return err
		}
		made = true
		return put(tx)
	})
	return made, err
}

// completes reports whether n is a network that was recovered from the kernel, with what
// is not there. The kernel may have fewer of its subnets.
func completes(old, n store.Network) bool {
	return old.Recovered && len(old.Subnets) <= len(n.Subnets) && slices.Equal(old.Prefixes(), n.Prefixes()[:len(old.Subnets)]) &&
		old.VNI == n.VNI && old.Mode == n.Mode && old.Encrypted == n.Encrypted && old.Internal == n.Internal && old.OwnGateway() == n.OwnGateway()
}

// normal removes what is no difference: nothing and an empty map, when Docker asked, and
// whom to meet, which a leader of Swarm adds to a network that lives.
func normal(n store.Network) store.Network {
	n.Term, n.Meet = 0, nil
	n.Options = maps.Clone(n.Options)
	delete(n.Options, "meet")
	delete(n.Options, optMeet)
	if len(n.Options) == 0 {
		n.Options = nil
	}
	return n
}

// checkClashes refuses subnets that overlap a route of the host or another
// network.
func checkClashes(tx *store.Tx, n store.Network, routes []Route, host string) error {
	all, err := tx.Networks()
	if err != nil {
		return err
	}
	for _, s := range n.Subnets {
		for _, o := range all {
			for _, p := range o.Prefixes() {
				if p.Overlaps(s.Pool) {
					return fmt.Errorf("subnet %s overlaps %s of Weft network %.12s (vni %d); choose another%s", s.Pool, p, o.ID, o.VNI, orForget(o.ID))
				}
			}
		}
		for _, r := range routes {
			if r.Prefix.Overlaps(s.Pool) {
				return fmt.Errorf("subnet %s overlaps the host's route %s on %s (host %s); choose another", s.Pool, r.Prefix, r.Link, host)
			}
		}
	}
	return nil
}

// orForget is what to do about a network of this host that is in the way and that Docker
// has no more: its removal came while the plugin was disabled, and does not come again.
func orForget(id store.NetworkID) string {
	return fmt.Sprintf(", or, if docker network ls does not show that one any more: weft forget %.12s", id)
}

// chooseVNI checks the VNI asked for, or takes the one under which a peer runs a
// network with the same subnets, or the lowest free one from FirstVNI. One that a
// peer runs with other subnets is another network, and not free.
func chooseVNI(tx *store.Tx, n *store.Network, foreign []VXLAN, port uint16) error {
	if n.VNI != 0 {
		return checkVNI(tx, *n, foreign, port)
	}
	alike, err := tx.Alike(*n)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		try := *n
		if i < len(alike) {
			try.VNI = alike[i].VNI
		} else if try.VNI = store.FirstVNI + store.VNI(i-len(alike)); try.VNI > store.MaxVNI {
			return errors.New("all VNIs are taken on this host")
		}
		err := checkVNI(tx, try, foreign, port)
		if err == nil {
			n.VNI = try.VNI
			return nil
		}
		if !errors.As(err, new(clashError)) {
			return err
		}
	}
}

// clashError says who has a VNI.
type clashError struct{ error }

func checkVNI(tx *store.Tx, n store.Network, foreign []VXLAN, port uint16) error {
	o, err := tx.NetworkByVNI(n.VNI)
	if err == nil {
		return clashError{fmt.Errorf("vni %d belongs to Weft network %.12s with subnets %v on this host; choose another%s", n.VNI, o.ID, o.Prefixes(), orForget(o.ID))}
	}
	if !errors.Is(err, store.ErrNotFound) {
		return err
	}
	for _, f := range foreign {
		if f.VNI == n.VNI && f.Port == port {
			return clashError{fmt.Errorf("vni %d with UDP port %d belongs to the link %s, which is not Weft's; choose another vni", n.VNI, port, f.Name)}
		}
	}
	peers, err := tx.RunBy(n.VNI)
	if err != nil {
		return err
	}
	if len(n.Key) > 0 {
		return nil // a peer without the key has no say in what the network is
	}
	for _, p := range peers {
		if !n.Runs(p) {
			return clashError{fmt.Errorf("vni %d is a network with subnets %v%s on host %s, here it would have %v; use the same --subnet and key, or another vni",
				n.VNI, p.Prefixes, keyed(p), hostName(tx, p.Owner), n.Shared().Prefixes)}
		}
	}
	return nil
}

func keyed(p store.PeerNetwork) string {
	if len(p.Proof) > 0 {
		return " and a key"
	}
	return ""
}

func hostName(tx *store.Tx, id store.HostID) string {
	p, err := tx.Peer(id)
	if err != nil || p.Name == "" {
		return string(id)
	}
	return p.Name
}

// DeleteNetwork removes a network. An unknown one is no error: Docker asks once.
func (d *Driver) DeleteNetwork(ctx context.Context, r network.DeleteNetworkRequest) (struct{}, error) {
	store.FailPoint("driver.DeleteNetwork.before")
	err := d.removeNetwork(ctx, store.NetworkID(r.NetworkID), func([]store.Endpoint) error { return nil })
	store.FailPoint("driver.DeleteNetwork.written")
	return struct{}{}, err
}

// removeNetwork deletes a network with the endpoints that Docker has forgotten, and gives
// their ports back to the host; not if may refuses.
func (d *Driver) removeNetwork(ctx context.Context, id store.NetworkID, may func([]store.Endpoint) error) error {
	var eps []store.Endpoint
	err := d.DB.Update(ctx, func(tx *store.Tx) (err error) {
		if eps, err = tx.Endpoints(id); err != nil {
			return err
		}
		if err := may(eps); err != nil {
			return err
		}
		return tx.DeleteNetwork(id)
	})
	if err != nil {
		return err
	}
	for _, e := range eps {
		d.release(e.ID)
	}
	return nil
}

// Forget removes a network whose removal in Docker did not reach this host, and returns
// what it was. One with a container on it stays.
func (d *Driver) Forget(ctx context.Context, id store.NetworkID) (n store.Network, err error) {
	if err := d.DB.View(func(tx *store.Tx) (err error) { n, err = tx.Network(id); return err }); err != nil {
		return n, err
	}
	gone := d.Sync.Missing(n.VNI)
	return n, d.removeNetwork(ctx, id, func(eps []store.Endpoint) error {
		for _, e := range eps {
			if e.Sandbox != "" && !e.Left && !slices.Contains(gone, e.ID) {
				return fmt.Errorf("endpoint %.12s is in a container; remove that first", e.ID)
			}
		}
		return nil
	})
}

// AbandonNetwork removes a network whose CreateNetwork a crash cut off: Docker
// has forgotten it. One with endpoints is in use and stays: the call repeated
// what was there.
func (d *Driver) AbandonNetwork(ctx context.Context, id string) error {
	return d.DB.Update(ctx, func(tx *store.Tx) error {
		eps, err := tx.Endpoints(store.NetworkID(id))
		if err != nil || len(eps) > 0 {
			return err
		}
		return tx.DeleteNetwork(store.NetworkID(id))
	})
}

// forget deletes a record after its call failed, also when the call's time is up.
func (d *Driver) forget(fn func(*store.Tx) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return d.DB.Update(ctx, fn)
}
