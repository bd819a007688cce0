package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/tests/hosts"
	"github.com/weftnet/weft/tests/peer"
)

// crowd is a member of the cluster that has endpoints of which the others are told.
type crowd struct {
	peer.Peer
	Endpoints int `json:"endpoints"` // in each network
}

// crowdFirst is the number of the first endpoint's address in its subnet: containers of
// the bench have lower ones.
const crowdFirst = 100 << 8

// fill makes the hosts hold n endpoints of a third one in each network of Weft.
func (s *setup) fill(third *hosts.Host, n int) error {
	networks, err := s.held(s.a)
	if err != nil {
		return err
	}
	c := crowd{peer.Peer{Name: "crowd", Address: third.Address, Join: []string{s.a.Address.String()}, Key: s.key, Tunnel: store.WGKey{1}}, n}
	for _, one := range networks {
		c.Networks = append(c.Networks, one.Network)
	}
	raw, err := json.Marshal(c)
	if err != nil {
		return err
	}
	file := filepath.Join(s.plugin, "crowd.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		return err
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := third.Command(s.ctx, program, "-crowd", file)
	cmd.Stderr, cmd.WaitDelay = os.Stderr, time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	s.started = append(s.started, cmd)
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		missing := ""
		for _, h := range []*hosts.Host{s.a, s.b} {
			networks, err := s.held(h)
			if err != nil {
				return err
			}
			for _, one := range networks {
				if one.Remote < n {
					missing = fmt.Sprintf("host %s holds %d endpoints of network %d, not %d", h.Name, one.Remote, one.VNI, n)
				}
			}
		}
		if missing == "" {
			return nil
		}
		if time.Now().After(end) || s.ctx.Err() != nil {
			return errors.New(missing)
		}
	}
}

// heldNetwork is a network as weft networks shows it.
type heldNetwork struct {
	store.Network
	Remote int `json:"remote"`
}

func (s *setup) held(h *hosts.Host) (networks []heldNetwork, err error) {
	out, err := h.Exec(s.ctx, "weft", "networks", "-o", "json")
	if err != nil {
		return nil, err
	}
	return networks, json.Unmarshal([]byte(out), &networks)
}

// play is the process of the crowd.
func play(ctx context.Context, file string) error {
	var c crowd
	err := peer.Read(file, &c)
	if err != nil {
		return err
	}
	if c.Dir, err = os.MkdirTemp(filepath.Dir(file), "crowd-"); err != nil {
		return err
	}
	return c.Run(ctx, func(tx *store.Tx, n store.Network) error {
		pool := n.Subnets[0].Pool.Addr().As4()
		for i := range c.Endpoints {
			number := crowdFirst + i
			a := netip.AddrFrom4([4]byte{pool[0], pool[1], byte(number >> 8), byte(number)})
			id := fmt.Sprintf("%032x%032x", n.VNI, i+1)
			if _, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(id), Network: n.ID, VNI: n.VNI, MAC: store.DeriveMAC("crowd", id), IPv4: netip.PrefixFrom(a, 16)}); err != nil {
				return err
			}
		}
		return nil
	})
}
