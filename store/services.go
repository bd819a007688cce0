package store

import (
	"crypto/hmac"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Service is a virtual address in a network, and the addresses of the tasks that answer
// for it, as a manager of the Swarm tells.
type Service struct {
	VNI      VNI          `json:"vni"`
	VIP      netip.Addr   `json:"vip"`
	Name     string       `json:"name"`               // for people
	Backends []netip.Addr `json:"backends,omitempty"` // sorted
	Index    uint64       `json:"index"`              // Swarm's version of it: the highest counts
	// Proof shows that the host that tells it holds the network's key (Network.Proof).
	Proof []byte `json:"proof,omitempty"`
}

// Limits of what a peer can make this host remember.
const (
	maxServices = 4096
	maxBackends = 4096    // of one service
	MaxBackends = 1 << 16 // of all services of a host
)

// Check returns why no host of ours would tell the service.
func (s Service) Check() error {
	if s.VNI == HostVNI || s.VNI > MaxVNI || !s.VIP.IsValid() || len(s.Name) > 256 || len(s.Backends) > maxBackends || len(s.Proof) > ProofBytes {
		return fmt.Errorf("service %.80q of vni %d is not valid", s.Name, s.VNI)
	}
	for _, a := range s.Backends {
		if !a.IsValid() || a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() {
			return fmt.Errorf("address %s of service %.80q is not valid", a, s.Name)
		}
	}
	return nil
}

// ServicesOf returns what a host tells, this one or a peer.
func (tx *Tx) ServicesOf(id HostID) ([]Service, error) {
	all, err := get[[]Service](tx, bucketServices, []byte(id), "services that host "+string(id)+" told")
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return all, err
}

// PutServices replaces what a host tells, this one (self) or a peer. To tell the same
// again changes nothing.
func (tx *Tx) PutServices(id HostID, self bool, all []Service) error {
	old, err := tx.ServicesOf(id)
	if err != nil {
		return err
	}
	all = tidyServices(all)
	if slices.EqualFunc(old, all, Service.equal) {
		return nil
	}
	for _, s := range slices.Concat(old, all) {
		tx.touch(s.VNI)
	}
	if self {
		if _, err := tx.bump(HostVNI); err != nil { // peers are told
			return err
		}
	}
	if len(all) == 0 {
		return tx.tx.Bucket(bucketServices).Delete([]byte(id))
	}
	return put(tx, bucketServices, []byte(id), all)
}

// Tells reports whether a host tells just these services: a transaction that changes
// nothing still costs a sync of the disk.
func (tx *Tx) Tells(id HostID, all []Service) (bool, error) {
	old, err := tx.ServicesOf(id)
	return slices.EqualFunc(old, tidyServices(all), Service.equal), err
}

// tidyServices returns the services as they are kept.
func tidyServices(all []Service) []Service {
	all = all[:min(len(all), maxServices)]
	sum := 0
	for i, s := range all {
		if sum += len(s.Backends); sum > MaxBackends {
			all = all[:i]
			break
		}
	}
	return slices.SortedFunc(slices.Values(all), func(a, b Service) int {
		if a.VNI != b.VNI {
			return int(a.VNI) - int(b.VNI)
		}
		return a.VIP.Compare(b.VIP)
	})
}

func (s Service) equal(o Service) bool {
	return s.VNI == o.VNI && s.VIP == o.VIP && s.Name == o.Name && s.Index == o.Index &&
		hmac.Equal(s.Proof, o.Proof) && slices.Equal(s.Backends, o.Backends)
}

// Services returns the services of a network, one for each virtual address, sorted by
// that: what a living host told goes before what a silent one did, and then the highest
// index. What nobody else tells holds, however long its host is silent.
func (tx *Tx) Services(n Network) ([]Service, error) {
	type told struct {
		Service
		by     HostID
		silent bool
	}
	best := map[netip.Addr]told{}
	revoked, err := tx.Revocations()
	if err != nil {
		return nil, err
	}
	err = tx.tx.Bucket(bucketServices).ForEach(func(k, _ []byte) error {
		id := HostID(k)
		all, err := tx.ServicesOf(id)
		if err != nil {
			return err
		}
		p, err := tx.Peer(id)
		if err != nil && !errors.Is(err, ErrNotFound) { // this host is no peer
			return err
		}
		if outOf(revoked, id) {
			return nil
		}
		for _, s := range all {
			if s.VNI != n.VNI || !hmac.Equal(s.Proof, n.Proof(id)) {
				continue
			}
			now := told{s, id, !p.DeadSince.IsZero()}
			if was, ok := best[s.VIP]; !ok || now.silent != was.silent && was.silent || now.silent == was.silent &&
				(s.Index > was.Index || s.Index == was.Index && strings.Compare(string(id), string(was.by)) < 0) {
				best[s.VIP] = now
			}
		}
		return nil
	})
	out := make([]Service, 0, len(best))
	for _, s := range best {
		out = append(out, s.Service)
	}
	slices.SortFunc(out, func(a, b Service) int { return a.VIP.Compare(b.VIP) })
	return out, err
}

// AllServices returns what all hosts tell, whether it counts or not.
func (tx *Tx) AllServices() (out []Service, err error) {
	err = tx.tx.Bucket(bucketServices).ForEach(func(k, _ []byte) error {
		all, err := tx.ServicesOf(HostID(k))
		out = append(out, all...)
		return err
	})
	return out, err
}
