package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/weftnet/weft/store"
)

// match returns the network that a user means by a VNI or the beginning of Docker's id.
func match(all []store.Network, name string) (store.Network, error) {
	number, numErr := strconv.ParseUint(name, 10, 24)
	var found []store.Network
	for _, n := range all {
		if numErr == nil && uint64(n.VNI) == number {
			return n, nil
		}
		if name != "" && strings.HasPrefix(string(n.ID), name) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return store.Network{}, fmt.Errorf("network %.80q: %w on this host; weft networks lists them", name, store.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return store.Network{}, fmt.Errorf("%d networks begin with %q; give more of the id", len(found), name)
}

// find returns the network that a user means: "host", a VNI, or the beginning of
// Docker's id. One that only the kernel has left can be named by its VNI.
func (s *services) find(name string) (id store.NetworkID, vni store.VNI, err error) {
	if name == "" || name == "host" {
		return "", store.HostVNI, nil
	}
	var all []store.Network
	if err := s.db.View(func(tx *store.Tx) (err error) { all, err = tx.Networks(); return err }); err != nil {
		return "", 0, err
	}
	n, err := match(all, name)
	if number, numErr := strconv.ParseUint(name, 10, 24); errors.Is(err, store.ErrNotFound) && numErr == nil && number > 0 {
		return "", store.VNI(number), nil
	}
	return n.ID, n.VNI, err
}

// forget removes what is recorded of a network that Docker no longer has, as the command
// knows from it, and with pools what our IPAM had given to it.
func (s *services) forget(ctx context.Context, id store.NetworkID, pools bool) (forgetReply, error) {
	n, err := s.driver.Forget(ctx, id)
	r := forgetReply{Network: id, VNI: n.VNI, Pools: []string{}}
	if err != nil {
		return r, fmt.Errorf("network %.12s: %w", id, err)
	}
	s.log.Warn("network forgotten by command: Docker has it no more", "network", id, "vni", n.VNI)
	if !pools {
		return r, nil
	}
	gone, err := s.ipam.Forget(ctx, n.Prefixes())
	if err != nil {
		return r, fmt.Errorf("network %.12s is forgotten, but not its pools: %w", id, err)
	}
	for _, p := range gone {
		r.Pools = append(r.Pools, p.Prefix.String())
	}
	return r, nil
}
