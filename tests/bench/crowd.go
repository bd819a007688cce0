package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/weftnet/weft/store"
	"github.com/weftnet/weft/store/gossip"
	"github.com/weftnet/weft/tests/hosts"
)

// crowd is a member of the cluster that has endpoints of which the others are told, and
// nothing in its kernel.
type crowd struct {
	Address   netip.Addr      `json:"address"`
	Join      []string        `json:"join"`
	Key       string          `json:"key"` // of the cluster, hex
	Networks  []store.Network `json:"networks"`
	Endpoints int             `json:"endpoints"` // in each network
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
	c := crowd{Address: third.Address, Join: []string{s.a.Address.String()}, Key: s.key, Endpoints: n}
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
	raw, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(raw, &c)
	}
	if err != nil {
		return err
	}
	key, err := hex.DecodeString(c.Key)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Dir(file), "crowd-")
	if err != nil {
		return err
	}
	identity, err := store.LoadIdentity(dir)
	if err != nil {
		return err
	}
	db, err := store.Open(filepath.Join(dir, "weft.db"), store.Host{ID: identity.ID, Name: "crowd", Address: c.Address, DataPort: gossip.DefaultDataPort,
		Version: "crowd", Tunnel: store.Tunnel{Keys: []store.WGKey{{1}}, Port: 4798}})
	if err != nil {
		return err
	}
	defer db.Close()
	err = db.Update(ctx, func(tx *store.Tx) error {
		for _, n := range c.Networks {
			if err := tx.PutNetwork(n); err != nil {
				return err
			}
			pool := n.Subnets[0].Pool.Addr().As4()
			for i := range c.Endpoints {
				number := crowdFirst + i
				a := netip.AddrFrom4([4]byte{pool[0], pool[1], byte(number >> 8), byte(number)})
				id := fmt.Sprintf("%032x%032x", n.VNI, i+1)
				if _, err := tx.PutEndpoint(store.Endpoint{ID: store.EndpointID(id), Network: n.ID, VNI: n.VNI, MAC: store.DeriveMAC("crowd", id), IPv4: netip.PrefixFrom(a, 16)}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	members, err := gossip.New(gossip.Config{DB: db, Identity: identity, Join: c.Join, Key: key})
	if err != nil {
		return err
	}
	return members.Run(ctx)
}
