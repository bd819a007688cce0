package driver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-plugins-helpers/network"

	"github.com/weftnet/weft/store"
)

// Options that AllocateNetwork adds to the user's. What it answers takes the place
// of those on every host and in docker network inspect, and comes back to it when
// another manager becomes the leader.
const (
	OptVNI = "weft.vni"
	OptKey = "weft.key"
	// optMeet lets hosts find each other on which the plugin was enabled after they
	// formed the Swarm: Docker then tells each of them of itself alone.
	optMeet = "weft.meet"
)

// AllocateNetwork decides, as leader of a Swarm, on the VNI and the key of a
// network. Asked again it gives the answer that the options hold, or that it
// recorded: a new leader changes nothing.
//
// The key reaches, by Swarm's own encrypted log, the managers and the hosts that run
// the network, and lets them believe each other's records of it.
func (d *Driver) AllocateNetwork(ctx context.Context, r network.AllocateNetworkRequest) (network.AllocateNetworkResponse, error) {
	options, err := d.allocate(ctx, r)
	d.noteRefusal(store.NetworkID(r.NetworkID), false, err)
	if err != nil {
		return network.AllocateNetworkResponse{}, fmt.Errorf("allocate network: %w", err)
	}
	return network.AllocateNetworkResponse{Options: options}, nil
}

// Refusal is why a network of Swarm was not allocated, or not made on this host. Docker
// does not tell its user: the network is there, and its tasks wait or go elsewhere.
type Refusal struct {
	Reason string
	Here   bool // allocated, but not made on this host
	At     time.Time
}

// refusalStays is how long a refusal is told: Docker says nothing when the network is
// removed, or its tasks run elsewhere.
const refusalStays = 10 * time.Minute

// Refusals returns those of the last ten minutes.
func (d *Driver) Refusals() map[store.NetworkID]Refusal {
	d.refusedMu.Lock()
	defer d.refusedMu.Unlock()
	maps.DeleteFunc(d.refused, func(_ store.NetworkID, r Refusal) bool { return time.Since(r.At) > refusalStays })
	return maps.Clone(d.refused)
}

func (d *Driver) noteRefusal(id store.NetworkID, here bool, err error) {
	d.refusedMu.Lock()
	defer d.refusedMu.Unlock()
	delete(d.refused, id)
	if err == nil || checkID("", string(id)) != nil || len(d.refused) >= 100 {
		return
	}
	if d.refused == nil {
		d.refused = map[store.NetworkID]Refusal{}
	}
	d.refused[id] = Refusal{Reason: err.Error(), Here: here, At: time.Now()}
}

func (d *Driver) allocate(ctx context.Context, r network.AllocateNetworkRequest) (map[string]string, error) {
	if a, ok := formerAnswer(r); ok {
		err := checkID("NetworkID", r.NetworkID)
		if err == nil {
			err = d.DB.Update(ctx, func(tx *store.Tx) error {
				old, err := tx.Allocation(a.ID)
				if err == nil && bytes.Equal(old.Key, a.Key) { // else it is another leader's
					err = unaltered(old, a)
				}
				if err != nil && !errors.Is(err, store.ErrNotFound) {
					return err
				}
				return d.keep(tx, a)
			})
		}
		return maps.Clone(r.Options), err
	}
	n, err := parseNetwork(network.CreateNetworkRequest{NetworkID: r.NetworkID, Options: map[string]any{keyGeneric: anyValues(r.Options)},
		IPv4Data: pointers(r.IPv4Data), IPv6Data: pointers(r.IPv6Data)})
	if err != nil {
		return nil, err
	}
	err = d.refuse()
	if err == nil {
		err = d.fits(n)
	}
	if err != nil {
		return nil, err
	}
	foreign, err := d.VXLANs(ctx)
	if err != nil {
		return nil, fmt.Errorf("VXLAN devices of the host: %w", err)
	}
	var a store.Allocation
	err = d.DB.Update(ctx, func(tx *store.Tx) error {
		if a, err = d.decide(tx, n, foreign); err != nil {
			return err
		}
		return d.keep(tx, a)
	})
	if err != nil {
		return nil, err
	}
	out := maps.Clone(a.Given)
	if out == nil {
		out = map[string]string{}
	}
	out[OptVNI], out[OptKey] = strconv.Itoa(int(a.VNI)), hex.EncodeToString(a.Key)
	if len(a.Meet) > 0 {
		out[optMeet] = joined(a.Meet)
	}
	return out, nil
}

// formerAnswer returns the allocation of options that hold what AllocateNetwork once
// answered. Swarm has committed them, so they count for more than another answer that this
// host noted, and are not checked again: a leader of another version, or with a smaller underlay, only
// hands them on, and a host that cannot have the network refuses it itself. What this
// version cannot read of them is left out. A vni and a key under other names are the
// user's, and are checked.
func formerAnswer(r network.AllocateNetworkRequest) (store.Allocation, bool) {
	vni, err := strconv.ParseUint(r.Options[OptVNI], 10, 32)
	key, err2 := hex.DecodeString(r.Options[OptKey])
	if err != nil || err2 != nil || vni < 1 || vni > uint64(store.MaxVNI) || len(key) != keyBytes ||
		r.Options[OptVNI] != strconv.FormatUint(vni, 10) || r.Options[OptKey] != hex.EncodeToString(key) {
		return store.Allocation{}, false
	}
	a := store.Allocation{ID: store.NetworkID(r.NetworkID), VNI: store.VNI(vni), Key: key, Given: given(r.Options)}
	var n store.Network
	for _, d := range slices.Concat(r.IPv4Data, r.IPv6Data) {
		if p, err := netip.ParsePrefix(d.Pool); err == nil {
			n.Subnets = append(n.Subnets, store.Subnet{Pool: p.Masked()})
		}
	}
	a.Prefixes = n.Shared().Prefixes
	for _, text := range strings.Split(r.Options[optMeet], ",") {
		if addr, err := netip.ParseAddr(text); err == nil {
			a.Meet = append(a.Meet, addr)
		}
	}
	return a, true
}

// unaltered refuses to change what is allocated; without a vni none is asked for.
func unaltered(old, a store.Allocation) error {
	if slices.Equal(old.Prefixes, a.Prefixes) && maps.Equal(old.Given, a.Given) && (a.VNI == 0 || a.VNI == old.VNI) {
		return nil
	}
	return fmt.Errorf("network %s is allocated with vni %d, subnets %v and options %v, not with vni %d, %v and %v; remove it first",
		a.ID, old.VNI, old.Prefixes, Shown(old.Given), a.VNI, a.Prefixes, Shown(a.Given))
}

// given returns the options without those that AllocateNetwork adds.
func given(options map[string]string) map[string]string {
	out := maps.Clone(options)
	delete(out, OptVNI)
	delete(out, OptKey)
	delete(out, optMeet)
	return out
}

// keep records an allocation as one of this term.
func (d *Driver) keep(tx *store.Tx, a store.Allocation) error {
	old, err := tx.Allocation(a.ID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if a.Term = d.term(); err == nil && old.Term != a.Term {
		d.repeated.Store(a.Term)
	}
	return errors.Join(d.replaces(tx, a), tx.PutAllocation(a))
}

// decide returns the allocation that stands or that n asks for.
func (d *Driver) decide(tx *store.Tx, n store.Network, foreign []VXLAN) (store.Allocation, error) {
	a := store.Allocation{ID: n.ID, VNI: n.VNI, Key: n.Key, Prefixes: n.Shared().Prefixes, Given: given(n.Options), Meet: n.Meet}
	old, err := tx.Allocation(n.ID)
	if err == nil {
		return old, unaltered(old, a)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return a, err
	}
	if self := d.DB.Self().Address; len(a.Meet) == 0 && self.IsValid() {
		a.Meet = []netip.Addr{self}
	}
	if err := oneFamily(a.Prefixes); err != nil {
		return a, err
	}
	if err := d.overlaps(tx, a); err != nil {
		return a, err
	}
	if len(a.Key) == 0 {
		a.Key = make([]byte, keyBytes)
		_, _ = rand.Read(a.Key) // never fails (crypto/rand)
	}
	if n.VNI != 0 {
		return a, d.unallocated(tx, n, foreign)
	}
	for round := range 1000 {
		n.VNI = deriveVNI(n.ID, round)
		err := d.unallocated(tx, n, foreign)
		if err == nil {
			a.VNI = n.VNI
			return a, nil
		}
		if !errors.As(err, new(clashError)) {
			return a, err
		}
	}
	return a, errors.New("no free vni was found; give one with -o vni")
}

// oneFamily refuses IPv6. Swarm's leader gives a task one address of a network, from
// any of its subnets; the one of the other family each host then takes for itself,
// also on a network with IPv6 alone, and two hosts take the same
// (swarmkit's cnmallocator, allocateNetworkIPs).
func oneFamily(prefixes []netip.Prefix) error {
	for _, p := range prefixes {
		if p.Addr().Is6() {
			return fmt.Errorf("subnet %s: under scope global Swarm gives a task IPv4 or IPv6, never both, and each host makes up the other address, which may be another task's; leave --ipv6 out, or set WEFT_SCOPE=local and use --config-from", p)
		}
	}
	return nil
}

// overlaps refuses the subnets of another network of the Swarm. One that Docker has
// not asked for in this term may be gone.
func (d *Driver) overlaps(tx *store.Tx, a store.Allocation) error {
	all, err := tx.Allocations()
	if err != nil {
		return err
	}
	for _, o := range all {
		for _, p := range a.Prefixes {
			if o.ID != a.ID && !d.former(o) && slices.ContainsFunc(o.Prefixes, p.Overlaps) {
				return fmt.Errorf("subnet %s overlaps %v of Swarm network %.12s; choose another", p, o.Prefixes, o.ID)
			}
		}
	}
	return nil
}

// replaces forgets allocations of earlier terms that have what this one has: their
// networks were removed while another manager led.
func (d *Driver) replaces(tx *store.Tx, a store.Allocation) error {
	all, err := tx.Allocations()
	if err != nil {
		return err
	}
	for _, o := range all {
		clash := o.VNI == a.VNI || slices.ContainsFunc(a.Prefixes, func(p netip.Prefix) bool { return slices.ContainsFunc(o.Prefixes, p.Overlaps) })
		if o.ID != a.ID && d.former(o) && clash {
			if err := tx.DeleteAllocation(o.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// former reports whether Docker asked for an allocation in an earlier term alone, and
// asks anew in this one.
func (d *Driver) former(a store.Allocation) bool {
	term := d.term()
	return term != 0 && a.Term != term && d.Repeats()
}

// Repeats reports whether Docker asks in this term for all that it has: what it has not
// asked for may be gone.
func (d *Driver) Repeats() bool {
	return d.Doubt == nil || !d.Doubt() || d.repeated.Load() == d.term()
}

func (d *Driver) term() uint64 {
	if d.Term == nil {
		return 0
	}
	return d.Term()
}

// unallocated refuses a VNI that another network has, as far as this host knows.
func (d *Driver) unallocated(tx *store.Tx, n store.Network, foreign []VXLAN) error {
	all, err := tx.Allocations()
	if err != nil {
		return err
	}
	for _, o := range all {
		if o.VNI == n.VNI && o.ID != n.ID && !d.former(o) {
			return clashError{fmt.Errorf("vni %d belongs to Swarm network %.12s with subnets %v; choose another", n.VNI, o.ID, o.Prefixes)}
		}
	}
	if own, err := tx.NetworkByVNI(n.VNI); err == nil && own.ID == n.ID {
		return nil // the leader's own host runs it already
	}
	n.Key = nil // whoever runs it, and is not known to hold the key, runs another
	return checkVNI(tx, n, foreign, d.DB.Self().DataPort)
}

// deriveVNI chooses a VNI from a network's id, so that two leaders that know nothing
// of each other's choices hardly ever take the same. It must stay as it is: managers
// of several versions ask it.
func deriveVNI(id store.NetworkID, round int) store.VNI {
	sum := sha256.Sum256(fmt.Appendf(nil, "weft vni 1 %s %d", id, round))
	room := uint32(store.MaxVNI - store.FirstVNI + 1)
	return store.FirstVNI + store.VNI(binary.BigEndian.Uint32(sum[:])%room)
}

// FreeNetwork forgets an allocation. An unknown one is no error.
func (d *Driver) FreeNetwork(ctx context.Context, r network.FreeNetworkRequest) (struct{}, error) {
	d.noteRefusal(store.NetworkID(r.NetworkID), false, nil)
	err := d.DB.Update(ctx, func(tx *store.Tx) error { return tx.DeleteAllocation(store.NetworkID(r.NetworkID)) })
	return struct{}{}, err
}

func joined(addresses []netip.Addr) string {
	var out []string
	for _, a := range addresses {
		out = append(out, a.String())
	}
	return strings.Join(out, ",")
}

func anyValues(m map[string]string) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

func pointers(data []network.IPAMData) []*network.IPAMData {
	out := make([]*network.IPAMData, 0, len(data))
	for i := range data {
		out = append(out, &data[i])
	}
	return out
}

// shown hides a key.
func shown(option, value string) string {
	if option == "key" || option == OptKey {
		return "…"
	}
	return value
}

// Shown returns options as they may be shown: without a key.
func Shown(options map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range options {
		out[k] = shown(k, v)
	}
	return out
}
